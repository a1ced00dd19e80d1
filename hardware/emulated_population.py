"""One population as the emulator runs it: all sums and then all steps of a block of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware import kernels
from hardware.bounds import synaptic_magnitude
from hardware.geometry import positions_and_channels
from hardware.network import DECAY_UNITY, FRACTION_BITS, INPUT, STATE_LIMIT, InputSpec, Population, Shape, Synapse
from hardware.synapse_kernels import GatheringSynapse

Array = NDArray[Any]

NARROW_LIMIT = 2**24
"""Sums (weight units) below this leave room for 6 fractional bits and a membrane in int32."""


@dataclass(frozen=True)
class EmulatedPopulation:
    """A population laid out for the kernels, neurons in (position, channel) order.

    Attributes:
        bias: state units, of the type that the state is computed in.
        sum_type: of synaptic sums.
        incoming: names of the sources, and the synapses.
    """

    population: Population
    positions: int
    channels: int
    bias: Array
    sum_type: np.dtype[Any]
    incoming: tuple[tuple[str, GatheringSynapse], ...]

    @classmethod
    def wide(cls, population: Population, incoming: Sequence[tuple[Synapse, Shape]]) -> EmulatedPopulation:
        """In 64 bits.

        Args:
            population: what to run.
            incoming: its synapses and the shapes they read, constant input channels included.
        """
        return cls._of(population, incoming, False, False)

    @classmethod
    def proven(
        cls, population: Population, incoming: Sequence[tuple[Synapse, Shape]], spec: InputSpec
    ) -> EmulatedPopulation:
        """As :meth:`wide`, but with the smallest types that provably hold every value for inputs of ``spec``."""
        magnitude = sum(
            (synaptic_magnitude(synapse, shape, spec) for synapse, shape in incoming), start=np.abs(population.bias)
        )
        weights = [synapse.weight.astype(np.int64) for synapse, _ in incoming]
        narrow = int(magnitude.max()) < NARROW_LIMIT and all(np.abs(weight).max() < 2**15 for weight in weights)
        return cls._of(population, incoming, narrow, narrow and not population.is_leaky)

    @classmethod
    def _of(
        cls, population: Population, incoming: Sequence[tuple[Synapse, Shape]], narrow_sums: bool, narrow_state: bool
    ) -> EmulatedPopulation:
        positions, channels = positions_and_channels(population.shape)
        bias = population.bias.reshape(channels, positions).T.reshape(-1) << FRACTION_BITS
        return cls(
            population,
            positions,
            channels,
            bias.astype(np.int32 if narrow_state else np.int64),
            np.dtype(np.int32 if narrow_sums else np.int64),
            tuple((synapse.source, GatheringSynapse.of(synapse, shape, narrow_sums)) for synapse, shape in incoming),
        )

    def bytes_per_sample(self, steps: int) -> int:
        """Of the sums and spikes of all steps."""
        return self.population.size * ((steps + 1) * self.sum_type.itemsize + steps)

    def sums(self, activity: Mapping[str, Array], samples: int, steps: int, changing: bool) -> tuple[Array, Array]:
        """Synaptic sums in weight units.

        Args:
            activity: by source: int32 codes, or bits of :func:`~hardware.synapse_kernels.pack_spikes`. A row per
                sample and step, but for an input that does not change: a row per sample.
            samples: in ``activity``.
            steps: T.
            changing: whether the input changes over time.

        Returns:
            What is the same at every step, ``(samples, neurons)``, and what is not, ``(samples, steps, neurons)``
            (no steps if nothing is).
        """
        neurons = self.population.size
        held = np.zeros((samples, neurons), self.sum_type)
        moves = changing or any(source != INPUT for source, _ in self.incoming)
        stepped = np.zeros((samples, steps if moves else 0, neurons), self.sum_type)
        for source, synapse in self.incoming:
            read = activity[source]
            add = synapse.add_codes if read.dtype == np.int32 else synapse.add_spikes
            into = held if source == INPUT and not changing else stepped
            add(read, into.reshape(-1, neurons))
        return held, stepped

    def readouts(self, held: Array, stepped: Array, steps: int) -> NDArray[np.int64]:
        """Sums and bias over all steps, ``(samples, neurons)``, in weight units; the last membrane if it leaks."""
        if self.population.is_leaky:
            _, membranes, _ = self.fire(held, stepped, steps, keeps_membranes=True)
            return membranes[:, -1].astype(np.int64)
        per_step = held.astype(np.int64) + (self.bias.astype(np.int64) >> FRACTION_BITS)
        result: NDArray[np.int64] = stepped.sum(axis=1, dtype=np.int64) + steps * per_step
        return result

    def fire(self, held: Array, stepped: Array, steps: int, keeps_membranes: bool) -> tuple[Array, Array, int]:
        """Spikes and (if kept) membranes ``(samples, steps, neurons)``, and how many were clipped."""
        population = self.population
        samples, neurons = held.shape
        spikes = np.empty((samples, steps, neurons), np.bool_)
        membranes = np.empty((samples, steps if keeps_membranes else 0, neurons), np.int32)
        # A readout is a neuron that no membrane can fire.
        threshold = population.threshold << FRACTION_BITS if population.spiking else STATE_LIMIT
        zero = population.reset == "zero"
        arguments = (held, stepped, self.bias, threshold, zero, spikes, membranes)
        if population.is_leaky:
            kept = (DECAY_UNITY - population.current_decay, DECAY_UNITY - population.voltage_decay)
            return spikes, membranes, int(kernels.integrate_leaky(*arguments, *kept))
        return spikes, membranes, int(kernels.integrate(*arguments))

    def c_order(self, values: Array) -> Array:
        """Values ``(samples, steps, neurons)``, the neurons in C order of the population's shape."""
        split = values.reshape(*values.shape[:2], self.positions, self.channels)
        return np.ascontiguousarray(np.swapaxes(split, 2, 3)).reshape(values.shape)


def input_rows(spec: InputSpec, codes: NDArray[np.integer[Any]], steps: int) -> NDArray[np.int32]:
    """Codes ``(samples, [steps,] *shape)`` and the constant channels, a row per image in (position, channel) order."""
    presented = np.moveaxis(spec.present(codes, steps), -len(spec.shape), -1)
    return presented.reshape(-1, int(np.prod(spec.presented_shape))).astype(np.int32)
