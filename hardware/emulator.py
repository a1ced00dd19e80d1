"""The reference's arithmetic, fast on a CPU: compiled kernels driven by events, without torch.

Populations run one after the other, each over all steps and a block of samples that fits the cache. Only
neurons that spiked add their weights; the channels of a position lie next to each other, so each addition is
one run of vector instructions. What is presented at every step is summed once per sample. Every result is
equal to :func:`hardware.reference.run_reference`, bit for bit.
"""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware import kernels
from hardware.bounds import synaptic_magnitudes
from hardware.geometry import Edges, edges, positions_and_channels
from hardware.network import (
    DECAY_UNITY,
    FRACTION_BITS,
    INPUT,
    STATE_LIMIT,
    IntArray,
    IntegerNetwork,
    Population,
    Shape,
    Synapse,
)
from hardware.trace import PopulationTrace, Record, Trace, concatenate

Array = NDArray[Any]

BLOCK_BYTES = 2**19
"""Sums of one block of samples; a quarter of a common second-level cache."""
NARROW_LIMIT = 2**24
"""Sums (weight units) below this leave room for 6 fractional bits and a membrane in int32."""


def run_emulator(network: IntegerNetwork, codes: IntArray, record: Record = "readouts", threads: int = 1) -> Trace:
    """Run samples on the CPU; arguments and result are those of ``run_reference``.

    Args:
        network: what to run.
        codes: ``(samples, *shape)``, or ``(samples, steps, *shape)`` for inputs that change over time.
        record: "traces" keeps every spike and membrane, "readouts" only the sums.
        threads: blocks of samples that run at the same time.
    """
    return Emulator(network).run(codes, record, threads)


def count_saturations(network: IntegerNetwork, codes: IntArray) -> dict[str, int]:
    """How many membranes were clipped, over all samples, steps and neurons, by population."""
    return Emulator(network).count_saturations(codes)


