"""What all targets share: rules that say what is broken, where a network would lie, and how much it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.geometry import edges, positions_and_channels
from hardware.network import IntegerNetwork, Population, Synapse
from hardware.trace import Trace


class Breach(NamedTuple):
    """Where a rule is broken; the rule's own name completes it to a :class:`~hardware.errors.Violation`."""

    object: str
    actual: str
    limit: str
    remedy: str


Rule = Callable[[IntegerNetwork], Iterator[Breach]]
"""A predicate named after what must hold; it yields every place where it does not."""


@dataclass(frozen=True)
class Core:
    """What one core of a chip can hold.

    Attributes:
        neurons: at most.
        memory_bytes: for weights and neuron states together.
        per_chip: cores of one chip.
    """

    neurons: int
    memory_bytes: int
    per_chip: int


@dataclass(frozen=True)
class Target:
    """Something a network can be deployed to.

    Attributes:
        name: as the command line calls it.
        rules: all that must hold there.
        neuron_bytes: what one neuron keeps besides its weights.
        smallest_weight_bits: that a stored weight takes, even if its population uses fewer.
        core: of the chip; None where the network shares one memory.
    """

    name: str
    rules: tuple[Rule, ...]
    neuron_bytes: int
    smallest_weight_bits: int
    core: Core | None


@dataclass(frozen=True)
class PopulationPlacement:
    """What one population takes.

    Attributes:
        neurons: how many.
        connections: entering it, every convolution unfolded; padding connects nothing.
        fan_in: most connections that enter one neuron.
        fan_out: most connections that leave one neuron.
        axons_in: pairs of an entering synapse and a neuron, or input code, that it carries here.
        axons_out: pairs of a leaving synapse and a neuron that it carries elsewhere.
        weight_bytes: of the entering kernels and matrices, each stored once.
        state_bytes: of its neurons.
        minimum_cores: its neurons, weights and states need, whichever needs most; None where there are no cores.
    """

    population: str
    neurons: int
    connections: int
    fan_in: int
    fan_out: int
    axons_in: int
    axons_out: int
    weight_bytes: int
    state_bytes: int
    minimum_cores: int | None


