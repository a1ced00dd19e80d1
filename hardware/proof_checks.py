"""The proofs of :mod:`hardware.bounds`, held against the values of a run.

A proof that is wrong would let a chip wrap or a narrow type overflow without a word, so the emulator's strict mode
shows every value it computes to these checks. They are plain numpy in 64 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.bounds import (
    Bounds,
    current_bounds,
    membrane_bounds,
    prove,
    readout_bounds,
    synaptic_bounds,
    synaptic_magnitudes,
)
from hardware.errors import RuleViolations, Violation
from hardware.network import FRACTION_BITS, IntegerNetwork, Population
from hardware.reference import decay

Array = NDArray[Any]
Int64Array = NDArray[np.int64]
REMEDY = "do not deploy this network: hardware/bounds.py is wrong about it; please report it with the network"


class ProofChecks:
    """Looks at the values of a run, block by block, and notes every proof that one of them contradicts.

    Args:
        network: what runs.

    Attributes:
        saturations: membranes that were clipped so far, by population.
    """

    def __init__(self, network: IntegerNetwork) -> None:
        self.network = network
        self.saturations = {population.name: 0 for population in network.populations}
        self._proven = {row.population: row for row in prove(network)}
        self._sums, self._magnitudes = synaptic_bounds(network), synaptic_magnitudes(network)
        self._currents, self._membranes = current_bounds(network), membrane_bounds(network)
        self._readouts = readout_bounds(network)
        self._contradicted: dict[tuple[str, str], Violation] = {}

    def look(self, name: str, sums: Array, spikes: Array, membranes: Array, clipped: int) -> None:
        """Hold the values of a population in a block against what is proven of it.

        Args:
            name: of the population.
            sums: one step's synaptic sums, in weight units; like the others ``(samples, steps, neurons)`` in C order.
            spikes: what fired; all False of a readout.
            membranes: after reset, in state units.
            clipped: how many membranes were.
        """
        population, proven = self.network.by_name[name], self._proven[name]
        self.saturations[name] += clipped
        magnitude = self._magnitudes[name]
        self._within(name, "sum of one step is within its bounds", sums, self._sums[name])
        self._within(name, "sum of one step is within its magnitude", sums, Bounds(-magnitude, magnitude))
        self._within(name, "membrane is within its bounds", membranes, self._membranes[name])
        if clipped and not proven.can_saturate:
            self._contradict(name, "membrane is not clipped", f"{clipped} clipped", "0")
        currents, unlimited = _unlimited(population, sums.astype(np.int64))
        self._within(name, "current is within its bounds", currents, self._currents[name])
        if proven.saturation_is_harmless and population.spiking and (unlimited != spikes).any():
            wrong = int((unlimited != spikes).sum())
            self._contradict(name, "clipping changes no spike", f"{wrong} changed", "0")

    def look_at_readouts(self, readouts: Int64Array) -> None:
        """Hold the readouts ``(samples, classes)`` of a block against their bounds."""
        name = self.network.readout.name
        self._within(name, "readout is within its bounds", readouts, self._readouts)

    def require_held(self) -> None:
        """Refuse what was seen if it contradicts a proof.

        Raises:
            RuleViolations: one row for every proof that a value contradicted.
        """
        if self._contradicted:
            raise RuleViolations("proofs of the integer network", list(self._contradicted.values()))

    def _within(self, name: str, rule: str, values: Array, bounds: Bounds) -> None:
        lower, upper = bounds.lower.reshape(-1), bounds.upper.reshape(-1)
        outside = (values < lower) | (values > upper)
        if outside.any():
            at = tuple(np.argwhere(outside)[0])
            neuron = at[-1]
            actual = f"{int(outside.sum())} outside, the first {values[at]} at neuron {neuron}"
            self._contradict(name, rule, actual, f"{lower[neuron]}..{upper[neuron]}")

    def _contradict(self, name: str, rule: str, actual: str, limit: str) -> None:
        """Note the first contradiction of each proof."""
        self._contradicted.setdefault((name, rule), Violation(name, rule, actual, limit, REMEDY))


def _unlimited(population: Population, sums: Int64Array) -> tuple[Int64Array, NDArray[np.bool_]]:
    """Currents and spikes ``(samples, steps, neurons)`` of membranes that are never clipped."""
    currents, spikes = np.empty_like(sums), np.zeros(sums.shape, np.bool_)
    u = v = np.zeros_like(sums[:, 0])
    bias, threshold = population.bias.reshape(-1) << FRACTION_BITS, population.threshold << FRACTION_BITS
    for step in range(sums.shape[1]):
        u = decay(u, population.current_decay) + (sums[:, step] << FRACTION_BITS)
        v = decay(v, population.voltage_decay) + u + bias
        currents[:, step] = u
        if population.spiking:
            spikes[:, step] = v > threshold
            v = np.where(spikes[:, step], 0 if population.reset == "zero" else v - threshold, v)
    return currents, spikes
