"""Interval proofs: what the integers of a network can reach, per neuron, before anything runs.

Everything is exact in int64. Each synapse is bounded with its real border (padding contributes nothing),
input codes in [0, max_code], constant channels exactly their code, and spikes in {0, 1}. Decay is monotone,
so the interval recursion over the steps is sound with truncation too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardware.errors import RuleViolations, Violation
from hardware.network import (
    FRACTION_BITS,
    INPUT,
    STATE_LIMIT,
    InputSpec,
    IntegerNetwork,
    Population,
    Shape,
    Synapse,
)
from hardware.reference import decay

Int64Array = NDArray[np.int64]
WRAP_LIMIT = 2**17
"""Weight units a one-step sum must stay below, lest a 24-bit current with 6 fractional bits wraps."""
FLOAT32_INTEGERS = 2**24
"""Below this, float32 holds every integer."""


@dataclass(frozen=True)
class Bounds:
    """Smallest and largest value of each neuron, both included; int64 of the population's shape."""

    lower: Int64Array
    upper: Int64Array

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest value of any neuron."""
        return int(self.lower.min()), int(self.upper.max())


@dataclass(frozen=True)
class BoundRow:
    """What is proven of one population; sums in weight units, membranes in state units (64 per weight unit).

    Attributes:
        sum_range: of one step's synaptic sum.
        sum_limit: magnitude that sum must stay below.
        can_wrap: whether the current (with decay: accumulated over the steps) can leave 24 bits.
        membrane_range: after reset, over all steps.
        can_saturate: whether a membrane can be clipped before its reset.
        saturation_is_harmless: whether clipping can change neither a spike nor the readout.
        exact_in_float32: whether float32 arithmetic, in any order of summation, gives the same integers.
    """

    population: str
    sum_range: tuple[int, int]
    sum_limit: int
    can_wrap: bool
    membrane_range: tuple[int, int]
    can_saturate: bool
    saturation_is_harmless: bool
    exact_in_float32: bool


def prove(network: IntegerNetwork) -> list[BoundRow]:
    """All that is proven, one row per population, for printing and for decisions."""
    bounds, magnitudes = synaptic_bounds(network), synaptic_magnitudes(network)
    return [_prove(p, bounds[p.name], magnitudes[p.name], network.steps) for p in network.populations]


def _prove(population: Population, sums: Bounds, magnitudes: Int64Array, steps: int) -> BoundRow:
    return BoundRow(
        population=population.name,
        sum_range=sums.range,
        sum_limit=WRAP_LIMIT,
        can_wrap=_leaves_state(_hull(step.current for step in _walk(population, sums, steps))),
        membrane_range=_hull(step.after for step in _walk(population, sums, steps)).range,
        can_saturate=_can_saturate(population, sums, steps),
        saturation_is_harmless=_saturation_is_harmless(population, sums, steps),
        exact_in_float32=_is_exact_in_float32(population, magnitudes, steps),
    )


def synaptic_bounds(network: IntegerNetwork) -> dict[str, Bounds]:
    """Bounds of one step's synaptic sum (without bias), in weight units, by population."""
    bounds = {}
    for population in network.populations:
        zeros = np.zeros(population.shape, np.int64)
        parts = [synapse_bounds(s, network.source_shape(s), network.input) for s in network.incoming(population.name)]
        lower = sum((part.lower for part in parts), start=zeros)
        bounds[population.name] = Bounds(lower, sum((part.upper for part in parts), start=zeros))
    return bounds


def synapse_bounds(synapse: Synapse, source_shape: Shape, spec: InputSpec) -> Bounds:
    """Bounds of what one synapse adds to its target in one step, in weight units.

    Args:
        synapse: whose target need not exist.
        source_shape: of what it reads, constant input channels included.
        spec: of the network's input.
    """
    low, high = _activity_range(spec, source_shape, synapse.source)
    excitation, inhibition = np.maximum(synapse.weight, 0), np.minimum(synapse.weight, 0)
    return Bounds(
        _drive(synapse, excitation, low, source_shape) + _drive(synapse, inhibition, high, source_shape),
        _drive(synapse, excitation, high, source_shape) + _drive(synapse, inhibition, low, source_shape),
    )


def synaptic_magnitudes(network: IntegerNetwork) -> dict[str, Int64Array]:
    """Largest sum of ``|w| x`` per neuron, in weight units: bounds every partial sum, in any order."""
    return {
        population.name: sum(
            (synaptic_magnitude(s, network.source_shape(s), network.input) for s in network.incoming(population.name)),
            start=np.zeros(population.shape, np.int64),
        )
        for population in network.populations
    }