@dataclass(frozen=True)
class Placement:
    """Where a network would lie on a target: totals over :class:`PopulationPlacement` rows.

    Cores and chips are lower bounds: no two populations share a core, but kernels that several cores repeat are
    counted once, and routing tables and programs, whose sizes are not public, not at all.
    """

    target: str
    populations: tuple[PopulationPlacement, ...]
    cores_per_chip: int | None

    @property
    def neurons(self) -> int:
        """Neurons of the whole network."""
        return sum(p.neurons for p in self.populations)

    @property
    def connections(self) -> int:
        """Connections of the whole network, convolutions unfolded."""
        return sum(p.connections for p in self.populations)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, each stored once."""
        return sum(p.weight_bytes for p in self.populations)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all weights and neuron states."""
        return self.weight_bytes + sum(p.state_bytes for p in self.populations)

    @property
    def minimum_cores(self) -> int | None:
        """Cores needed when no two populations share one; None where there are no cores."""
        return None if self.cores_per_chip is None else sum(p.minimum_cores or 0 for p in self.populations)

    @property
    def minimum_chips(self) -> int | None:
        """Chips that many cores need; None where there are no cores."""
        cores = self.minimum_cores
        return None if cores is None or self.cores_per_chip is None else -(-cores // self.cores_per_chip)


@dataclass(frozen=True)
class Activity:
    """What a network did per image, measured on a trace.

    Attributes:
        spikes: by spiking population.
        synaptic_operations: by synapse between populations: spikes times the connections each travels. The
            input is not among them, for its codes are no spikes.
        steps: T.
    """

    spikes: Mapping[str, float]
    synaptic_operations: Mapping[str, float]
    steps: int

    @property
    def spikes_per_image(self) -> float:
        """Spikes of all populations."""
        return sum(self.spikes.values())

    @property
    def synaptic_operations_per_image(self) -> float:
        """Synaptic operations of all synapses between populations."""
        return sum(self.synaptic_operations.values())


def check(network: IntegerNetwork, target: Target) -> list[Violation]:
    """Every rule of ``target`` that ``network`` breaks, everywhere it does; empty if it fits there."""
    return [
        Violation(breach.object, rule.__name__.replace("_", " "), breach.actual, breach.limit, breach.remedy)
        for rule in target.rules
        for breach in rule(network)
    ]


def require(network: IntegerNetwork, target: Target, subject: str) -> None:
    """Refuse a network that breaks a rule of ``target``.

    Raises:
        RuleViolations: with every violation of every rule.
    """
    violations = check(network, target)
    if violations:
        raise RuleViolations(subject, violations)


def placement(network: IntegerNetwork, target: Target) -> Placement:
    """What ``network`` takes on ``target``, whether or not it breaks a rule there."""
    fans = [(synapse, fan_out(network, synapse)) for synapse in network.synapses]
    rows = []
    for population in network.populations:
        entering = [fan for synapse, fan in fans if synapse.target == population.name]
        leaving = [fan for synapse, fan in fans if synapse.source == population.name]
        rows.append(
            PopulationPlacement(
                population=population.name,
                neurons=population.size,
                connections=sum(int(fan.sum()) for fan in entering),
                fan_in=int(fan_in(network, population).max()),
                fan_out=int(np.sum(leaving, axis=0).max()) if leaving else 0,
                axons_in=sum(int(np.count_nonzero(fan)) for fan in entering),
                axons_out=sum(int(np.count_nonzero(fan)) for fan in leaving),
                weight_bytes=weight_bytes(network, population, target),
                state_bytes=population.size * target.neuron_bytes,
                minimum_cores=minimum_cores(network, population, target),
            )
        )
    return Placement(target.name, tuple(rows), None if target.core is None else target.core.per_chip)


def weight_bytes(network: IntegerNetwork, population: Population, target: Target) -> int:
    """Bytes of the kernels and matrices that enter ``population``, each stored once."""
    return sum(
        -(-s.weight.size * max(s.bits, target.smallest_weight_bits) // 8) for s in network.incoming(population.name)
    )


def minimum_cores(network: IntegerNetwork, population: Population, target: Target) -> int | None:
    """Cores ``population`` needs at least, for its neurons or for its memory; None where there are no cores."""
    if target.core is None:
        return None
    memory = weight_bytes(network, population, target) + population.size * target.neuron_bytes
    return max(-(-population.size // target.core.neurons), -(-memory // target.core.memory_bytes))


def connections(network: IntegerNetwork, synapse: Synapse) -> int:
    """Pairs of neurons ``synapse`` connects, the convolution unfolded."""
    return int(fan_out(network, synapse).sum())


def fan_out(network: IntegerNetwork, synapse: Synapse) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Connections that leave each source neuron through ``synapse``, ``(neurons,)`` in C order."""
    shape = network.source_shape(synapse)
    _, channels = positions_and_channels(shape)
    return np.tile(edges(synapse, shape).fan_out * len(synapse.weight), channels)


def fan_in(network: IntegerNetwork, population: Population) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Connections that enter each neuron of ``population``, over all synapses, ``(neurons,)`` in C order."""
    positions, channels = positions_and_channels(population.shape)
    entering = np.zeros(positions, np.int64)
    for synapse in network.incoming(population.name):
        shape = network.source_shape(synapse)
        _, source_channels = positions_and_channels(shape)
        entering += np.bincount(edges(synapse, shape).target, minlength=positions) * source_channels
    return np.tile(entering, channels)


def count_activity(network: IntegerNetwork, trace: Trace) -> Activity:
    """Spikes and synaptic operations per image, averaged over the samples of a trace.

    Raises:
        SpikeguardError: if the trace has no samples or does not hold the spikes of every spiking population.
    """
    if trace.samples == 0:
        raise SpikeguardError("a trace without samples has no activity; run at least one image")
    spikes, operations = {}, {}
    for population in network.populations[:-1]:
        recorded = trace.populations.get(population.name)
        if recorded is None or recorded.spikes is None:
            raise SpikeguardError(
                f"the trace holds no spikes of population {population.name}; record traces, not only readouts"
            )
        expected = (trace.samples, network.steps, population.size)
        if recorded.spikes.shape != expected:
            raise SpikeguardError(
                f"the trace holds spikes of shape {recorded.spikes.shape} for population {population.name}, whose "
                f"spikes are {expected}; record it again with this network"
            )
        per_neuron = recorded.spikes.sum(axis=(0, 1)) / trace.samples
        spikes[population.name] = float(per_neuron.sum())
        for synapse in network.synapses:
            if synapse.source == population.name:
                operations[synapse.name] = float(per_neuron @ fan_out(network, synapse))
    return Activity(spikes, operations, network.steps)
