"""What a run left behind, and how two runs compare.

A :class:`Trace` holds what a runtime exposed. What it cannot expose is absent (``None``), never zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hardware.errors import SpikeguardError

Record = Literal["readouts", "traces"]


@dataclass(frozen=True, init=False, eq=False)
class PopulationTrace:
    """Activity of one population, axes (sample, step, neuron), neurons in C order of its shape.

    Args:
        spikes: bool, or None where not exposed (and for a readout, which does not spike).
        membranes: int32 after reset, in state units (weight units times 64), or None where not exposed.

    Attributes:
        spike_bits: the spikes, eight neurons to a byte, the first in the highest bit; or None.
        neurons: how many of the bits in a row are neurons; 0 without spikes.
        membranes: as given.
    """

    spike_bits: NDArray[np.uint8] | None
    neurons: int
    membranes: NDArray[np.int32] | None

    def __init__(self, spikes: NDArray[np.bool_] | None, membranes: NDArray[np.int32] | None) -> None:
        bits = None if spikes is None else np.packbits(spikes, axis=-1)
        self._set(bits, 0 if spikes is None else spikes.shape[-1], membranes)

    @property
    def spikes(self) -> NDArray[np.bool_] | None:
        """The spikes, unpacked anew and not to be written to; or None."""
        if self.spike_bits is None:
            return None
        spikes = np.unpackbits(self.spike_bits, axis=-1, count=self.neurons).view(np.bool_)
        spikes.flags.writeable = False
        return spikes

    def __getitem__(self, samples: slice) -> PopulationTrace:
        """The activity in some of the samples."""
        bits, membranes = self.spike_bits, self.membranes
        return self._like(None if bits is None else bits[samples], None if membranes is None else membranes[samples])

    def joined(self, others: Sequence[PopulationTrace]) -> PopulationTrace:
        """This activity followed by that in further samples; what is not exposed in all of them is absent."""
        everything = (self, *others)
        return self._like(_joined([p.spike_bits for p in everything]), _joined([p.membranes for p in everything]))

    def _like(self, bits: NDArray[np.uint8] | None, membranes: NDArray[np.int32] | None) -> PopulationTrace:
        """Of the same neurons, with other activity."""
        other = object.__new__(PopulationTrace)
        other._set(bits, 0 if bits is None else self.neurons, membranes)
        return other

    def _set(self, bits: NDArray[np.uint8] | None, neurons: int, membranes: NDArray[np.int32] | None) -> None:
        object.__setattr__(self, "spike_bits", bits)
        object.__setattr__(self, "neurons", neurons)
        object.__setattr__(self, "membranes", membranes)


@dataclass(frozen=True)
class Trace:
    """Result of running samples through a runtime.

    Attributes:
        readouts: int64 ``(samples, classes)``, the integer sum over steps in weight units, or of a leaky readout the
            last membrane in state units.
        populations: activity by population name; empty if only readouts were recorded.
    """

    readouts: NDArray[np.int64]
    populations: Mapping[str, PopulationTrace] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.readouts)

    def __getitem__(self, samples: slice) -> Trace:
        """The trace of some of the samples."""
        return Trace(self.readouts[samples], {name: part[samples] for name, part in self.populations.items()})


def concatenate(traces: list[Trace]) -> Trace:
    """Join traces of one network along the samples."""
    first, *others = traces
    return Trace(
        np.concatenate([trace.readouts for trace in traces]),
        {name: part.joined([other.populations[name] for other in others]) for name, part in first.populations.items()},
    )


def _joined(parts: list[NDArray[Any] | None]) -> NDArray[Any] | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if len(present) == len(parts) else None


def pack_trace(trace: Trace) -> dict[str, NDArray[Any]]:
    """A trace as plain arrays for an .npz file; spikes are bit-packed along the neurons."""
    arrays: dict[str, NDArray[Any]] = {"readouts": trace.readouts}
    for name, population in trace.populations.items():
        if population.spike_bits is not None:
            arrays[f"spikes.{name}"] = population.spike_bits
            arrays[f"neurons.{name}"] = np.array(population.neurons, np.int64)
        if population.membranes is not None:
            arrays[f"membranes.{name}"] = population.membranes
    return arrays


def unpack_trace(arrays: Mapping[str, NDArray[Any]]) -> Trace:
    """The inverse of :func:`pack_trace`; keys that are not a trace's are left alone.

    Raises:
        SpikeguardError: if the arrays do not belong together.
    """
    try:
        readouts = arrays["readouts"]
        names = sorted({key.split(".", 1)[1] for key in arrays if key.startswith(("spikes.", "membranes."))})
        populations = {}
        for name in names:
            spikes = membranes = None
            if f"spikes.{name}" in arrays:
                bits, neurons = arrays[f"spikes.{name}"], int(arrays[f"neurons.{name}"])
                if bits.shape[-1:] != (-(-neurons // 8),):
                    raise ValueError(f"spikes of {name} have shape {bits.shape} for {neurons} neurons")
                spikes = np.unpackbits(bits, axis=-1, count=neurons).astype(bool)
            if f"membranes.{name}" in arrays:
                membranes = arrays[f"membranes.{name}"]
            for part in (spikes, membranes):
                if part is not None and (part.ndim != 3 or len(part) != len(readouts)):
                    raise ValueError(f"population {name} has shape {part.shape}")
            populations[name] = PopulationTrace(spikes, membranes)
        return Trace(readouts, populations)
    except (KeyError, ValueError, TypeError) as error:
        raise SpikeguardError(f"trace file is not well formed ({error}); export the bundle again") from error


@dataclass(frozen=True)
class TraceComparison:
    """Mismatching values between two traces; None where one of them does not expose the quantity.

    Attributes:
        spikes, membranes, readouts: numbers of values that differ.
        first: (population, sample, step, neuron) of the earliest differing spike or membrane, if any.
    """

    spikes: int | None
    membranes: int | None
    readouts: int
    first: tuple[str, int, int, int] | None

    @property
    def equal(self) -> bool:
        """Whether everything both traces expose is the same."""
        return not (self.spikes or self.membranes or self.readouts)


def compare_traces(expected: Trace, actual: Trace) -> TraceComparison:
    """Count every value that differs between two traces of the same samples.

    Raises:
        SpikeguardError: if the traces are not of the same samples and populations.
    """
    if expected.readouts.shape != actual.readouts.shape:
        raise SpikeguardError(
            f"traces of {actual.readouts.shape} and {expected.readouts.shape} readouts cannot be compared; "
            "run both on the same images"
        )
    counts: dict[str, int | None] = {"spikes": None, "membranes": None}
    earliest: tuple[int, int, int, str, int] | None = None
    for order, (name, left) in enumerate(expected.populations.items()):
        right = actual.populations.get(name)
        if right is None:
            continue
        for kind, differing in (("spikes", _differing_spikes), ("membranes", _differing_membranes)):
            found = differing(name, left, right)
            if found is None:
                continue
            count, at = found
            counts[kind] = (counts[kind] or 0) + count
            if at is not None:
                candidate = (at[0], at[1], order, name, at[2])
                earliest = candidate if earliest is None else min(earliest, candidate)
    first = None
    if earliest is not None:
        sample, step, _, name, neuron = earliest
        first = (name, sample, step, neuron)
    return TraceComparison(
        spikes=counts["spikes"],
        membranes=counts["membranes"],
        readouts=int((expected.readouts != actual.readouts).sum()),
        first=first,
    )


Differences = tuple[int, tuple[int, int, int] | None] | None
"""How many values differ, and (sample, step, neuron) of the first; None where one trace has no such values."""


def _differing_spikes(name: str, expected: PopulationTrace, actual: PopulationTrace) -> Differences:
    if expected.spike_bits is None or actual.spike_bits is None:
        return None
    left, right = ((*p.spike_bits.shape[:2], p.neurons) for p in (expected, actual) if p.spike_bits is not None)
    _require_same_shape(name, "spikes", left, right)
    differing = expected.spike_bits ^ actual.spike_bits
    count = int(np.bitwise_count(differing).sum(dtype=np.int64))
    if not count:
        return 0, None
    sample, step, byte = (int(i) for i in np.argwhere(differing)[0])
    return count, (sample, step, 8 * byte + int(np.unpackbits(differing[sample, step, byte]).argmax()))


def _differing_membranes(name: str, expected: PopulationTrace, actual: PopulationTrace) -> Differences:
    if expected.membranes is None or actual.membranes is None:
        return None
    _require_same_shape(name, "membranes", expected.membranes.shape, actual.membranes.shape)
    differing = np.argwhere(expected.membranes != actual.membranes)
    if not len(differing):
        return 0, None
    sample, step, neuron = (int(i) for i in differing[0])
    return len(differing), (sample, step, neuron)


def _require_same_shape(name: str, kind: str, expected: tuple[int, ...], actual: tuple[int, ...]) -> None:
    if expected != actual:
        raise SpikeguardError(f"population {name}: {kind} have shape {actual}, expected {expected}")
