"""The emulator's compiled neurons: synaptic sums to spikes. Its synapses are in :mod:`hardware.synapse_kernels`.

Each kernel is compiled for two widths: a state of int32 where the bounds allow it, of int64 otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

from hardware.kernel_cache import take_shipped
from hardware.network import DECAY_UNITY, FRACTION_BITS, STATE_LIMIT

take_shipped()
Kernel = TypeVar("Kernel", bound=Callable[..., Any])
Array = NDArray[Any]

_FRACTION_MASK = DECAY_UNITY - 1
_DECAY_BITS = 12


def compiled(kernel: Kernel) -> Kernel:
    """Compile without the interpreter's lock; keep the machine code for later processes where possible."""
    try:
        result: Kernel = numba.njit(cache=True, nogil=True)(kernel)
    except RuntimeError:
        # No folder can be written (a container with a read-only root): compile anew in each process.
        result = numba.njit(nogil=True)(kernel)
    return result


@compiled
def integrate(
    held: Array,
    stepped: Array,
    bias: Array,
    threshold: int,
    resets_to_zero: bool,
    spikes: Array,
    membranes: Array,
) -> int:
    """All steps of IF neurons: sums to spikes.

    Args:
        held: ``(samples, neurons)`` weight units, present at every step.
        stepped: ``(samples, steps, neurons)`` weight units, or no steps.
        bias: ``(neurons,)`` state units, of the type that the state is computed in.
        threshold: state units.
        resets_to_zero: else the threshold is subtracted.
        spikes: bool ``(samples, steps, neurons)``, filled.
        membranes: int32 ``(samples, steps, neurons)`` after reset, filled; or no steps.

    Returns:
        How many membranes were clipped.
    """
    samples, steps, neurons = spikes.shape
    clipped = 0
    v = np.empty(neurons, bias.dtype)
    drive = np.empty(neurons, bias.dtype)
    for sample in range(samples):
        v[:] = 0
        for neuron in range(neurons):
            drive[neuron] = (held[sample, neuron] << FRACTION_BITS) + bias[neuron]
        for step in range(steps):
            if stepped.shape[1]:
                for neuron in range(neurons):
                    v[neuron] += drive[neuron] + (stepped[sample, step, neuron] << FRACTION_BITS)
            else:
                for neuron in range(neurons):
                    v[neuron] += drive[neuron]
            clipped += _fire(v, threshold, resets_to_zero, spikes[sample, step])
            if membranes.shape[1]:
                for neuron in range(neurons):
                    membranes[sample, step, neuron] = v[neuron]
    return clipped


@compiled
def integrate_leaky(
    held: Array,
    stepped: Array,
    bias: Array,
    threshold: int,
    resets_to_zero: bool,
    spikes: Array,
    membranes: Array,
    current_share: int,
    voltage_share: int,
) -> int:
    """As :func:`integrate`, in int64, with the shares of 4096 that current and membrane keep per step."""
    samples, steps, neurons = spikes.shape
    clipped = 0
    u = np.empty(neurons, np.int64)
    v = np.empty(neurons, np.int64)
    for sample in range(samples):
        u[:] = 0
        v[:] = 0
        for step in range(steps):
            for neuron in range(neurons):
                total = held[sample, neuron]
                if stepped.shape[1]:
                    total += stepped[sample, step, neuron]
                current = _truncated(u[neuron] * current_share) + (total << FRACTION_BITS)
                u[neuron] = current
                v[neuron] = _truncated(v[neuron] * voltage_share) + current + bias[neuron]
            clipped += _fire(v, threshold, resets_to_zero, spikes[sample, step])
            if membranes.shape[1]:
                for neuron in range(neurons):
                    membranes[sample, step, neuron] = v[neuron]
    return clipped


@compiled
def _truncated(product: int) -> int:
    """Product over 4096 towards zero: an arithmetic shift rounds down, so negative products go up first."""
    return (product + ((product >> 63) & _FRACTION_MASK)) >> _DECAY_BITS


@compiled
def _fire(v: Array, threshold: int, resets_to_zero: bool, spikes: Array) -> int:
    """Clip, compare and reset in place; how many were clipped."""
    clipped = 0
    for neuron in range(len(v)):
        membrane = v[neuron]
        saturated = min(max(membrane, -STATE_LIMIT), STATE_LIMIT)
        clipped += membrane != saturated
        fires = saturated > threshold
        spikes[neuron] = fires
        rest = 0 if resets_to_zero else saturated - threshold
        v[neuron] = rest if fires else saturated
    return clipped
