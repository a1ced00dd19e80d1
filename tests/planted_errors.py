"""Errors that exporters and runtimes make, each planted in one population of a network.

A wrong deployment is a network that differs from the one that was meant; a wrong runtime computes the right network
wrongly. Either goes wrong in the damaged population first, so a comparison has to name that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.network import (
    DECAY_UNITY,
    FRACTION_BITS,
    INPUT,
    STATE_LIMIT,
    IntArray,
    IntegerNetwork,
    Population,
    Synapse,
)
from hardware.reference import decay, propagate
from hardware.trace import PopulationTrace, Trace

Int64Array = NDArray[np.int64]
Activity = tuple[NDArray[np.bool_], Int64Array]
"""Spikes and membranes after reset, ``(samples, steps, *shape)``."""
Propagate = Callable[[Synapse, Int64Array], Int64Array]
Integrate = Callable[[Population, Int64Array], Activity]
WrongNetwork = Callable[[IntegerNetwork, str], IntegerNetwork]


def with_population(network: IntegerNetwork, name: str, **changes: Any) -> IntegerNetwork:
    """The same network with one population changed."""
    populations = (replace(p, **changes) if p.name == name else p for p in network.populations)
    return replace(network, populations=tuple(populations))


def with_weights(
    network: IntegerNetwork, name: str, change: Callable[[Synapse, NDArray[np.int32]], NDArray[np.int32]]
) -> IntegerNetwork:
    """The same network with other weights in every synapse that enters one population."""

    def changed(synapse: Synapse) -> Synapse:
        return replace(synapse, weight=np.ascontiguousarray(change(synapse, synapse.weight)))

    return replace(network, synapses=tuple(changed(s) if s.target == name else s for s in network.synapses))


def flipped_kernels(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """True convolution instead of cross-correlation."""
    return with_weights(network, name, lambda s, w: w[:, :, ::-1, ::-1] if s.kind == "conv" else w)


def transposed_kernels(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """Rows and columns of a kernel exchanged."""
    return with_weights(network, name, lambda s, w: w.swapaxes(2, 3) if s.kind == "conv" else w)


def swapped_source_channels(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """Channels read in the opposite order, as RGB for BGR; of a dense synapse, the channels of what it reads."""

    def swap(synapse: Synapse, weight: NDArray[np.int32]) -> NDArray[np.int32]:
        by_channel = weight.reshape(len(weight), network.source_shape(synapse)[0], -1)
        return by_channel[:, ::-1].reshape(weight.shape)

    return with_weights(network, name, swap)


def swapped_output_channels(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """Outputs written in the opposite order."""
    return with_weights(network, name, lambda _, w: w[::-1])


def channels_last_flattening(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """A dense synapse that reads a feature map as (height, width, channels)."""

    def reorder(synapse: Synapse, weight: NDArray[np.int32]) -> NDArray[np.int32]:
        shape = network.source_shape(synapse)
        if synapse.kind == "conv" or len(shape) == 1:
            return weight
        return np.moveaxis(weight.reshape(len(weight), *shape), 1, -1).reshape(weight.shape)

    return with_weights(network, name, reorder)


def even_weights(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """Signed weights of 8 bits have even mantissas on Loihi; odd ones cut off instead of refused."""
    return with_weights(network, name, lambda _, w: w & ~1)


def clipped_weights(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """The most negative weight, which a symmetric range lacks, clipped."""
    return with_weights(network, name, lambda s, w: np.maximum(w, (1 - 2 ** (s.bits - 1)) << s.exponent))


def average_pooling(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """Folded kernels divided by their area, as if the threshold still were of averages instead of sums."""
    return with_weights(network, name, lambda s, w: w // np.prod(w.shape[2:], dtype=np.int32) if s.stride > 1 else w)


def lost_skip(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """Only the first of the synapses into a population."""
    kept = network.incoming(name)[0]
    return replace(network, synapses=tuple(s for s in network.synapses if s.target != name or s is kept))


def dropped_bias(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """No bias."""
    return with_population(network, name, bias=np.zeros_like(network.by_name[name].bias))


def bias_of_first_neuron(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """The bias of one neuron for all of its channel: border-dependent constants lost."""
    bias = network.by_name[name].bias
    corner = bias[(slice(None), *(slice(1) for _ in bias.shape[1:]))]
    return with_population(network, name, bias=np.ascontiguousarray(np.broadcast_to(corner, bias.shape)))


def raised_threshold(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """The float model's "at least" exported without taking one off."""
    return with_population(network, name, threshold=network.by_name[name].threshold + 1)


def other_reset(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """Subtracted for zeroed or the reverse."""
    zero = network.by_name[name].reset == "zero"
    return with_population(network, name, reset="subtract" if zero else "zero")


def no_decay(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """Leaky neurons run as IF neurons."""
    return with_population(network, name, current_decay=DECAY_UNITY, voltage_decay=0)


def swapped_decays(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """Decay of the current taken for the membrane's, and the reverse."""
    population = network.by_name[name]
    return with_population(
        network, name, current_decay=population.voltage_decay, voltage_decay=population.current_decay
    )


NETWORK_ERRORS: dict[str, WrongNetwork] = {
    plant.__name__: plant
    for plant in (
        flipped_kernels,
        transposed_kernels,
        swapped_source_channels,
        swapped_output_channels,
        channels_last_flattening,
        even_weights,
        clipped_weights,
        average_pooling,
        lost_skip,
        dropped_bias,
        bias_of_first_neuron,
        raised_threshold,
        other_reset,
        no_decay,
        swapped_decays,
    )
}


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
    readouts = (sums + population.bias).reshape(len(codes), steps, -1).sum(axis=1)
    return Trace(readouts, traces)
