"""Errors that runtimes make: the right network computed wrongly, in one population."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from hardware.network import (
    DECAY_UNITY,
    FRACTION_BITS,
    INPUT,
    SEMANTICS_VERSION,
    STATE_LIMIT,
    IntArray,
    IntegerNetwork,
    Population,
    Synapse,
)
from hardware.reference import Int64Array, decay, propagate
from hardware.trace import PopulationTrace, Record, Trace

Activity = tuple[NDArray[np.bool_], Int64Array]
"""Spikes and membranes after reset, ``(samples, steps, *shape)``."""
Propagate = Callable[[Synapse, Int64Array], Int64Array]
Integrate = Callable[[Population, Int64Array], Activity]


def saturated(membranes: Int64Array) -> Int64Array:
    """Clipped to 24 bits."""
    return np.clip(membranes, -STATE_LIMIT, STATE_LIMIT)


def integrate(
    population: Population,
    sums: Int64Array,
    *,
    fires: Callable[[Int64Array, int], NDArray[np.bool_]] = np.greater,
    held: Callable[[Int64Array], Int64Array] = saturated,
    biases: Mapping[int, int] | None = None,
    left: Callable[[Int64Array, int], Int64Array] = decay,
) -> Activity:
    """All steps of a population, as the reference defines them where no argument says otherwise.

    Args:
        population: the neurons.
        sums: ``(samples, steps, *shape)`` in weight units.
        fires: compares membranes with the threshold.
        held: what the memory keeps of a membrane.
        biases: how many biases some steps get; every other step gets one.
        left: of a state after a step.
    """
    spikes, membranes = np.zeros(sums.shape, np.bool_), np.zeros(sums.shape, np.int64)
    u = v = np.zeros_like(sums[:, 0])
    threshold = population.threshold << FRACTION_BITS
    for step in range(sums.shape[1]):
        bias = (biases or {}).get(step, 1) * population.bias
        u = left(u, population.current_decay) + (sums[:, step] << FRACTION_BITS)
        v = held(left(v, population.voltage_decay) + u + (bias << FRACTION_BITS))
        if population.spiking:
            spikes[:, step] = fires(v, threshold)
            v = np.where(spikes[:, step], 0 if population.reset == "zero" else v - threshold, v)
        membranes[:, step] = v
    return spikes, membranes


def one_step_late(population: Population, sums: Int64Array) -> Activity:
    """Sums arrive one step after they were sent."""
    return integrate(population, np.concatenate([np.zeros_like(sums[:, :1]), sums[:, :-1]], axis=1))


def one_step_early(population: Population, sums: Int64Array) -> Activity:
    """The first step is missed, and the last one seen twice."""
    return integrate(population, np.concatenate([sums[:, 1:], sums[:, -1:]], axis=1))


def states_kept_between_samples(population: Population, sums: Int64Array) -> Activity:
    """Each sample begins with the current and the membrane that the one before it left."""
    spikes, membranes = integrate(population, sums.reshape(1, -1, *population.shape))
    return spikes.reshape(sums.shape), membranes.reshape(sums.shape)


def wrapped_sums(population: Population, sums: Int64Array) -> Activity:
    """Currents of 24 bits that wrap."""
    half = 1 << (23 - FRACTION_BITS)
    return integrate(population, (sums + half) % (2 * half) - half)


def wrapped(membranes: Int64Array) -> Int64Array:
    """What 24 bits keep of a membrane that is not clipped."""
    return (membranes + 2**23) % 2**24 - 2**23


def decayed_downwards(state: Int64Array, share: int) -> Int64Array:
    """Rounded down instead of towards zero, as a shift does."""
    shifted: Int64Array = (state * (DECAY_UNITY - share)) >> 12
    return shifted


INTEGRATION_ERRORS: dict[str, Integrate] = {
    "one_step_late": one_step_late,
    "one_step_early": one_step_early,
    "bias_one_step_late": partial(integrate, biases={0: 0}),
    "bias_one_step_early": partial(integrate, biases={0: 2}),
    "fires_at_the_threshold": partial(integrate, fires=np.greater_equal),
    "membranes_never_saturate": partial(integrate, held=np.positive),
    "membranes_wrap": partial(integrate, held=wrapped),
    "sums_wrap": wrapped_sums,
    "states_kept_between_samples": states_kept_between_samples,
    "decays_rounded_down": partial(integrate, left=decayed_downwards),
}


def padded_with_ones(synapse: Synapse, activity: Int64Array) -> Int64Array:
    """A border of ones around what a convolution reads."""
    pad = synapse.padding
    around = ((0, 0), (0, 0), (pad, pad), (pad, pad))
    if synapse.kind == "dense":
        return propagate(synapse, activity)
    return propagate(replace(synapse, padding=0), np.pad(activity, around, constant_values=1))


def padded_behind(synapse: Synapse, activity: Int64Array) -> Int64Array:
    """All of the padding behind the last row and column, as an odd total of it is split elsewhere."""
    pad = synapse.padding
    if synapse.kind == "dense":
        return propagate(synapse, activity)
    return propagate(replace(synapse, padding=0), np.pad(activity, ((0, 0), (0, 0), (0, 2 * pad), (0, 2 * pad))))


def strides_from_the_second_pixel(synapse: Synapse, activity: Int64Array) -> Int64Array:
    """The subsampling of a strided convolution off by one."""
    if synapse.stride == 1:
        return propagate(synapse, activity)
    shifted = np.concatenate([activity[:, :, 1:, 1:], np.zeros_like(activity[:, :, :1, 1:])], axis=2)
    return propagate(synapse, np.concatenate([shifted, np.zeros_like(shifted[..., :1])], axis=3))


PROPAGATION_ERRORS: dict[str, Propagate] = {
    "padded_with_ones": padded_with_ones,
    "padded_behind": padded_behind,
    "strides_from_the_second_pixel": strides_from_the_second_pixel,
}


def run_wrongly(
    network: IntegerNetwork,
    codes: IntArray,
    damaged: str,
    *,
    wrong_propagation: Propagate = propagate,
    wrong_integration: Integrate = integrate,
) -> Trace:
    """Run a network as the reference does, except for one population.

    Args:
        network: what to run.
        codes: ``(samples, [steps,] *shape)``.
        damaged: the population that is computed wrongly.
        wrong_propagation, wrong_integration: how; by default rightly.
    """
    presented, steps = network.input.present(codes, network.steps), network.steps
    if codes.ndim == len(network.input.shape) + 1:
        presented = np.repeat(presented[:, None], steps, axis=1)
    activity, traces = {INPUT: presented}, {}
    for population in network.populations:
        name, wrong = population.name, population.name == damaged
        weigh = wrong_propagation if wrong else propagate
        sums = np.zeros((len(codes), steps, *population.shape), np.int64)
        for synapse in network.incoming(name):
            source = activity[synapse.source]
            sums += weigh(synapse, source.reshape(-1, *source.shape[2:])).reshape(sums.shape)
        spikes, membranes = (wrong_integration if wrong else integrate)(population, sums)
        activity[name] = spikes.astype(np.int64)
        traces[name] = PopulationTrace(
            spikes.reshape(*spikes.shape[:2], -1) if population.spiking else None,
            membranes.reshape(*membranes.shape[:2], -1).astype(np.int32),
        )
    if population.is_leaky:
        return Trace(membranes[:, -1].reshape(len(codes), -1), traces)
    readouts = (sums + population.bias).reshape(len(codes), steps, -1).sum(axis=1)
    return Trace(readouts, traces)


@dataclass
class PlantedRuntime:
    """A runtime that runs a network as the reference does, except for one population; arguments as `run_wrongly`."""

    network: IntegerNetwork
    damaged: str
    wrong_propagation: Propagate = propagate
    wrong_integration: Integrate = integrate
    name: str = "planted"
    version: str = SEMANTICS_VERSION

    def run(self, inputs: IntArray, record: Record = "readouts") -> Trace:
        """Run ``(samples, *shape)`` or ``(samples, steps, *shape)`` codes; everything is exposed."""
        trace = run_wrongly(
            self.network,
            inputs,
            self.damaged,
            wrong_propagation=self.wrong_propagation,
            wrong_integration=self.wrong_integration,
        )
        return trace if record == "traces" else Trace(trace.readouts)
