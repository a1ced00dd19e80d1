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
class LayerRecord:
    """What one layer (a synapse process and the neuron process behind it) shows of itself.

    Attributes:
        weight: held by the synapse process when the first step was done, in its own layout.
        weight_exponent: the synapse process multiplies its sums by two to this power.
        bias, threshold: held by the neuron process, in state units (64 per weight unit).
        decays: current and voltage lost per step, in shares of 4096.
        spikes: bool (steps, *shape), or None where not asked for.
        membranes: int32 (steps, *shape) after reset, or None where not asked for.
    """

    weight: Array
    weight_exponent: Array
    bias: Array
    threshold: Array
    decays: Array
    spikes: Array | None
    membranes: Array | None


LAYERS: list[LayerRecord] = []


def add_layer(weight_shape: tuple[int, ...], shape: tuple[int, ...], steps: int, recorded: bool) -> int:
    """Set up the record of the next layer, before Lava forks its processes.

    Returns:
        its number, which the layer's processes carry in their parameters.
    """
    LAYERS.append(
        LayerRecord(
            weight=shared_array(weight_shape, np.int64),
            weight_exponent=shared_array((1,), np.int64),
            bias=shared_array(shape, np.int64),
            threshold=shared_array((1,), np.int64),
            decays=shared_array((2,), np.int64),
            spikes=shared_array((steps, *shape), np.bool_) if recorded else None,
            membranes=shared_array((steps, *shape), np.int32) if recorded else None,
        )
    )
    return len(LAYERS) - 1
