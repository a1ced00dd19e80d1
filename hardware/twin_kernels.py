"""Compiled neurons of the differentiable twin: all steps of a block of neurons while the block lies in the first cache.

Sums, spikes and gradients are ``(steps, samples, neurons)``, neurons in the order of memory. Nothing is kept from the
forward pass: the backward kernels integrate the sums again, which costs less than writing membranes and reading them
back. States have a type that is proven to hold them; sums and gradients may have a narrower one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hardware.kernels import compiled
from hardware.surrogate_kernels import adapt, differentiate

Array = NDArray[Any]

# Membranes and slopes of 8 steps then take 32 KiB; smaller blocks spend more on calls (measured).
BLOCK = 512


class Sums(NamedTuple):
    """What enters the neurons of a population, in state units.

    Attributes:
        held: ``(samples, neurons)`` at every step; no samples if nothing is.
        stepped: ``(steps, samples, neurons)``; no steps if nothing changes.
        constant: ``(neurons,)`` into the current, in the type of the states.
        bias: ``(neurons,)`` into the membrane, in the type of the states.
    """

    held: Array
    stepped: Array
    constant: Array
    bias: Array


class Dynamics(NamedTuple):
    """Constants of a population; scalars have the type of the states.

    Attributes:
        threshold: state units.
        limit: that membranes are clipped to on either side.
        resets_to_zero: else the threshold is subtracted.
        leaks: whether a state decays or a current is carried over.
        current_kept, voltage_kept: share of 1 that a step keeps.
    """

    threshold: Any
    limit: Any
    resets_to_zero: bool
    leaks: bool
    current_kept: Any
    voltage_kept: Any


class Gradients(NamedTuple):
    """Where gradients come from and go to, and the constants of the way, of one type.

    Attributes:
        spikes: ``(steps or 1, samples, neurons)`` given; a single step if it is the same at all.
        held, stepped: as :class:`Sums`, filled; empty where not wanted.
        unit: real units per state unit.
        middle: z is ``(membrane - middle) unit``.
    """

    spikes: Array
    held: Array
    stepped: Array
    unit: Any
    middle: Any


class Room(NamedTuple):
    """Working memory of one block of neurons, in the type of the states.

    Attributes:
        membranes: ``(steps, BLOCK)`` before the reset.
        steady: ``(BLOCK,)`` what enters at every step.
        current: ``(BLOCK,)`` its current.
        rest: ``(BLOCK,)`` zeros, the membranes before the first step.
        nothing: ``(BLOCK,)`` zeros, the sums of a step at which none change; of their type.
    """

    membranes: Array
    steady: Array
    current: Array
    rest: Array
    nothing: Array


@compiled
def fire(sums: Sums, dynamics: Dynamics, spikes: Array) -> None:
    """Fill 0/1 ``spikes``."""
    steps, samples, neurons = spikes.shape
    zero, one = spikes.dtype.type(0), spikes.dtype.type(1)
    room = _room(sums, steps)
    for sample in range(samples):
        for first in range(0, neurons, BLOCK):
            size = min(BLOCK, neurons - first)
            _integrate(sums, dynamics, sample, first, size, room)
            for step in range(steps):
                u, s = room.membranes[step, :size], spikes[step, sample, first : first + size]
                for i in range(size):
                    s[i] = one if u[i] > dynamics.threshold else zero


@compiled
def integrate(sums: Sums, dynamics: Dynamics, membranes: Array) -> None:
    """Fill ``membranes`` ``(steps, samples, neurons)``, before the reset."""
    steps, samples, neurons = membranes.shape
    room = _room(sums, steps)
    for sample in range(samples):
        for first in range(0, neurons, BLOCK):
            size = min(BLOCK, neurons - first)
            _integrate(sums, dynamics, sample, first, size, room)
            for step in range(steps):
                membranes[step, sample, first : first + size] = room.membranes[step, :size]


@compiled
def backpropagate(
    sums: Sums, dynamics: Dynamics, gradients: Gradients, steps: int, rule: int, width: float, height: float
) -> None:
    """Fill the gradients through the surrogate that ``rule``, one of ``RULE_IDS``, names."""
    _, samples, neurons = gradients.spikes.shape
    room = _room(sums, steps)
    z, slopes, flow = _gradient_room(gradients, steps)
    for sample in range(samples):
        for first in range(0, neurons, BLOCK):
            size = min(BLOCK, neurons - first)
            _integrate(sums, dynamics, sample, first, size, room)
            for step in range(steps):
                _distance(room.membranes[step, :size], gradients, z[:size])
                differentiate(z[:size], rule, width, height, slopes[step, :size])
            _descend(room.membranes, slopes, dynamics, gradients, sample, first, size, flow)


@compiled
def backpropagate_adaptively(
    sums: Sums,
    dynamics: Dynamics,
    gradients: Gradients,
    half_width: float,
    mean: Array,
    deviation: Array,
    first_sample: int,
) -> None:
    """Fill the gradients through ASSG (:func:`hardware.surrogate_kernels.adapt`).

    Args:
        half_width: as there.
        mean, deviation: as there, ``(steps, all samples, neurons)``.
        first_sample: where among all samples the given ones begin.
    """
    steps = len(mean)
    _, samples, neurons = gradients.spikes.shape
    room = _room(sums, steps)
    z, slopes, flow = _gradient_room(gradients, steps)
    for sample in range(samples):
        for first in range(0, neurons, BLOCK):
            size = min(BLOCK, neurons - first)
            _integrate(sums, dynamics, sample, first, size, room)
            for step in range(steps):
                _distance(room.membranes[step, :size], gradients, z[:size])
                m = mean[step, first_sample + sample, first : first + size]
                d = deviation[step, first_sample + sample, first : first + size]
                adapt(z[:size], half_width, m, d, slopes[step, :size])
            _descend(room.membranes, slopes, dynamics, gradients, sample, first, size, flow)


@compiled
def backpropagate_slopes(sums: Sums, dynamics: Dynamics, gradients: Gradients, slopes: Array) -> None:
    """Fill the gradients through given ``slopes``, ds/dz ``(steps, samples, neurons)``."""
    steps, samples, neurons = slopes.shape
    room = _room(sums, steps)
    _, block, flow = _gradient_room(gradients, steps)
    for sample in range(samples):
        for first in range(0, neurons, BLOCK):
            size = min(BLOCK, neurons - first)
            _integrate(sums, dynamics, sample, first, size, room)
            for step in range(steps):
                block[step, :size] = slopes[step, sample, first : first + size]
            _descend(room.membranes, block, dynamics, gradients, sample, first, size, flow)


@compiled
def backpropagate_rate(sums: Sums, dynamics: Dynamics, gradients: Gradients, steps: int) -> None:
    """Fill the gradients without recursion through time: neurons that never spike pass nothing."""
    given, samples, neurons = gradients.spikes.shape
    room = _room(sums, steps)
    _, _, flow = _gradient_room(gradients, steps)
    share, total = flow[0], flow[1]
    for sample in range(samples):
        for first in range(0, neurons, BLOCK):
            size = min(BLOCK, neurons - first)
            _integrate(sums, dynamics, sample, first, size, room)
            share[:size] = 0
            for step in range(steps):
                for i in range(size):
                    share[i] = gradients.unit if room.membranes[step, i] > dynamics.threshold else share[i]
            total[:size] = 0
            for step in range(steps):
                incoming = gradients.spikes[min(step, given - 1), sample, first : first + size]
                for i in range(size):
                    total[i] += share[i] * incoming[i]
                if len(gradients.stepped):
                    outgoing = gradients.stepped[step, sample, first : first + size]
                    for i in range(size):
                        outgoing[i] = share[i] * incoming[i]
            if len(gradients.held):
                gradients.held[sample, first : first + size] = total[:size]


@compiled
def _room(sums: Sums, steps: int) -> Room:
    real = sums.bias.dtype
    rows = np.zeros((3, BLOCK), real)
    return Room(np.empty((steps, BLOCK), real), rows[0], rows[1], rows[2], np.zeros(BLOCK, sums.stepped.dtype))


@compiled
def _gradient_room(gradients: Gradients, steps: int) -> tuple[Array, Array, Array]:
    """z and slopes ``(steps, BLOCK)`` of a block; and gradients at its membranes, its currents, their sum."""
    real = gradients.spikes.dtype
    return np.empty(BLOCK, real), np.empty((steps, BLOCK), real), np.empty((3, BLOCK), real)


@compiled
def _integrate(sums: Sums, dynamics: Dynamics, sample: int, first: int, size: int, room: Room) -> None:
    """Fill the room's membranes of the neurons from ``first`` on."""
    steady, current, before = room.steady[:size], room.current[:size], room.rest[:size]
    constant, bias = sums.constant[first : first + size], sums.bias[first : first + size]
    for i in range(size):
        steady[i] = constant[i] if dynamics.leaks else constant[i] + bias[i]
    if len(sums.held):
        held = sums.held[sample, first : first + size]
        for i in range(size):
            steady[i] += held[i]
    current[:] = 0
    for step in range(len(room.membranes)):
        u = room.membranes[step, :size]
        x = sums.stepped[step, sample, first : first + size] if len(sums.stepped) else room.nothing[:size]
        # Sums first, then the state: float32 holds sums of both signs that it would not hold one after the other.
        if dynamics.leaks:
            for i in range(size):
                current[i] = np.trunc(current[i] * dynamics.current_kept) + (steady[i] + x[i])
                kept = np.trunc(_after_reset(before[i], dynamics) * dynamics.voltage_kept)
                u[i] = _clipped(kept + (current[i] + bias[i]), dynamics)
        else:
            for i in range(size):
                u[i] = _clipped(_after_reset(before[i], dynamics) + (steady[i] + x[i]), dynamics)
        before = u


