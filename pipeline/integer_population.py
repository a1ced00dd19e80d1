"""One integer population on recorded activity: a network is searched layer by layer without running what lies before.

The sums and spikes are those of the emulator's own kernels, so they are what the whole network will do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware import kernels
from hardware.bounds import Bounds, synaptic_bounds
from hardware.emulator import BLOCK_BYTES, NARROW_LIMIT
from hardware.geometry import Edges, edges, positions_and_channels
from hardware.network import (
    DECAY_UNITY,
    FRACTION_BITS,
    INPUT,
    InputSpec,
    IntegerNetwork,
    Shape,
    Synapse,
)
from pipeline.constant_channels import input_spec
from pipeline.integer_recipe import RoundedPopulation

Array = NDArray[Any]


@dataclass(frozen=True)
class Response:
    """What a population did.

    Attributes:
        spikes: bool ``(samples, steps, *shape)``, the channels of a position together in memory; all False of a
            readout.
        sums: int64 ``(samples, neurons)`` over all steps, in weight units, of a readout; else empty.
    """

    spikes: NDArray[np.bool_]
    sums: NDArray[np.int64]


class RecordedActivity:
    """What populations read, ready for the kernels.

    Args:
        codes: uint8 ``(samples, *input_shape)``.
        steps: T.

    Attributes:
        spikes: bool ``(samples, steps, *shape)`` by population, the channels of a position together in memory.
    """

    def __init__(self, codes: NDArray[np.uint8], steps: int) -> None:
        self.codes, self.steps = codes, steps
        self.spikes: dict[str, NDArray[np.bool_]] = {}

    def __getitem__(self, source: str) -> Array:
        """Activity of a source: ``(samples, *shape)`` codes, or ``(samples, steps, *shape)`` spikes."""
        return self.codes if source == INPUT else self.spikes[source]

    def shape_of(self, source: str, codes: tuple[int, ...]) -> Shape:
        """Of what a synapse reads, constant channels included."""
        if source == INPUT:
            return input_spec(self.codes.shape[1:], codes).presented_shape
        return self.spikes[source].shape[2:]


def respond(rounded: RoundedPopulation, activity: RecordedActivity, samples: int) -> Response:
    """Run a population on the first ``samples`` of recorded activity.

    The arithmetic is that of :func:`hardware.reference.run_reference`, and the state as wide as on the chip.
    """
    population, steps = rounded.population, activity.steps
    positions, channels = positions_and_channels(population.shape)
    incoming = [_prepare(synapse, rounded, activity) for synapse in rounded.synapses]
    narrow = _is_narrow(rounded, incoming)
    state, held_type = (np.int32, np.int16) if narrow else (np.int64, np.int32)
    bias = (population.bias.reshape(channels, positions).T.reshape(-1) << FRACTION_BITS).astype(state)
    spikes = np.empty((samples, steps, population.size), np.bool_)
    sums = np.empty((0 if population.spiking else samples, population.size), np.int64)
    moves = any(synapse.source != INPUT for synapse in rounded.synapses)
    weights = [one.weight.astype(held_type) for one in incoming]
    block = max(1, BLOCK_BYTES // (population.size * (steps + 1) * np.dtype(state).itemsize))
    for first in range(0, samples, block):
        part = slice(first, min(first + block, samples))
        count = part.stop - part.start
        held = np.zeros((count, population.size), state)
        stepped = np.zeros((count, steps if moves else 0, population.size), state)
        for one, weight in zip(incoming, weights, strict=True):
            add, into = (kernels.add_codes, held) if one.source == INPUT else (kernels.add_spikes, stepped)
            rows = into.reshape(-1, positions, channels)
            read = _channels_last(one, activity, part, rounded.constant_codes)
            add(read, one.edges.first, one.edges.target, one.edges.tap, weight, rows)
        if not population.spiking:
            per_step = held.astype(np.int64) + (bias.astype(np.int64) >> FRACTION_BITS)
            sums[part] = stepped.sum(axis=1, dtype=np.int64) + steps * per_step
            spikes[part] = False
            continue
        nothing = np.empty((count, 0, population.size), np.int32)
        threshold, zero = population.threshold << FRACTION_BITS, population.reset == "zero"
        arguments = (held, stepped, bias, threshold, zero, spikes[part], nothing)
        if population.is_leaky:
            kernels.integrate_leaky(
                *arguments, DECAY_UNITY - population.current_decay, DECAY_UNITY - population.voltage_decay
            )
        else:
            kernels.integrate(*arguments)
    by_channel = np.swapaxes(spikes.reshape(samples, steps, positions, channels), 2, 3)
    return Response(by_channel.reshape(samples, steps, *population.shape), sums)


def sum_bounds(rounded: RoundedPopulation, shapes: Mapping[str, Shape]) -> Bounds:
    """Proven bounds of one step's synaptic sum, without bias, in weight units, over any input.

    Args:
        rounded: the population.
        shapes: of its sources, by name, of the image without constant channels.
    """
    population = rounded.population
    lower, upper = np.zeros(population.shape, np.int64), np.zeros(population.shape, np.int64)
    alone = replace(population, spiking=False)
    for synapse in rounded.synapses:
        # To a synapse it makes no difference where the activity comes from, so each is looked at by itself.
        if synapse.source == INPUT:
            spec = input_spec(shapes[INPUT], rounded.constant_codes)
        else:
            spec = InputSpec(shapes[synapse.source], 1)
        network = IntegerNetwork(spec, (alone,), (replace(synapse, source=INPUT),), 1)
        bounds = synaptic_bounds(network)[population.name]
        lower, upper = lower + bounds.lower, upper + bounds.upper
    return Bounds(lower, upper)


def channels_together(spikes: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The same ``(samples, steps, *shape)``, the channels of a position next to each other in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(spikes, 2, -1)), -1, 2)


@dataclass(frozen=True)
class _Incoming:
    """A synapse for the kernels: weights ``(taps, channels, outputs)`` and the edges they lie on."""

    source: str
    edges: Edges
    weight: Array


def _prepare(synapse: Synapse, rounded: RoundedPopulation, activity: RecordedActivity) -> _Incoming:
    shape = activity.shape_of(synapse.source, rounded.constant_codes)
    positions, channels = positions_and_channels(shape)
    taps = positions if synapse.kind == "dense" else int(np.prod(synapse.weight.shape[2:]))
    weight = np.ascontiguousarray(synapse.weight.reshape(-1, channels, taps).transpose(2, 1, 0))
    return _Incoming(synapse.source, edges(synapse, shape), weight)


def _is_narrow(rounded: RoundedPopulation, incoming: Sequence[_Incoming]) -> bool:
    """Whether 32 bits hold every sum and membrane, as the emulator decides."""
    if rounded.population.is_leaky:
        return False
    largest = np.abs(rounded.population.bias).max().astype(np.int64)
    for one in incoming:
        magnitudes = np.abs(one.weight.astype(np.int64))
        if magnitudes.max(initial=0) >= 2**15:
            return False
        largest = largest + magnitudes.sum(axis=(0, 1)).max() * (255 if one.source == INPUT else 1)
    return bool(largest < NARROW_LIMIT)


def _channels_last(one: _Incoming, activity: RecordedActivity, part: slice, codes: tuple[int, ...]) -> Array:
    """What a synapse reads of some samples: ``(rows, positions, channels)``."""
    values: Array
    if one.source == INPUT:
        values = input_spec(activity.codes.shape[1:], codes).present(activity.codes[part]).astype(np.int32)
    else:
        values = activity.spikes[one.source][part]
        values = values.reshape(-1, *values.shape[2:])
    positions, channels = positions_and_channels(values.shape[1:])
    return np.ascontiguousarray(np.moveaxis(values, 1, -1)).reshape(-1, positions, channels)
