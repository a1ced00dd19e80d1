"""Re-checks a bundle: every file of it that can be run here must leave the golden traces. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata

from hardware.formats.bundle import (
    NIR_CUBA_FILE,
    NIR_FILE,
    ONNX_FILE,
    ONNX_FLOAT_FILE,
    ONNX_INT8_FILE,
    ONNX_STEP_FILE,
    Bundle,
    Golden,
)
from hardware.formats.float_golden import FloatComparison, FloatGolden, compare_float
from hardware.formats.network_file import JSON_FILE
from hardware.network import SEMANTICS_VERSION
from hardware.runtimes.opening import FILES, open_runtime
from hardware.trace import Trace, compare_traces

Run = Callable[[Bundle, Golden], tuple[Trace, str]]


@dataclass(frozen=True)
class VerifyRow:
    """One file, read and run by one reader.

    Attributes:
        mismatched_spikes, mismatched_membranes, mismatched_readouts: values that differ from the golden
            trace; None where the reader does not expose them. Of the float SNN: spikes and logits that differ by
            more than rounding explains.
        seconds: reading and running.
        note: what rounding changed in the float SNN.
    """

    file: str
    reader: str
    version: str
    samples: int
    mismatched_spikes: int | None
    mismatched_membranes: int | None
    mismatched_readouts: int
    seconds: float
    note: str = ""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.mismatched_spikes or self.mismatched_membranes or self.mismatched_readouts)


def verify_bundle(bundle: Bundle, runtimes: Sequence[str] = ()) -> list[VerifyRow]:
    """Run the golden inputs through every file of the bundle that has a reader here, and on runtimes besides.

    Args:
        bundle: what is verified.
        runtimes: names, as of :func:`~hardware.runtimes.opening.open_runtime`, of those to certify too.

    Raises:
        SpikeguardError: if a file cannot be read or run.
    """
    golden = bundle.golden
    rows = []
    further = [("/".join(FILES.get(name, (JSON_FILE,))), name, _runtime(name)) for name in runtimes]
    for file, reader, run in [*(row for row in READERS if row[0] in bundle), *further]:
        start = time.perf_counter()
        trace, version = run(bundle, golden)
        seconds = time.perf_counter() - start
        difference = compare_traces(golden.trace, trace)
        rows.append(
            VerifyRow(
                file,
                reader,
                version,
                golden.trace.samples,
                difference.spikes,
                difference.membranes,
                difference.readouts,
                seconds,
            )
        )
    if ONNX_FLOAT_FILE in bundle:
        start = time.perf_counter()
        found, version = judge_float(bundle, bundle.float_golden)
        counts = found.unexplained_spikes, None, found.unexplained_logits
        seconds = time.perf_counter() - start
        rows.append(VerifyRow(ONNX_FLOAT_FILE, "onnxruntime", version, found.samples, *counts, seconds, found.summary))
    return rows


def judge_float(bundle: Bundle, golden: FloatGolden) -> tuple[FloatComparison, str]:
    """The float SNN's ONNX file against the network as trained, on the first golden inputs; and the runtime's version.

    Raises:
        SpikeguardError: if a file cannot be read or run.
    """
    from hardware.runtimes.onnxruntime import load_model, run_float

    model = load_model(bundle.file(ONNX_FLOAT_FILE), "float")
    activity = run_float(model, bundle.golden.codes[: len(golden.activity.logits)])
    return compare_float(golden, activity), metadata.version("onnxruntime")


def _reference(bundle: Bundle, golden: Golden) -> tuple[Trace, str]:
    from hardware.reference import run_reference

    return run_reference(bundle.network, golden.codes), SEMANTICS_VERSION


def _emulator(bundle: Bundle, golden: Golden) -> tuple[Trace, str]:
    from hardware.emulator import run_emulator

    return run_emulator(bundle.network, golden.codes, "traces"), SEMANTICS_VERSION


def _nir(file: str) -> Run:
    def run(bundle: Bundle, golden: Golden) -> tuple[Trace, str]:
        from hardware.formats.nir_file import read_nir
        from hardware.reference import run_reference

        return run_reference(read_nir(bundle.file(file)), golden.codes), f"nir {metadata.version('nir')}"

    return run


def _runtime(name: str) -> Run:
    def run(bundle: Bundle, golden: Golden) -> tuple[Trace, str]:
        runtime = open_runtime(name, bundle)
        return runtime.run(golden.codes, "traces"), runtime.version

    return run


def _onnx(bundle: Bundle, golden: Golden) -> tuple[Trace, str]:
    from hardware.runtimes.onnxruntime import OnnxRuntime

    runtime = OnnxRuntime(bundle.file(ONNX_FILE))
    return runtime.run(golden.codes), runtime.version


def _onnx_int8(bundle: Bundle, golden: Golden) -> tuple[Trace, str]:
    from hardware.runtimes.onnxruntime import OnnxRuntime

    runtime = OnnxRuntime(bundle.file(ONNX_INT8_FILE), kind="int8")
    return runtime.run(golden.codes), runtime.version


def _onnx_step(bundle: Bundle, golden: Golden) -> tuple[Trace, str]:
    from hardware.runtimes.onnxruntime import load_model, run_steps

    model = load_model(bundle.file(ONNX_STEP_FILE), "step")
    return run_steps(model, golden.codes, "traces"), metadata.version("onnxruntime")


READERS: tuple[tuple[str, str, Run], ...] = (
    (JSON_FILE, "reference", _reference),
    (JSON_FILE, "emulator", _emulator),
    (NIR_FILE, "nir + reference", _nir(NIR_FILE)),
    (NIR_CUBA_FILE, "nir + reference", _nir(NIR_CUBA_FILE)),
    (ONNX_FILE, "onnxruntime", _onnx),
    (ONNX_STEP_FILE, "onnxruntime", _onnx_step),
    (ONNX_INT8_FILE, "onnxruntime", _onnx_int8),
)