class Emulator:
    """A network prepared to be run many times.

    The preparation is made when a network is first seen and kept as long as that network lives.

    Args:
        network: what to run.
    """

    def __init__(self, network: IntegerNetwork) -> None:
        self.network = network
        self._input = network.input
        self._steps = network.steps
        self._populations = _prepare(network)
        widest = max(p.bias.nbytes for p in self._populations) * (self._steps + 1)
        self.block = max(1, BLOCK_BYTES // widest)

    def run(self, codes: IntArray, record: Record = "readouts", threads: int = 1) -> Trace:
        """Run ``(samples, [steps,] *shape)`` codes; see :func:`run_emulator`."""
        starts = range(0, max(len(codes), 1), self.block)
        blocks = [codes[start : start + self.block] for start in starts]
        if threads == 1:
            return concatenate([self._run_block(block, record) for block in blocks])
        with ThreadPoolExecutor(threads) as pool:
            return concatenate(list(pool.map(lambda block: self._run_block(block, record), blocks)))

    def count_saturations(self, codes: IntArray) -> dict[str, int]:
        """How many membranes were clipped, over all samples, steps and neurons, by population."""
        counts = {p.population.name: 0 for p in self._populations}
        for start in range(0, len(codes), self.block):
            self._run_block(codes[start : start + self.block], "traces", counts)
        return counts

    def _run_block(self, codes: IntArray, record: Record, clipped: dict[str, int] | None = None) -> Trace:
        """Run a few samples; ``clipped`` is counted up where given."""
        channels_last = np.moveaxis(self._input.present(codes, self._steps), -len(self._input.shape), -1)
        changing = codes.ndim == len(self._input.shape) + 2
        positions, channels = positions_and_channels(self._input.presented_shape)
        activity: dict[str, Array] = {
            INPUT: np.ascontiguousarray(channels_last, np.int32).reshape(-1, positions, channels)
        }
        traces = {}
        for prepared in self._populations:
            held, stepped = self._sums(prepared, activity, len(codes), changing)
            if not prepared.population.spiking:
                per_step = held.astype(np.int64) + (prepared.bias.astype(np.int64) >> FRACTION_BITS)
                readouts = stepped.sum(axis=1, dtype=np.int64) + self._steps * per_step
                if record == "readouts" and clipped is None:
                    break
            spikes, membranes, count = self._fire(prepared, held, stepped, record)
            activity[prepared.population.name] = spikes.reshape(-1, prepared.positions, prepared.channels)
            if clipped is not None:
                clipped[prepared.population.name] += count
            if record == "traces":
                traces[prepared.population.name] = prepared.trace(spikes, membranes)
        return Trace(readouts, traces)

    def _sums(
        self, prepared: _PreparedPopulation, activity: dict[str, Array], samples: int, changing: bool
    ) -> tuple[Array, Array]:
        """Synaptic sums that are the same at every step, and those that are not (no steps if none are)."""
        neurons, dtype = prepared.population.size, prepared.bias.dtype
        held = np.zeros((samples, neurons), dtype)
        moves = changing or any(s.source != INPUT for s in prepared.incoming)
        stepped = np.zeros((samples, self._steps if moves else 0, neurons), dtype)
        for synapse in prepared.incoming:
            from_input = synapse.source == INPUT
            into = held if from_input and not changing else stepped
            add = kernels.add_codes if from_input else kernels.add_spikes
            rows = into.reshape(-1, prepared.positions, prepared.channels)
            e = synapse.edges
            add(activity[synapse.source], e.first, e.target, e.tap, synapse.weight, rows)
        return held, stepped

    def _fire(
        self, prepared: _PreparedPopulation, held: Array, stepped: Array, record: Record
    ) -> tuple[Array, Array, int]:
        """Spikes and (if recorded) membranes ``(samples, steps, neurons)``, and how many were clipped."""
        population = prepared.population
        samples, neurons = held.shape
        spikes = np.empty((samples, self._steps, neurons), np.bool_)
        membranes = np.empty((samples, self._steps if record == "traces" else 0, neurons), np.int32)
        # A readout is a neuron that no membrane can fire.
        threshold = population.threshold << FRACTION_BITS if population.spiking else STATE_LIMIT
        zero = population.reset == "zero"
        arguments = (held, stepped, prepared.bias, threshold, zero, spikes, membranes)
        if population.is_leaky:
            kept = (DECAY_UNITY - population.current_decay, DECAY_UNITY - population.voltage_decay)
            return spikes, membranes, int(kernels.integrate_leaky(*arguments, *kept))
        return spikes, membranes, int(kernels.integrate(*arguments))


@dataclass(frozen=True)
class _PreparedSynapse:
    """Weights ``(taps, channels, outputs)`` and the edges they lie on."""

    source: str
    edges: Edges
    weight: Array


@dataclass(frozen=True)
class _PreparedPopulation:
    """A population, neurons in (position, channel) order; ``bias`` in state units, of the state's type."""

    population: Population
    positions: int
    channels: int
    bias: Array
    incoming: tuple[_PreparedSynapse, ...]

    def trace(self, spikes: Array, membranes: Array) -> PopulationTrace:
        """Recorded values, neurons back in C order of the population's shape."""

        def c_order(values: Array) -> Array:
            split = values.reshape(*values.shape[:2], self.positions, self.channels)
            return np.ascontiguousarray(np.swapaxes(split, 2, 3)).reshape(values.shape)

        return PopulationTrace(c_order(spikes) if self.population.spiking else None, c_order(membranes))


def _prepare_population(
    network: IntegerNetwork, population: Population, magnitudes: NDArray[np.int64]
) -> _PreparedPopulation:
    synapses = network.incoming(population.name)
    narrow = (
        not population.is_leaky
        and int((magnitudes + np.abs(population.bias)).max()) < NARROW_LIMIT
        and all(np.abs(s.weight.astype(np.int64)).max() < 2**15 for s in synapses)
    )
    positions, channels = positions_and_channels(population.shape)
    bias = population.bias.reshape(channels, positions).T.reshape(-1) << FRACTION_BITS
    return _PreparedPopulation(
        population,
        positions,
        channels,
        bias.astype(np.int32 if narrow else np.int64),
        tuple(
            _PreparedSynapse(
                s.source,
                edges(s, network.source_shape(s)),
                _taps_first(s, network.source_shape(s)).astype(np.int16 if narrow else np.int32),
            )
            for s in synapses
        ),
    )


def _taps_first(synapse: Synapse, source_shape: Shape) -> Array:
    """Weights as ``(taps, channels, outputs)``, the taps of :class:`~hardware.geometry.Edges`."""
    positions, channels = positions_and_channels(source_shape)
    taps = positions if synapse.kind == "dense" else int(np.prod(synapse.weight.shape[2:]))
    return np.ascontiguousarray(synapse.weight.reshape(-1, channels, taps).transpose(2, 1, 0))


_prepared: dict[int, tuple[_PreparedPopulation, ...]] = {}


def _prepare(network: IntegerNetwork) -> tuple[_PreparedPopulation, ...]:
    """Its populations prepared, once per network; kept by identity, as comparing contents costs more."""
    populations = _prepared.get(id(network))
    if populations is None:
        magnitudes = synaptic_magnitudes(network)
        populations = tuple(_prepare_population(network, p, magnitudes[p.name]) for p in network.populations)
        _prepared[id(network)] = populations
        weakref.finalize(network, _prepared.pop, id(network), None)
    return populations