@compiled
def _after_reset(membrane: Any, dynamics: Dynamics) -> Any:
    zero = membrane - membrane
    rest = zero if dynamics.resets_to_zero else membrane - dynamics.threshold
    return rest if membrane > dynamics.threshold else membrane


@compiled
def _clipped(membrane: Any, dynamics: Dynamics) -> Any:
    return min(max(membrane, -dynamics.limit), dynamics.limit)


@compiled
def _distance(membranes: Array, gradients: Gradients, z: Array) -> None:
    """Fill z of one step."""
    for i in range(len(z)):
        z[i] = (membranes[i] - gradients.middle) * gradients.unit


@compiled
def _descend(
    membranes: Array,
    slopes: Array,
    dynamics: Dynamics,
    gradients: Gradients,
    sample: int,
    first: int,
    size: int,
    flow: Array,
) -> None:
    """From the last step to the first: the gradients at the sums, added up where they are held."""
    real = gradients.spikes.dtype.type
    zero, one = real(0), real(1)
    given = len(gradients.spikes)
    at_membrane, at_current, total = flow[0, :size], flow[1, :size], flow[2, :size]
    at_membrane[:] = zero
    at_current[:] = zero
    total[:] = zero
    voltage_kept, current_kept = real(dynamics.voltage_kept), real(dynamics.current_kept)
    threshold = real(dynamics.threshold)
    for step in range(len(slopes) - 1, -1, -1):
        u, slope = membranes[step, :size], slopes[step, :size]
        incoming = gradients.spikes[min(step, given - 1), sample, first : first + size]
        for i in range(size):
            before = real(u[i])
            fires = u[i] > dynamics.threshold
            silent = zero if fires and dynamics.resets_to_zero else one
            taken = before if dynamics.resets_to_zero else threshold
            kept = silent - taken * gradients.unit * slope[i]
            at_membrane[i] = incoming[i] * slope[i] + at_membrane[i] * (voltage_kept * kept)
        for i in range(size):
            at_current[i] = at_membrane[i] + current_kept * at_current[i]
            total[i] += at_current[i]
        if len(gradients.stepped):
            outgoing = gradients.stepped[step, sample, first : first + size]
            for i in range(size):
                outgoing[i] = at_current[i] * gradients.unit
    if len(gradients.held):
        held = gradients.held[sample, first : first + size]
        for i in range(size):
            held[i] = total[i] * gradients.unit
