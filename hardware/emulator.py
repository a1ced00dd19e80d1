"""The reference's arithmetic, fast on a CPU: compiled kernels driven by events, without torch.

Populations run one after the other, each over all steps and a block of samples that fits the cache. Only
neurons that spiked add their weights; the channels of a position lie next to each other, so that each addition is
of whole vectors. What is presented at every step is summed once per sample. Every result is equal to
:func:`hardware.reference.run_reference`, bit for bit.
"""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hardware import kernels
from hardware.bounds import synaptic_magnitudes
from hardware.geometry import positions_and_channels
from hardware.network import (
    DECAY_UNITY,
    FRACTION_BITS,
    INPUT,
    STATE_LIMIT,
    IntArray,
    IntegerNetwork,
    Population,
)
from hardware.proof_checks import ProofChecks
from hardware.synapse_kernels import GatheringSynapse, pack_spikes
from hardware.trace import PopulationTrace, Record, Trace, concatenate

Array = NDArray[Any]
EmulatorRecord = Record | Literal["spikes"]
"""What to keep; "spikes" are traces without membranes, one bit per neuron and step."""

BLOCK_BYTES = 2**21
"""Sums and spikes of one block of samples: more would leave a common second-level cache, less costs more calls."""
NARROW_LIMIT = 2**24
"""Sums (weight units) below this leave room for 6 fractional bits and a membrane in int32."""


@dataclass(frozen=True)
class StrictRun:
    """What :func:`run_strictly` found.

    Attributes:
        trace: with all that was asked for.
        saturations: membranes that were clipped, over all samples, steps and neurons, by population.
    """

    trace: Trace
    saturations: dict[str, int]


def run_emulator(
    network: IntegerNetwork, codes: IntArray, record: EmulatorRecord = "readouts", threads: int = 1
) -> Trace:
    """Run samples on the CPU; arguments and result are those of ``run_reference``.

    Args:
        network: what to run.
        codes: ``(samples, *shape)``, or ``(samples, steps, *shape)`` for inputs that change over time.
        record: "traces" keeps every spike and membrane, "spikes" the spikes alone, "readouts" only the sums.
        threads: blocks of samples that run at the same time.
    """
    return Emulator(network).run(codes, record, threads)


def run_strictly(network: IntegerNetwork, codes: IntArray, record: EmulatorRecord = "readouts") -> StrictRun:
    """Run samples, hold every value against the proofs of :mod:`hardware.bounds`, and count clipped membranes.

    Everything is computed in 64 bits, whatever the proofs say, and checked in plain numpy, which takes its time.

    Raises:
        RuleViolations: every proof that a value contradicts.
    """
    emulator, checks = Emulator(network, wide=True), ProofChecks(network)
    trace = concatenate([emulator.run_block(block, record, checks) for block in emulator.blocks(codes)])
    checks.require_held()
    return StrictRun(trace, dict(checks.saturations))


def count_saturations(network: IntegerNetwork, codes: IntArray) -> dict[str, int]:
    """How many membranes were clipped, by population, in a strict run; see :func:`run_strictly`."""
    return run_strictly(network, codes).saturations


