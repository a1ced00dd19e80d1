"""Certification: a runtime must leave the reference's trace before the attack figures count as its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

import numpy as np

from hardware.emulator import run_emulator
from hardware.errors import SpikeguardError
from hardware.formats.bundle import Bundle
from hardware.reference import run_reference
from hardware.runtimes.lava import LavaRuntime, NetxRuntime
from hardware.runtimes.opening import open_runtime
from hardware.runtimes.protocol import Runtime
from hardware.runtimes.remote import is_service
from hardware.trace import Trace, compare_traces
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import Codes
from pipeline.fidelity.crafting import Images
from pipeline.progress import track

Open = Callable[[Bundle], Runtime]
NO_OTHERS: Mapping[str, Open] = MappingProxyType({})


class RuntimeFailedError(SpikeguardError):
    """A requested runtime did not finish."""


@dataclass(frozen=True)
class Selection:
    """Images a runtime is certified on, adversarial ones first."""

    codes: Codes
    adversarial: int


def select_subset(images: Images, crafted: Mapping[str, Crafted], count: int) -> Selection:
    """``count`` adversarial images, those that fooled their target first and all attacks in turn, then clean ones."""
    sought = [made for made in crafted.values() if is_sought(made)]
    ordered = []
    for successful in (True, False):
        queues = [[made.codes[row] for row in np.flatnonzero(made.fooled == successful)] for made in sought]
        ordered += [codes for turn in zip_longest(*queues) for codes in turn if codes is not None]
    adversarial = ordered[:count]
    clean = images.codes[:count]
    return Selection(np.concatenate([np.stack(adversarial), clean]), len(adversarial))


def select_everything(images: Images, crafted: Mapping[str, Crafted]) -> Selection:
    """All images that were sought by an attack, then noisy and clean ones."""
    sought = [made.codes for made in crafted.values() if is_sought(made)]
    others = [made.codes for made in crafted.values() if not is_sought(made)]
    return Selection(np.concatenate([*sought, *others, images.codes]), sum(len(codes) for codes in sought))


def is_sought(crafted: Crafted) -> bool:
    """Whether a model was asked for the images; noise is no adversary."""
    return crafted.gradients > 0


def certify(
    bundle: Bundle,
    names: Sequence[str],
    images: Images,
    crafted: Mapping[str, Crafted],
    count: int,
    others: Mapping[str, Open] = NO_OTHERS,
) -> list[dict[str, Any]]:
    """Run every named runtime from the bundle's files and compare all it exposes with the reference.

    Each gets ``count`` adversarial and ``count`` clean images with traces. ONNX Runtime, which is fast, and services,
    which expose readouts only, also answer every image of the check; those are compared with the emulator's. Runtimes
    that the project has no name for come as ``others``: what opens each, by the name that errors call it.

    Returns:
        Rows of ``runtimes`` in ``report.json``.

    Raises:
        RuntimeFailedError: if a runtime could not be opened or did not finish.
    """
    # The attack figures come from the emulator, so it is certified whether or not it was asked for.
    opened_by = {name: partial(open_runtime, name) for name in ("emulator", *names)} | dict(others)
    subset = select_subset(images, crafted, count)
    expected = run_reference(bundle.network, subset.codes)
    rows = []
    with track("certify", len(opened_by)) as advance:
        for name, opened in opened_by.items():
            advance(name, units=0)
            try:
                row = _certify_one(opened(bundle), subset, expected)
                if name == "onnxruntime" or is_service(name):
                    everything = select_everything(images, crafted)
                    row |= _answer_everything(opened(bundle), bundle, everything, row)
            except SpikeguardError as error:
                raise RuntimeFailedError(f"runtime {name} did not finish: {error}") from error
            rows.append(row)
            advance(name)
    return rows


def _certify_one(runtime: Runtime, subset: Selection, expected: Trace) -> dict[str, Any]:
    start = time.perf_counter()
    trace = runtime.run(subset.codes, record="traces")
    seconds = time.perf_counter() - start
    difference = compare_traces(expected, trace)
    times = runtime.last_run if isinstance(runtime, LavaRuntime | NetxRuntime) else None
    return {
        "name": runtime.name,
        "version": runtime.version,
        "samples": len(subset.codes) - subset.adversarial,
        "adversarial_samples": subset.adversarial,
        "mismatched_spikes": difference.spikes,
        "mismatched_membranes": difference.membranes,
        "mismatched_readouts": difference.readouts,
        "first_mismatch": None if difference.first is None else first_mismatch(*difference.first),
        "samples_per_second": len(subset.codes) / seconds,
        # Only Lava tells apart what it needs before the first step and what each sample needs then.
        "startup_seconds": None if times is None else times.startup,
        "stepping_samples_per_second": None if times is None else len(subset.codes) / times.stepping,
    }


def first_mismatch(layer: str, sample: int, step: int, neuron: int) -> dict[str, Any]:
    """Where a runtime first computed something else: earliest image, then step, then layer from the input on."""
    return {"layer": layer, "sample": sample, "step": step, "neuron": neuron}


def _answer_everything(
    runtime: Runtime, bundle: Bundle, everything: Selection, row: Mapping[str, Any]
) -> dict[str, Any]:
    start = time.perf_counter()
    readouts = runtime.run(everything.codes).readouts
    seconds = time.perf_counter() - start
    wrong = int((readouts != run_emulator(bundle.network, everything.codes).readouts).sum())
    return {
        "samples": len(everything.codes) - everything.adversarial,
        "adversarial_samples": everything.adversarial,
        "mismatched_readouts": row["mismatched_readouts"] + wrong,
        "samples_per_second": len(everything.codes) / seconds,
    }


def is_certified(row: Mapping[str, Any]) -> bool:
    """Whether a runtime's row shows no mismatch in anything it exposes."""
    return not (row["mismatched_spikes"] or row["mismatched_membranes"] or row["mismatched_readouts"])
