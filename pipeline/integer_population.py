"""One integer population on recorded activity: a network is searched layer by layer without running what lies before.

It runs as the emulator runs it, so what it does is what the whole network will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.bounds import Bounds, synapse_bounds
from hardware.emulated_population import EmulatedPopulation, input_rows
from hardware.emulator import BLOCK_BYTES
from hardware.network import INPUT, InputSpec, Shape
from hardware.synapse_kernels import pack_spikes
from pipeline.integer_recipe import RoundedPopulation

Array = NDArray[Any]


@dataclass(frozen=True)
class Response:
    """What a population did.

    Attributes:
        spikes: bool ``(samples, steps, *shape)``, the channels of a position together in memory; all False of a
            readout.
        readouts: int64 ``(samples, neurons)``, as of the network, of a readout; else empty.
    """

    spikes: NDArray[np.bool_]
    readouts: NDArray[np.int64]


class RecordedActivity:
    """What populations read, as arrays and ready for the kernels.

    Args:
        codes: uint8 ``(samples, [steps,] *shape)``.
        steps: T.
        spec: of the input, without constant channels.

    Attributes:
        spikes: bool ``(samples, steps, *shape)`` by population, the channels of a position together in memory.
    """

    def __init__(self, codes: NDArray[np.uint8], steps: int, spec: InputSpec | None = None) -> None:
        self.codes, self.steps = codes, steps
        self.spec = InputSpec(codes.shape[1:]) if spec is None else spec
        self.timed = codes.ndim == len(self.spec.shape) + 2
        self.spikes: dict[str, NDArray[np.bool_]] = {}
        self._bits: dict[str, NDArray[np.uint8]] = {}

    def __getitem__(self, source: str) -> Array:
        """Activity of a source: ``(samples, [steps,] *shape)`` codes, or ``(samples, steps, *shape)`` spikes."""
        return self.codes if source == INPUT else self.spikes[source]

    def record(self, source: str, spikes: NDArray[np.bool_]) -> None:
        """Keep spikes of all samples, ``(samples, steps, *shape)``."""
        self.spikes[source] = channels_together(spikes)
        rows = np.moveaxis(self.spikes[source], 2, -1).reshape(-1, int(np.prod(spikes.shape[2:])))
        self._bits[source] = pack_spikes(rows)

    def shape_of(self, source: str, codes: tuple[int, ...]) -> Shape:
        """Of what a synapse reads, constant channels included."""
        if source == INPUT:
            return replace(self.spec, constant_codes=codes).presented_shape
        return self.spikes[source].shape[2:]

    def rows(self, source: str, codes: tuple[int, ...], part: slice) -> Array:
        """What a synapse reads of some samples, for :meth:`EmulatedPopulation.sums`."""
        if source == INPUT:
            return input_rows(replace(self.spec, constant_codes=codes), self.codes[part], self.steps)
        return self._bits[source][part.start * self.steps : part.stop * self.steps]


def respond(rounded: RoundedPopulation, activity: RecordedActivity, samples: int) -> Response:
    """Run a population on the first ``samples`` of recorded activity."""
    population, steps, codes = rounded.population, activity.steps, rounded.constant_codes
    incoming = [(synapse, activity.shape_of(synapse.source, codes)) for synapse in rounded.synapses]
    emulated = EmulatedPopulation.proven(population, incoming, rounded.input_spec(activity.spec.shape))
    spikes = np.zeros((samples, steps, population.size), np.bool_)
    answers = np.empty((0 if population.spiking else samples, population.size), np.int64)
    block = max(1, BLOCK_BYTES // emulated.bytes_per_sample(steps))
    for first in range(0, samples, block):
        part = slice(first, min(first + block, samples))
        read = {synapse.source: activity.rows(synapse.source, codes, part) for synapse in rounded.synapses}
        held, stepped = emulated.sums(read, part.stop - part.start, steps, activity.timed)
        if population.spiking:
            spikes[part], _, _ = emulated.fire(held, stepped, steps, keeps_membranes=False)
        else:
            answers[part] = emulated.readouts(held, stepped, steps)
    by_channel = np.swapaxes(spikes.reshape(samples, steps, emulated.positions, emulated.channels), 2, 3)
    return Response(by_channel.reshape(samples, steps, *population.shape), answers)


def sum_bounds(rounded: RoundedPopulation, shapes: Mapping[str, Shape]) -> Bounds:
    """Proven bounds of one step's synaptic sum, without bias, in weight units, over any input.

    Args:
        rounded: the population.
        shapes: of its sources, by name, of the image without constant channels.
    """
    spec = rounded.input_spec(shapes[INPUT])
    lower = upper = np.zeros(rounded.population.shape, np.int64)
    for synapse in rounded.synapses:
        shape = spec.presented_shape if synapse.source == INPUT else shapes[synapse.source]
        part = synapse_bounds(synapse, shape, spec)
        lower, upper = lower + part.lower, upper + part.upper
    return Bounds(lower, upper)


def channels_together(spikes: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The same ``(samples, steps, *shape)``, the channels of a position next to each other in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(spikes, 2, -1)), -1, 2)
