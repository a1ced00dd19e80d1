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

from hardware.emulated_population import EmulatedPopulation, input_rows
from hardware.network import INPUT, IntArray, IntegerNetwork, Population, Shape, Synapse
from hardware.proof_checks import ProofChecks
from hardware.synapse_kernels import pack_spikes
from hardware.trace import PopulationTrace, Record, Trace, concatenate

Array = NDArray[Any]
EmulatorRecord = Record | Literal["spikes"]
"""What to keep; "spikes" are traces without membranes, one bit per neuron and step."""

BLOCK_BYTES = 2**21
"""Sums and spikes of one block of samples: more would leave a common second-level cache, less costs more calls."""


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
        self._populations = (
            tuple(EmulatedPopulation.wide(p, _incoming(network, p)) for p in network.populations)
            if wide
            else _prepare(network)
        )
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
        changing = codes.ndim == len(self._input.shape) + 2
        rows = input_rows(self._input, codes, self._steps)
        activity: dict[str, Array] = {INPUT: pack_spikes(rows != 0) if self._input.max_code == 1 else rows}
        keeps_membranes = record == "traces" or checks is not None
        traces = {}
        for prepared in self._populations:
            name, spiking = prepared.population.name, prepared.population.spiking
            held, stepped = prepared.sums(activity, len(codes), self._steps, changing)
            if not spiking:
                readouts = prepared.readouts(held, stepped, self._steps)
                if not keeps_membranes:
                    break
            spikes, membranes, clipped = prepared.fire(held, stepped, self._steps, keeps_membranes)
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


def _incoming(network: IntegerNetwork, population: Population) -> list[tuple[Synapse, Shape]]:
    """The synapses of a population and what they read."""
    return [(synapse, network.source_shape(synapse)) for synapse in network.incoming(population.name)]


_prepared: dict[int, tuple[EmulatedPopulation, ...]] = {}


def _prepare(network: IntegerNetwork) -> tuple[EmulatedPopulation, ...]:
    """Its populations prepared, once per network; kept by identity, as comparing contents costs more."""
    populations = _prepared.get(id(network))
    if populations is None:
        populations = _prepared[id(network)] = tuple(
            EmulatedPopulation.proven(p, _incoming(network, p), network.input) for p in network.populations
        )
        weakref.finalize(network, _prepared.pop, id(network), None)
    return populations
