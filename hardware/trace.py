"""What a run left behind, and how two runs compare.

A :class:`Trace` holds what a runtime exposed. What it cannot expose is absent (``None``), never zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hardware.errors import SpikeguardError

Record = Literal["readouts", "traces"]


@dataclass(frozen=True)
class PopulationTrace:
    """Activity of one population, axes (sample, step, neuron), neurons in C order of its shape.

    Attributes:
        spikes: bool, or None where not exposed (and for a readout, which does not spike).
        membranes: int32 after reset, in state units (weight units times 64), or None where not exposed.
    """

    spikes: NDArray[np.bool_] | None
    membranes: NDArray[np.int32] | None


@dataclass(frozen=True)
class Trace:
    """Result of running samples through a runtime.

    Attributes:
        readouts: int64 ``(samples, classes)``, the integer sum over steps in weight units.
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
        return Trace(
            self.readouts[samples],
            {
                name: PopulationTrace(
                    None if p.spikes is None else p.spikes[samples],
                    None if p.membranes is None else p.membranes[samples],
                )
                for name, p in self.populations.items()
            },
        )


def concatenate(traces: list[Trace]) -> Trace:
    """Join traces of one network along the samples."""

    def join(parts: list[NDArray[Any] | None]) -> NDArray[Any] | None:
        present = [part for part in parts if part is not None]
        return np.concatenate(present) if len(present) == len(parts) else None

    return Trace(
        np.concatenate([trace.readouts for trace in traces]),
        {
            name: PopulationTrace(
                join([trace.populations[name].spikes for trace in traces]),
                join([trace.populations[name].membranes for trace in traces]),
            )
            for name in traces[0].populations
        },
    )


def pack_trace(trace: Trace) -> dict[str, NDArray[Any]]:
    """A trace as plain arrays for an .npz file; spikes are bit-packed along the neurons."""
    arrays: dict[str, NDArray[Any]] = {"readouts": trace.readouts}
    for name, population in trace.populations.items():
        if population.spikes is not None:
            arrays[f"spikes.{name}"] = np.packbits(population.spikes, axis=-1)
            arrays[f"neurons.{name}"] = np.array(population.spikes.shape[-1], np.int64)
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
                neurons = int(arrays[f"neurons.{name}"])
                spikes = np.unpackbits(arrays[f"spikes.{name}"], axis=-1, count=neurons).astype(bool)
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
        for kind in ("spikes", "membranes"):
            a, b = getattr(left, kind), getattr(right, kind)
            if a is None or b is None:
                continue
            if a.shape != b.shape:
                raise SpikeguardError(f"population {name}: {kind} have shape {b.shape}, expected {a.shape}")
            differing = a != b
            counts[kind] = (counts[kind] or 0) + int(differing.sum())
            if differing.any():
                sample, step, neuron = (int(i) for i in np.argwhere(differing)[0])
                candidate = (sample, step, order, name, neuron)
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
