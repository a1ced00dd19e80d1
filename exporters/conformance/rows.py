"""Every file of a bundle in every independent reader: how many values differ from the integer reference.

NIR has no word for the 24 bits in which the reference's membranes saturate, and the frameworks that read it do not
saturate. Their spikes and readouts are held against the reference as it is, their membranes against those of the
reference without that limit; how often it clips is told beside them. They also decay in floating point, so of a
network that leaks they are shown how far they deviate, and no more.

The float SNN's file is held against the network as trained, and what rounding explains is told beside it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from textwrap import shorten

import numpy as np
from numpy.typing import NDArray

from exporters.bundle import MODEL_WRITERS
from exporters.conformance.nir_reader import NirReader
from exporters.conformance.norse_reader import NORSE
from exporters.conformance.snntorch_reader import SNNTORCH
from exporters.conformance.spikingjelly_reader import SPIKINGJELLY
from hardware.errors import Missing, RuleViolations, SpikeguardError
from hardware.formats.bundle import (
    NETX_FILE,
    NIR_CUBA_FILE,
    NIR_FILE,
    ONNX_FILE,
    ONNX_FLOAT_FILE,
    ONNX_INT8_FILE,
    ONNX_STEP_FILE,
    Bundle,
    Golden,
)
from hardware.formats.verify import READERS as OWN_READERS
from hardware.formats.verify import Run, judge_float
from hardware.network import STATE_LIMIT, IntegerNetwork
from hardware.reference import run_reference
from hardware.runtimes.opening import open_runtime
from hardware.trace import PopulationTrace, Trace, TraceComparison, compare_traces

OWN_INTERPRETER = "own interpreter"
REASON_WIDTH = 60


class Outcome(StrEnum):
    """What came of one file in one reader.

    DEVIATES: it differs, as it may: the network leaks, and the reader decays in floating point; or the file is the
        float SNN's, and rounding explains how it differs from the network as trained.
    REFUSED: the format cannot hold this network, or the reader would not compute what the file says.
    MISSING: the reader is not installed, or the bundle does not have the file though it could.
    FAILED: the reader ended with an error.
    """

    EQUAL = "equal"
    DIFFERS = "differs"
    DEVIATES = "deviates"
    REFUSED = "refused"
    MISSING = "missing"
    FAILED = "failed"


@dataclass(frozen=True)
class ConformanceRow:
    """One file in one reader, in all its processes together.

    Attributes:
        version: of the reader; None where it did not run to its end.
        samples: that each process ran.
        processes: fresh ones, one after the other.
        mismatched_spikes, mismatched_membranes, mismatched_readouts: values that differ from the reference's; None
            where the reader does not expose them. Of the float SNN: spikes and logits that differ from the trained
            network's by more than rounding explains.
        clipped_membranes: of the reference, in one process, where the reader does not saturate.
        seconds: reading and running, starting the processes included.
        reason: why there is nothing to count, or what rounding changed; else empty.
    """

    file: str
    reader: str
    version: str | None
    samples: int
    processes: int
    mismatched_spikes: int | None
    mismatched_membranes: int | None
    mismatched_readouts: int | None
    clipped_membranes: int
    seconds: float
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True)
class Reader:
    """One file and what reads it.

    Attributes:
        run: leaves a trace; None for the float SNN, whose file is judged as a whole.
        is_framework: that reads NIR; it runs in several processes, as its order of evaluation may depend on hashes,
            and its membranes neither saturate nor decay in integers.
    """

    file: str
    name: str
    run: Run | None
    is_framework: bool = False


@dataclass(frozen=True)
class Expectation:
    """What readers should find.

    Attributes:
        golden: inputs, and the trace of the reference.
        unlimited: the same trace with the membranes of the reference without its 24-bit limit.
        clipped: how many membranes the limit clips.
    """

    golden: Golden
    unlimited: Trace
    clipped: int


def _expect(network: IntegerNetwork, codes: NDArray[np.uint8]) -> Expectation:
    expected = run_reference(network, codes)
    unlimited = run_reference(network, codes, state_limit=np.iinfo(np.int32).max)
    populations, clipped = {}, 0
    for name, population in expected.populations.items():
        if population.membranes is not None:
            clipped += int((np.abs(population.membranes) == STATE_LIMIT).sum())
        populations[name] = PopulationTrace(population.spikes, unlimited.populations[name].membranes)
    return Expectation(Golden(codes, expected), Trace(expected.readouts, populations), clipped)


def _row(reader: Reader, bundle: Bundle, expected: Expectation, processes: int) -> ConformanceRow:
    start = time.perf_counter()
    try:
        _require_file(bundle, reader.file)
        found = _read_float(bundle, expected) if reader.run is None else _read(reader, bundle, expected, processes)
    except SpikeguardError as error:
        found = _Found(_outcome(error), _reason(error))
    return ConformanceRow(
        reader.file,
        reader.name,
        found.version,
        len(expected.golden.codes),
        processes,
        *found.counts,
        expected.clipped if found.version and reader.is_framework else 0,
        time.perf_counter() - start,
        found.outcome,
        found.reason,
    )


@dataclass(frozen=True)
class _Found:
    """The part of a row that reading a file decides."""

    outcome: Outcome
    reason: str = ""
    version: str | None = None
    counts: tuple[int | None, int | None, int | None] = (None, None, None)


def _read(reader: Reader, bundle: Bundle, expected: Expectation, processes: int) -> _Found:
    assert reader.run is not None
    trace_expected = expected.unlimited if reader.is_framework else expected.golden.trace
    differences, version = [], ""
    for _ in range(processes):
        trace, version = reader.run(bundle, expected.golden)
        differences.append(compare_traces(trace_expected, trace))
    may_deviate = reader.is_framework and any(p.is_leaky for p in bundle.network.populations)
    differs = Outcome.DEVIATES if may_deviate else Outcome.DIFFERS
    outcome = Outcome.EQUAL if all(difference.equal for difference in differences) else differs
    return _Found(outcome, "", version, _totals(differences))


def _read_float(bundle: Bundle, expected: Expectation) -> _Found:
    found, version = judge_float(bundle, bundle.float_golden[: len(expected.golden.codes)])
    outcome = Outcome.DEVIATES if found.flips else Outcome.EQUAL
    if found.unexplained_spikes or found.unexplained_logits:
        outcome = Outcome.DIFFERS
    return _Found(outcome, found.summary, version, (found.unexplained_spikes, None, found.unexplained_logits))


def _require_file(bundle: Bundle, file: str) -> None:
    """Refuse a file that a bundle lacks: with the rules the network breaks there, if it is for them."""
    if file in bundle:
        return
    if file == ONNX_FLOAT_FILE:
        raise Missing(f"the bundle has no {file}; export one that holds the float SNN again with --target all")
    with tempfile.TemporaryDirectory() as folder:
        MODEL_WRITERS[file](bundle.network, Path(folder) / file)
    raise Missing(f"the bundle has no {file}; export it again with --target all")


def _outcome(error: SpikeguardError) -> Outcome:
    if isinstance(error, RuleViolations):
        return Outcome.REFUSED
    return Outcome.MISSING if isinstance(error, Missing) else Outcome.FAILED


def _reason(error: SpikeguardError) -> str:
    """One line; of many broken rules the first, and how many more there are."""
    if not isinstance(error, RuleViolations):
        return str(error)
    first, *others = error.violations
    more = f"; {len(others)} more broken rule(s)" if others else ""
    return f"{error.subject}: {first.object}: {first.rule} (has {shorten(first.actual, REASON_WIDTH)}){more}"


def _totals(differences: list[TraceComparison]) -> tuple[int | None, int | None, int | None]:
    """Over all processes; a reader exposes the same quantities in each."""
    return (
        _total([difference.spikes for difference in differences]),
        _total([difference.membranes for difference in differences]),
        _total([difference.readouts for difference in differences]),
    )


def _total(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def framework(reader: NirReader, file: str) -> Reader:
    """A framework, on one of the NIR files."""

    def run(bundle: Bundle, golden: Golden) -> tuple[Trace, str]:
        return reader.run(bundle.file(file), bundle.network, golden.codes), reader.version

    return Reader(file, reader.name, run, is_framework=True)


def _runtime(name: str, file: str) -> Reader:
    def run(bundle: Bundle, golden: Golden) -> tuple[Trace, str]:
        runtime = open_runtime(name, bundle)
        return runtime.run(golden.codes, "traces"), runtime.version

    return Reader(file, name, run)


def _own(file: str, name: str) -> Reader:
    """As ``spikeguard verify`` reads the file."""
    (run,) = (run for known, _, run in OWN_READERS if known == file)
    return Reader(file, name, run)


READERS: tuple[Reader, ...] = (
    _own(NIR_FILE, OWN_INTERPRETER),
    framework(NORSE, NIR_FILE),
    framework(SPIKINGJELLY, NIR_FILE),
    _runtime("lava", NIR_FILE),
    _own(NIR_CUBA_FILE, OWN_INTERPRETER),
    framework(NORSE, NIR_CUBA_FILE),
    framework(SPIKINGJELLY, NIR_CUBA_FILE),
    framework(SNNTORCH, NIR_CUBA_FILE),
    _runtime("netx", NETX_FILE),
    _own(ONNX_FILE, "onnxruntime"),
    _own(ONNX_STEP_FILE, "onnxruntime"),
    _own(ONNX_INT8_FILE, "onnxruntime"),
    Reader(ONNX_FLOAT_FILE, "onnxruntime", None),
)


def conformance_rows(
    bundle: Bundle, samples: int | None = None, processes: int = 5, readers: Sequence[Reader] = READERS
) -> Iterator[ConformanceRow]:
    """Run a bundle's golden inputs through every reader of every file.

    Args:
        bundle: what is read.
        samples: how many of the golden inputs, the first; all if not given.
        processes: fresh ones for each framework.
        readers: which.

    Yields:
        One row per reader. What goes wrong in a reader is its row's reason.

    Raises:
        SpikeguardError: if the integer network or the golden inputs cannot be read.
    """
    codes = bundle.golden.codes[:samples]
    expected = _expect(bundle.network, codes)
    for reader in readers:
        yield _row(reader, bundle, expected, processes if reader.is_framework else 1)
