"""Errors that exporters make: a deployed network that differs from the one that was meant in one population."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.network import DECAY_UNITY, INPUT, IntegerNetwork, Synapse

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
    """Folded kernels divided by the pooled area, as if the threshold still were of averages instead of sums."""
    return with_weights(network, name, lambda s, w: (w // s.stride**2 >> s.exponent) << s.exponent)


def lost_skip(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """Of the synapses into a population, only the one from the latest source."""
    order = list(network.by_name)
    kept = max(network.incoming(name), key=lambda s: order.index(s.source) if s.source in order else -1)
    return replace(network, synapses=tuple(s for s in network.synapses if s.target != name or s is kept))


def dropped_bias(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """No bias."""
    return with_population(network, name, bias=np.zeros_like(network.by_name[name].bias))


def bias_of_first_neuron(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """The bias of one neuron for all of its channel: border-dependent constants lost."""
    bias = network.by_name[name].bias
    corner = bias[(slice(None), *(slice(1) for _ in bias.shape[1:]))]
    return with_population(network, name, bias=np.ascontiguousarray(np.broadcast_to(corner, bias.shape)))


def wrapped_bias(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """Kept in 8 bits that wrap."""
    bias = network.by_name[name].bias
    return with_population(network, name, bias=(bias + 128) % 256 - 128)


def skipped_normalization(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """The constant channels, which carry what normalisation adds to the pixels, not read."""
    channels = network.input.shape[0]

    def skip(synapse: Synapse, weight: NDArray[np.int32]) -> NDArray[np.int32]:
        if synapse.source != INPUT:
            return weight
        by_channel = weight.reshape(len(weight), network.source_shape(synapse)[0], -1).copy()
        by_channel[:, channels:] = 0
        return by_channel.reshape(weight.shape)

    return with_weights(network, name, skip)


def scale_of_a_neighbour(network: IntegerNetwork, name: str) -> IntegerNetwork:
    """Threshold and bias in the units of the population before it; of the first, of the one behind it."""
    names = list(network.by_name)
    other = names[names.index(name) - 1] if name != names[0] else names[1]
    own = network.by_name[name]
    factor = network.by_name[other].scale / own.scale
    bias = np.rint(own.bias * factor).astype(np.int64)
    return with_population(network, name, threshold=round(own.threshold * factor), bias=bias)


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
        wrapped_bias,
        skipped_normalization,
        scale_of_a_neighbour,
        raised_threshold,
        other_reset,
        no_decay,
        swapped_decays,
    )
}
