"""Certification: a runtime must leave the emulator's trace before the emulator's attack figures count as its own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hardware.emulator import run_emulator
from hardware.errors import SpikeguardError
from hardware.formats.bundle import Bundle
from hardware.runtimes.opening import open_runtime
from hardware.trace import compare_traces
from pipeline.attacks.gradient import Crafted
from pipeline.attacks.targets import Codes
from pipeline.fidelity.crafting import Images
from pipeline.progress import track

# The emulator is held to the reference; Lava and netx step too slowly for more than a few dozen images.
SLOW = ("reference", "lava", "netx")


class RuntimeFailedError(SpikeguardError):
    """A requested runtime did not finish."""


@dataclass(frozen=True)
class Selection:
    """Images a runtime is certified on, adversarial ones first."""

    codes: Codes
    adversarial: int


def select_subset(images: Images, crafted: Mapping[str, Crafted], count: int) -> Selection:
    """``count`` adversarial images, those that fooled their target first and all attacks in turn, then clean ones."""
    pools = [np.concatenate([np.flatnonzero(c.fooled), np.flatnonzero(~c.fooled)]) for c in crafted.values()]
    order = [
        (attack, int(pool[row]))
        for row in range(len(images.labels))
        for attack, pool in zip(crafted.values(), pools, strict=True)
    ][:count]
    adversarial = [attack.codes[index] for attack, index in order]
    clean = images.codes[:count]
    return Selection(np.concatenate([np.stack(adversarial), clean]), len(adversarial))


def select_everything(images: Images, crafted: Mapping[str, Crafted]) -> Selection:
    """All crafted images and all clean ones."""
    adversarial = np.concatenate([attack.codes for attack in crafted.values()])
    return Selection(np.concatenate([adversarial, images.codes]), len(adversarial))


def certify(
    bundle: Bundle, names: Sequence[str], images: Images, crafted: Mapping[str, Crafted], count: int
) -> list[dict[str, Any]]:
    """Run every named runtime from the bundle's files and compare what it exposes.

    Slow runtimes get ``count`` adversarial and ``count`` clean images with full traces; ONNX Runtime gets every
    image of the check for its readouts, and those same subset images for traces. The emulator is compared with the
    reference on the subset, everything else with the emulator.

    Returns:
        Rows of ``runtimes`` in ``report.json``.

    Raises:
        RuntimeFailedError: if a runtime could not be opened or did not finish.
    """
    subset = select_subset(images, crafted, count)
    expected = run_emulator(bundle.network, subset.codes, record="traces")
    rows = []
    with track("certify", len(names)) as advance:
        for name in names:
            advance(name, units=0)
            try:
                runtime = open_runtime("reference" if name == "emulator" else name, bundle)
                start = time.perf_counter()
                trace = runtime.run(subset.codes, record="traces")
                seconds = time.perf_counter() - start
                difference = compare_traces(expected, trace)
                row = {
                    "name": name,
                    "version": open_runtime(name, bundle).version if name == "emulator" else runtime.version,
                    "samples": len(subset.codes) - subset.adversarial,
                    "adversarial_samples": subset.adversarial,
                    "mismatched_spikes": difference.spikes,
                    "mismatched_membranes": difference.membranes,
                    "mismatched_readouts": difference.readouts,
                    "samples_per_second": len(subset.codes) / seconds,
                    "first_mismatch": None if difference.first is None else list(difference.first),
                }
                if name == "onnxruntime":
                    everything = select_everything(images, crafted)
                    start = time.perf_counter()
                    readouts = runtime.run(everything.codes).readouts
                    row["samples_per_second"] = len(everything.codes) / (time.perf_counter() - start)
                    wrong = (readouts != run_emulator(bundle.network, everything.codes).readouts).sum()
                    row["mismatched_readouts"] = difference.readouts + int(wrong)
                    row["samples"] = len(everything.codes) - everything.adversarial
                    row["adversarial_samples"] = everything.adversarial
                if name == "emulator":
                    start = time.perf_counter()
                    run_emulator(bundle.network, images.codes)
                    row["samples_per_second"] = len(images.codes) / (time.perf_counter() - start)
            except SpikeguardError as error:
                raise RuntimeFailedError(f"runtime {name} did not finish: {error}") from error
            rows.append(row)
            advance(name)
    return rows


def is_certified(row: Mapping[str, Any]) -> bool:
    """Whether a runtime's row shows no mismatch in anything it exposes."""
    return not (row["mismatched_spikes"] or row["mismatched_membranes"] or row["mismatched_readouts"])