def synaptic_magnitude(synapse: Synapse, source_shape: Shape, spec: InputSpec) -> Int64Array:
    """The part of one synapse in :func:`synaptic_magnitudes`; arguments as of :func:`synapse_bounds`."""
    _, high = _activity_range(spec, source_shape, synapse.source)
    return _drive(synapse, np.abs(synapse.weight.astype(np.int64)), high, source_shape)


def current_bounds(network: IntegerNetwork) -> dict[str, Bounds]:
    """Bounds of the current u over all steps, in state units, by population."""
    sums = synaptic_bounds(network)
    return {p.name: _hull(s.current for s in _walk(p, sums[p.name], network.steps)) for p in network.populations}


def membrane_bounds(network: IntegerNetwork) -> dict[str, Bounds]:
    """Bounds of the membrane after reset over all steps, in state units, by population."""
    sums = synaptic_bounds(network)
    return {p.name: _hull(s.after for s in _walk(p, sums[p.name], network.steps)) for p in network.populations}


def readout_bounds(network: IntegerNetwork) -> Bounds:
    """Bounds of the answer: of the sum over all steps in weight units, or of a leaky readout's last membrane."""
    if network.readout.is_leaky:
        return membrane_bounds(network)[network.readout.name]
    per_step, bias = synaptic_bounds(network)[network.readout.name], network.readout.bias
    return Bounds(network.steps * (per_step.lower + bias), network.steps * (per_step.upper + bias))


def sums_cannot_wrap(network: IntegerNetwork) -> bool:
    """Proof that no current leaves 24 bits, whatever the input."""
    return not any(_leaves_state(bounds) for bounds in current_bounds(network).values())


def readout_cannot_saturate(network: IntegerNetwork) -> bool:
    """Proof that the readout's membrane is never clipped, so that it can be read instead of the sum."""
    sums = synaptic_bounds(network)[network.readout.name]
    return not _can_saturate(network.readout, sums, network.steps)


def saturation_is_harmless(network: IntegerNetwork) -> bool:
    """Proof that clipping membranes changes no spike and no readout: plain integers do as well."""
    sums = synaptic_bounds(network)
    return all(_saturation_is_harmless(p, sums[p.name], network.steps) for p in network.populations)


def exact_in_float32(network: IntegerNetwork) -> bool:
    """Proof that float32 arithmetic gives the same integers, in any order of summation."""
    magnitudes = synaptic_magnitudes(network)
    return all(_is_exact_in_float32(p, magnitudes[p.name], network.steps) for p in network.populations)


def require_no_wrap(network: IntegerNetwork) -> None:
    """Refuse a network whose synaptic sums could wrap on 24-bit hardware.

    Raises:
        RuleViolations: one row for every population that could.
    """
    sums = synaptic_bounds(network)
    problems = []
    for name, current in current_bounds(network).items():
        if _leaves_state(current):
            low, high = sums[name].range
            reached = max(-current.range[0], current.range[1])
            problems.append(
                Violation(
                    name,
                    "synaptic sum cannot wrap",
                    f"sums {low}..{high}, current up to {reached} state units",
                    f"current below {STATE_LIMIT + 1} (sums below {WRAP_LIMIT} per step)",
                    "requantise with a lower scale or fewer bits, or with less input range",
                )
            )
    if problems:
        raise RuleViolations("integer network", problems)


def _activity_range(spec: InputSpec, shape: Shape, source: str) -> tuple[Int64Array, Int64Array]:
    """Smallest and largest activity per channel of a source."""
    if source != INPUT:
        return np.zeros(shape[0], np.int64), np.ones(shape[0], np.int64)
    constant = np.array(spec.constant_codes, np.int64)
    free = np.full(spec.shape[0], spec.max_code, np.int64)
    return np.concatenate([0 * free, constant]), np.concatenate([free, constant])


def _drive(
    synapse: Synapse, weight: NDArray[np.signedinteger], activity: Int64Array, source_shape: Shape
) -> Int64Array:
    """Sums of ``weight`` over a source whose channels hold ``activity`` at every position."""
    if synapse.kind == "dense":
        positions = int(np.prod(source_shape[1:]))
        per_channel = weight.reshape(len(weight), len(activity), positions).sum(axis=2, dtype=np.int64)
        dense_sums: Int64Array = per_channel @ activity
        return dense_sums
    # All positions are alike, so the channels collapse and one plane of ones shows which taps meet padding.
    taps = np.einsum("ocij,c->oij", weight, activity, dtype=np.int64)
    plane = np.pad(np.ones(source_shape[1:], np.int64), synapse.padding)
    windows = np.lib.stride_tricks.sliding_window_view(plane, taps.shape[1:])
    windows = windows[:: synapse.stride, :: synapse.stride]
    sums: Int64Array = np.einsum("hwij,oij->ohw", windows, taps)
    return sums


