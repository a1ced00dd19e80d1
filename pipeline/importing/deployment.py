"""From a NIR file of other software to a bundle, and how far what is deployed is from what was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.bundle import EXPORT_TARGETS, FLOAT_ONNX_TARGETS, UNROLLED_FILES, refusals, write_bundle
from hardware.emulator import run_emulator
from hardware.errors import Missing, RuleViolations, SpikeguardError, Violation
from hardware.files import sha256_of
from hardware.formats.bundle import Bundle, open_bundle
from hardware.formats.nir_file import read_nir
from hardware.formats.nir_graph import read_nir_graph
from hardware.formats.nir_layout import METADATA_KEY
from hardware.network import InputSpec, IntegerNetwork
from hardware.runtimes.opening import FILES, open_runtime
from hardware.trace import compare_traces
from pipeline.attribution import compare
from pipeline.config import portable_settings
from pipeline.data.dataset import Dataset, digest_of
from pipeline.importing.conventions import conventions_of
from pipeline.importing.networks import network_of
from pipeline.importing.samples import Codes, Samples, draw_samples, read_samples
from pipeline.models.float_file import float_files
from pipeline.models.float_onnx import float_onnx_files
from pipeline.models.spiking import SpikingNetwork
from pipeline.quantization import quantize
from pipeline.statistics import pair, tango_bound, wilson_interval

GOLDEN, RUNTIME_SAMPLES, BATCH, DEFAULT_BITS = 8, 8, 64, 8
CONFIDENCE = 0.95
READ, INTEGERS = "float graph", "integer network"
UNROLLED = Violation(
    "input", "the unrolled graph takes one image per sample", "changes over time", "static", "run the single step"
)


@dataclass(frozen=True)
class ComparisonRow:
    """One model on the samples, beside the one it is to equal.

    Attributes:
        model, reference: their names.
        samples: that both ran.
        differing_spikes: share of the spikes, and silences, of populations that differ; None where it must be none.
        mismatched: spikes, membranes and readouts that differ, each None if not exposed; None where some may.
        argmax_flips: samples with another class.
        accuracy: ``(right, lower, upper)`` share of right answers with its 95 % interval; None without labels.
        reason: why it was not run; empty if it was.
    """

    model: str
    reference: str
    samples: int = 0
    differing_spikes: float | None = None
    mismatched: tuple[int | None, int | None, int] | None = None
    argmax_flips: int = 0
    accuracy: tuple[float, float, float] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Imported:
    """What came of a file.

    Attributes:
        bundle: on disk.
        samples: that it was quantised and compared on.
        rows: comparisons.
        left_out: by model file, why it cannot hold the network.
        bound: one-sided 95 % lower bound of deployed minus read accuracy (Tango, 1998); None without labels.
    """

    bundle: Bundle
    samples: Samples
    rows: tuple[ComparisonRow, ...]
    left_out: Mapping[str, tuple[Violation, ...]]
    bound: float | None


def import_nir(
    path: Path,
    target: str,
    folder: Path,
    *,
    written_by: str | None = None,
    assumed: Sequence[str] = (),
    bits: int | None = None,
    data: Path | None = None,
    seed: int = 0,
) -> Imported:
    """Read a NIR file, quantise it, write a bundle for a target, and compare all that is in it.

    A file that this project wrote holds an integer network already and says all about it.

    Args:
        path: of the NIR file.
        target: a key of ``EXPORT_TARGETS``.
        folder: of the bundle.
        written_by, assumed: see :func:`~pipeline.importing.conventions.conventions_of`.
        bits: of the weights; 8 if not given.
        data: .npz with inputs and perhaps labels; without it, noise.
        seed: of the order of the samples, or of the noise.

    Raises:
        SpikeguardError: if something is said of a file of this project.
        RuleViolations: for all that NIR leaves open and nobody said; for every node that cannot be deployed; if none
            of the target's files can hold the network.
    """
    file = read_nir_graph(path)
    facts: dict[str, Any] = {"imported": {"sha256": sha256_of(path), "written_by": written_by}, "seed": seed}
    if METADATA_KEY in file.metadata:
        if written_by or assumed or bits:
            raise SpikeguardError(
                f"{path} was written by this project: its integers and their meaning stand in it; "
                "leave out --written-by, --assume and --bits"
            )
        deployed = read_nir(path)
        samples = _samples(data, deployed.input, deployed.steps, seed)
        return _deploy(deployed, None, samples, target, folder, {**facts, "samples": samples.source})
    conventions = conventions_of(file, written_by, assumed)
    network = network_of(file, conventions)
    facts["imported"] |= asdict(conventions)
    spec = InputSpec(network.graph.input_shape, network.graph.max_code)
    samples = _samples(data, spec, conventions.steps, seed)
    facts["samples"] = samples.source
    quantized = quantize(network, samples.calibration, bits or DEFAULT_BITS, facts)
    facts["attribution"] = [asdict(row) for row in quantized.attribution]
    return _deploy(quantized.network, network, samples, target, folder, facts)


def _samples(data: Path | None, spec: InputSpec, steps: int, seed: int) -> Samples:
    return draw_samples(spec, steps, seed) if data is None else read_samples(data, spec, steps, seed)


def _deploy(
    deployed: IntegerNetwork,
    read: SpikingNetwork | None,
    samples: Samples,
    target: str,
    folder: Path,
    facts: Mapping[str, Any],
) -> Imported:
    """Write the bundle, and run everything on the test samples."""
    left_out = {name: why for name, why in refusals(deployed).items() if name in EXPORT_TARGETS[target]}
    if samples.test.ndim == len(deployed.input.shape) + 2:
        left_out |= {name: (UNROLLED,) for name in EXPORT_TARGETS[target] if name in UNROLLED_FILES}
    models = [name for name in EXPORT_TARGETS[target] if name not in left_out]
    if not models:
        raise RuleViolations(f"files for {target}", [row for rows in left_out.values() for row in rows])
    if samples.config is not None and samples.labels is not None:
        test = Dataset(samples.test, samples.labels)
        facts = {**facts, "config": portable_settings(samples.config), "test_split": digest_of(test)}
    golden, further = samples.calibration[:GOLDEN], {} if read is None else float_files(read)
    if read is not None and target in FLOAT_ONNX_TARGETS:
        further |= float_onnx_files(read, golden)
    write_bundle(
        folder,
        deployed,
        golden_codes=golden,
        float_model_files=further,
        provenance=facts,
        models=models,
    )
    bundle = open_bundle(folder)
    trace = run_emulator(bundle.network, samples.test, "spikes")
    answers = bundle.network.logits(trace.readouts)
    rows, bound = [], None
    if read is not None:
        spikes, logits = _record(read, samples.test)
        rows.append(ComparisonRow(READ, "", len(logits), accuracy=_accuracy(logits, samples)))
        found = {name: one.spikes for name, one in trace.populations.items() if one.spikes is not None}
        row = compare(INTEGERS, found, answers, spikes, logits)
        share = float(np.mean(list(row.disagreement.values()) or [0.0]))
        rows.append(
            ComparisonRow(INTEGERS, READ, len(logits), share, None, row.argmax_flips, _accuracy(answers, samples))
        )
        if samples.labels is not None:
            right = pair(logits.argmax(1) == samples.labels, answers.argmax(1) == samples.labels)
            bound = tango_bound(right, CONFIDENCE, "lower")
    else:
        rows.append(ComparisonRow(INTEGERS, "", len(answers), accuracy=_accuracy(answers, samples)))
    rows += [_runtime_row(name, bundle, samples.test[:RUNTIME_SAMPLES]) for name in _runtimes(models)]
    return Imported(bundle, samples, tuple(rows), left_out, bound)


def _runtimes(models: Sequence[str]) -> list[str]:
    """What can run the files of a bundle."""
    return [name for name, files in FILES.items() if set(files) <= set(models)]


def _runtime_row(name: str, bundle: Bundle, codes: Codes) -> ComparisonRow:
    """A runtime against the integer network, on its own files."""
    expected = run_emulator(bundle.network, codes, "traces")
    try:
        trace = open_runtime(name, bundle).run(codes, "traces")
    except (Missing, RuleViolations) as error:
        return ComparisonRow(name, INTEGERS, reason=str(error).replace("\n", " "))
    difference = compare_traces(expected, trace)
    mismatched = (difference.spikes, difference.membranes, difference.readouts)
    flips = int((trace.readouts.argmax(1) != expected.readouts.argmax(1)).sum())
    return ComparisonRow(name, INTEGERS, len(codes), argmax_flips=flips, mismatched=mismatched)


def _record(network: SpikingNetwork, codes: Codes) -> tuple[dict[str, NDArray[np.bool_]], NDArray[np.float64]]:
    """Spikes ``(samples, steps, neurons)`` by layer, and logits."""
    parts = [network.record(network.images(codes[i : i + BATCH])) for i in range(0, len(codes), BATCH)]
    names = list(parts[0][1])
    spikes = {name: np.concatenate([layers[name].spikes.numpy() for _, layers in parts]) for name in names}
    return spikes, np.concatenate([logits.double().numpy() for logits, _ in parts])


def _accuracy(logits: NDArray[np.float64], samples: Samples) -> tuple[float, float, float] | None:
    if samples.labels is None:
        return None
    right = int((logits.argmax(1) == samples.labels).sum())
    return right / len(logits), *wilson_interval(right, len(logits))
