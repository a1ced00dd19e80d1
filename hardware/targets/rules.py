"""What all targets share: rules that say what is broken, where a network would lie, and how much it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.geometry import edges, positions_and_channels
from hardware.network import IntegerNetwork, Synapse
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
class Target:
    """Something a network can be deployed to.

    Attributes:
        name: as the command line calls it.
        rules: all that must hold there.
        neurons_per_core: how many neurons one core can hold.
    """

    name: str
    rules: tuple[Rule, ...]
    neurons_per_core: int


@dataclass(frozen=True)
class PopulationPlacement:
    """What one population takes.

    Attributes:
        neurons: how many.
        connections: entering it, every convolution unfolded; padding connects nothing.
        weight_bytes: of the entering kernels and matrices, each stored once, at their bit-width.
        minimum_cores: the neurons alone need; synaptic memory can need more.
    """

    population: str
    neurons: int
    connections: int
    weight_bytes: int
    minimum_cores: int


@dataclass(frozen=True)
class Placement:
    """Where a network would lie on a target: totals over :class:`PopulationPlacement` rows."""

    target: str
    populations: tuple[PopulationPlacement, ...]

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
    def minimum_cores(self) -> int:
        """Cores needed when no two populations share one."""
        return sum(p.minimum_cores for p in self.populations)


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
    rows = []
    for population in network.populations:
        entering = network.incoming(population.name)
        rows.append(
            PopulationPlacement(
                population=population.name,
                neurons=population.size,
                connections=sum(connections(network, s) for s in entering),
                weight_bytes=sum(-(-s.weight.size * s.bits // 8) for s in entering),
                minimum_cores=-(-population.size // target.neurons_per_core),
            )
        )
    return Placement(target.name, tuple(rows))


def connections(network: IntegerNetwork, synapse: Synapse) -> int:
    """Pairs of neurons ``synapse`` connects, the convolution unfolded."""
    return int(fan_out(network, synapse).sum())


def fan_out(network: IntegerNetwork, synapse: Synapse) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Connections that leave each source neuron through ``synapse``, ``(neurons,)`` in C order."""
    shape = network.source_shape(synapse)
    _, channels = positions_and_channels(shape)
    return np.tile(edges(synapse, shape).fan_out * len(synapse.weight), channels)


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
        per_neuron = recorded.spikes.sum(axis=(0, 1)) / trace.samples
        spikes[population.name] = float(per_neuron.sum())
        for synapse in network.synapses:
            if synapse.source == population.name:
                operations[synapse.name] = float(per_neuron @ fan_out(network, synapse))
    return Activity(spikes, operations, network.steps)
