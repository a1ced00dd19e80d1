"""Memory that the forked Lava processes note down in what they did, and that the worker reads afterwards.

Anonymous shared mappings are inherited by fork, have no name that could leak, and cost one copy per step.
Lava's own Monitor costs a process and a synchronisation phase each.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def shared_array(shape: tuple[int, ...], dtype: type) -> Array:
    """A zeroed array in memory shared with every process forked later."""
    count = int(np.prod(shape))
    block = mmap.mmap(-1, max(1, count * np.dtype(dtype).itemsize))
    return np.frombuffer(block, dtype, count).reshape(shape)


@dataclass
class SynapseRecord:
    """What a synapse process holds.

    Attributes:
        weight: when the first step was done, in the process' own layout.
        weight_exponent: the process multiplies its sums by two to this power.
    """

    weight: Array
    weight_exponent: Array


@dataclass
class NeuronRecord:
    """What a neuron process holds, and what it did.

    Attributes:
        bias, threshold: in state units (64 per weight unit).
        decays: current and voltage lost per step, in shares of 4096.
        spikes: bool (steps, *shape), or None where not asked for.
        membranes: int32 (steps, *shape) after reset, or None where not asked for.
    """

    bias: Array
    threshold: Array
    decays: Array
    spikes: Array | None
    membranes: Array | None


# A process carries the number of its record in its parameters.
SYNAPSES: list[SynapseRecord] = []
NEURONS: list[NeuronRecord] = []


def add_synapse(weight_shape: tuple[int, ...]) -> int:
    """Set up the record of the next synapse process, before Lava forks its processes; returns its number."""
    SYNAPSES.append(SynapseRecord(shared_array(weight_shape, np.int64), shared_array((1,), np.int64)))
    return len(SYNAPSES) - 1


def add_neuron(shape: tuple[int, ...], steps: int, recorded: bool) -> int:
    """Set up the record of the next neuron process, before Lava forks its processes; returns its number."""
    NEURONS.append(
        NeuronRecord(
            bias=shared_array(shape, np.int64),
            threshold=shared_array((1,), np.int64),
            decays=shared_array((2,), np.int64),
            spikes=shared_array((steps, *shape), np.bool_) if recorded else None,
            membranes=shared_array((steps, *shape), np.int32) if recorded else None,
        )
    )
    return len(NEURONS) - 1