class Emulator:
    """A network prepared to be run many times.

    The preparation is made when a network is first seen and kept as long as that network lives.

    Args:
        network: what to run.
        wide: compute in 64 bits, whatever the proofs say of the values; else in 32 where they fit.
    """

    def __init__(self, network: IntegerNetwork, wide: bool = False) -> None:
        self.network = network
        self._input = network.input
        self._steps = network.steps
        self._populations = _prepare_wide(network) if wide else _prepare(network)
        self.block = max(1, BLOCK_BYTES // max(p.bytes_per_sample(self._steps) for p in self._populations))

    def run(self, codes: IntArray, record: EmulatorRecord = "readouts", threads: int = 1) -> Trace:
        """Run ``(samples, [steps,] *shape)`` codes; see :func:`run_emulator`."""
        blocks = self.blocks(codes)
        if threads == 1:
            return concatenate([self.run_block(block, record) for block in blocks])
        with ThreadPoolExecutor(threads) as pool:
            return concatenate(list(pool.map(lambda block: self.run_block(block, record), blocks)))

    def blocks(self, codes: IntArray) -> list[IntArray]:
        """The samples in parts that fit the cache; at least one, even of none."""
        return [codes[start : start + self.block] for start in range(0, max(len(codes), 1), self.block)]

    def run_block(self, codes: IntArray, record: EmulatorRecord, checks: ProofChecks | None = None) -> Trace:
        """Run all of ``codes`` at once, and show every value to ``checks`` where given."""
        presented = np.moveaxis(self._input.present(codes, self._steps), -len(self._input.shape), -1)
        changing = codes.ndim == len(self._input.shape) + 2
        rows = presented.reshape(-1, int(np.prod(self._input.presented_shape)))
        activity: dict[str, Array] = {
            INPUT: pack_spikes(rows.astype(np.bool_)) if self._input.max_code == 1 else rows.astype(np.int32)
        }
        keeps_membranes = record == "traces" or checks is not None
        traces = {}
        for prepared in self._populations:
            name, spiking = prepared.population.name, prepared.population.spiking
            held, stepped = self._sums(prepared, activity, len(codes), changing)
            if not spiking:
                per_step = held.astype(np.int64) + (prepared.bias.astype(np.int64) >> FRACTION_BITS)
                readouts = stepped.sum(axis=1, dtype=np.int64) + self._steps * per_step
                if not keeps_membranes:
                    break
            spikes, membranes, clipped = self._fire(prepared, held, stepped, keeps_membranes)
            if spiking:
                activity[name] = pack_spikes(spikes.reshape(-1, prepared.population.size))
            if checks is not None:
                sums = held[:, None] + stepped if stepped.shape[1] else np.repeat(held[:, None], self._steps, axis=1)
                order = prepared.c_order
                checks.look(name, order(sums), order(spikes), order(membranes), clipped)
            if record == "traces" or (record == "spikes" and spiking):
                traces[name] = PopulationTrace(
                    prepared.c_order(spikes) if spiking else None,
                    prepared.c_order(membranes) if record == "traces" else None,
                )
        if checks is not None:
            checks.look_at_readouts(readouts)
        return Trace(readouts, traces)

    def _sums(
        self, prepared: _PreparedPopulation, activity: dict[str, Array], samples: int, changing: bool
    ) -> tuple[Array, Array]:
        """Synaptic sums that are the same at every step, and those that are not (no steps if none are)."""
        neurons = prepared.population.size
        held = np.zeros((samples, neurons), prepared.sum_type)
        moves = changing or any(source != INPUT for source, _ in prepared.incoming)
        stepped = np.zeros((samples, self._steps if moves else 0, neurons), prepared.sum_type)
        for source, synapse in prepared.incoming:
            graded = source == INPUT and self._input.max_code > 1
            add = synapse.add_codes if graded else synapse.add_spikes
            into = held if source == INPUT and not changing else stepped
            add(activity[source], into.reshape(-1, neurons))
        return held, stepped

    def _fire(
        self, prepared: _PreparedPopulation, held: Array, stepped: Array, keeps_membranes: bool
    ) -> tuple[Array, Array, int]:
        """Spikes and (if kept) membranes ``(samples, steps, neurons)``, and how many were clipped."""
        population = prepared.population
        samples, neurons = held.shape
        spikes = np.empty((samples, self._steps, neurons), np.bool_)
        membranes = np.empty((samples, self._steps if keeps_membranes else 0, neurons), np.int32)
        # A readout is a neuron that no membrane can fire.
        threshold = population.threshold << FRACTION_BITS if population.spiking else STATE_LIMIT
        zero = population.reset == "zero"
        arguments = (held, stepped, prepared.bias, threshold, zero, spikes, membranes)
        if population.is_leaky:
            kept = (DECAY_UNITY - population.current_decay, DECAY_UNITY - population.voltage_decay)
            return spikes, membranes, int(kernels.integrate_leaky(*arguments, *kept))
        return spikes, membranes, int(kernels.integrate(*arguments))


@dataclass(frozen=True)
class _PreparedPopulation:
    """A population, neurons in (position, channel) order.

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

    def bytes_per_sample(self, steps: int) -> int:
        """Of the sums and spikes of all steps."""
        return self.population.size * ((steps + 1) * self.sum_type.itemsize + steps)

    def c_order(self, values: Array) -> Array:
        """Values ``(samples, steps, neurons)``, the neurons in C order of the population's shape."""
        split = values.reshape(*values.shape[:2], self.positions, self.channels)
        return np.ascontiguousarray(np.swapaxes(split, 2, 3)).reshape(values.shape)


def _prepare_population(
    network: IntegerNetwork, population: Population, narrow_sums: bool, narrow_state: bool
) -> _PreparedPopulation:
    positions, channels = positions_and_channels(population.shape)
    bias = population.bias.reshape(channels, positions).T.reshape(-1) << FRACTION_BITS
    return _PreparedPopulation(
        population,
        positions,
        channels,
        bias.astype(np.int32 if narrow_state else np.int64),
        np.dtype(np.int32 if narrow_sums else np.int64),
        tuple(
            (s.source, GatheringSynapse.of(s, network.source_shape(s), narrow_sums))
            for s in network.incoming(population.name)
        ),
    )


def _prepare_wide(network: IntegerNetwork) -> tuple[_PreparedPopulation, ...]:
    return tuple(_prepare_population(network, p, False, False) for p in network.populations)


def _prepare_proven(network: IntegerNetwork) -> tuple[_PreparedPopulation, ...]:
    """All populations, with the smallest types that the bounds allow."""
    magnitudes = synaptic_magnitudes(network)
    prepared = []
    for population in network.populations:
        largest = int((magnitudes[population.name] + np.abs(population.bias)).max())
        weights = [s.weight.astype(np.int64) for s in network.incoming(population.name)]
        narrow = largest < NARROW_LIMIT and all(np.abs(weight).max() < 2**15 for weight in weights)
        prepared.append(_prepare_population(network, population, narrow, narrow and not population.is_leaky))
    return tuple(prepared)


_prepared: dict[int, tuple[_PreparedPopulation, ...]] = {}


def _prepare(network: IntegerNetwork) -> tuple[_PreparedPopulation, ...]:
    """Its populations prepared, once per network; kept by identity, as comparing contents costs more."""
    populations = _prepared.get(id(network))
    if populations is None:
        populations = _prepared[id(network)] = _prepare_proven(network)
        weakref.finalize(network, _prepared.pop, id(network), None)
    return populations