@dataclass(frozen=True)
class _Step:
    """Intervals of one step: the current, the membrane before clipping, and after clipping and reset."""

    current: Bounds
    before: Bounds
    after: Bounds


def _walk(population: Population, sums: Bounds, steps: int) -> Iterator[_Step]:
    zeros = np.zeros(population.shape, np.int64)
    bias = population.bias << FRACTION_BITS
    current = after = Bounds(zeros, zeros)
    for _ in range(steps):
        current = Bounds(
            decay(current.lower, population.current_decay) + (sums.lower << FRACTION_BITS),
            decay(current.upper, population.current_decay) + (sums.upper << FRACTION_BITS),
        )
        before = Bounds(
            decay(after.lower, population.voltage_decay) + current.lower + bias,
            decay(after.upper, population.voltage_decay) + current.upper + bias,
        )
        clipped = Bounds(_saturate(before.lower), _saturate(before.upper))
        after = _after_reset(population, clipped) if population.spiking else clipped
        yield _Step(current, before, after)


def _after_reset(population: Population, before: Bounds) -> Bounds:
    """Hull of the membranes that stayed silent and of those that were reset."""
    threshold = population.threshold << FRACTION_BITS
    always, never = before.lower > threshold, before.upper <= threshold
    if population.reset == "zero":
        reset_lower = reset_upper = np.zeros_like(before.lower)
    else:
        reset_lower = np.maximum(before.lower, threshold + 1) - threshold
        reset_upper = before.upper - threshold
    silent_upper = np.minimum(before.upper, threshold)
    both_lower, both_upper = np.minimum(before.lower, reset_lower), np.maximum(silent_upper, reset_upper)
    return Bounds(
        np.where(always, reset_lower, np.where(never, before.lower, both_lower)),
        np.where(always, reset_upper, np.where(never, before.upper, both_upper)),
    )


def _hull(intervals: Iterator[Bounds]) -> Bounds:
    hull = next(intervals)
    for interval in intervals:
        hull = Bounds(np.minimum(hull.lower, interval.lower), np.maximum(hull.upper, interval.upper))
    return hull


def _saturate(state: Int64Array) -> Int64Array:
    return np.clip(state, -STATE_LIMIT, STATE_LIMIT)


def _leaves_state(bounds: Bounds) -> bool:
    low, high = bounds.range
    return low < -STATE_LIMIT or high > STATE_LIMIT


def _can_saturate(population: Population, sums: Bounds, steps: int) -> bool:
    return any(_leaves_state(step.before) for step in _walk(population, sums, steps))


def _saturation_is_harmless(population: Population, sums: Bounds, steps: int) -> bool:
    """Whether clipping changes neither a spike nor a readout sum.

    Upwards, a neuron that resets to zero forgets how far it overshot. Downwards, a clipped membrane only lies
    higher than the unclipped one would, so nothing changes if even from the clip, with the strongest input in
    all remaining steps, it stays silent. Later clips leave less time and need no look of their own. A readout's sum
    is kept apart from its membrane; a leaky readout's membrane is the answer.
    """
    if not population.spiking:
        return not (population.is_leaky and _can_saturate(population, sums, steps))
    threshold, bias = population.threshold << FRACTION_BITS, population.bias << FRACTION_BITS
    overshoot_is_forgotten = population.reset == "zero" and threshold < STATE_LIMIT
    clipped = np.zeros(population.shape, bool)
    highest = np.zeros(population.shape, np.int64)
    for step in _walk(population, sums, steps):
        if not overshoot_is_forgotten and (step.before.upper > STATE_LIMIT).any():
            return False
        highest = decay(highest, population.voltage_decay) + step.current.upper + bias
        if (clipped & (highest > threshold)).any():
            return False
        newly = ~clipped & (step.before.lower < -STATE_LIMIT)
        clipped |= newly
        highest = np.where(newly, -STATE_LIMIT, _saturate(highest))
    return True


def _is_exact_in_float32(population: Population, magnitudes: Int64Array, steps: int) -> bool:
    """Whether all intermediate values are integers that float32 holds, or are clipped all the same.

    Sums in weight units below 2**24 are exact in any order, and so are 64 times them. Added to a membrane of
    24 bits the result is exact below 2**24; beyond, rounding cannot bring it under the clip. A decay needs
    products of 35 bits.
    """
    if population.is_leaky:
        return False
    largest = int((magnitudes + np.abs(population.bias)).max())
    return largest * (1 if population.spiking else steps) < FLOAT32_INTEGERS
