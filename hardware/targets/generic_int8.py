"""An ordinary integer machine: 8-bit weights, 32-bit accumulators and states, one memory.

No chip in particular: what a CPU, a GPU or a microcontroller with 8-bit multiply-accumulate instructions computes
exactly. Input codes have eight bits and spikes one, by the meaning of the network, so activations need no rule.
States carry six fractional bits as everywhere (``hardware/network.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hardware.bounds import current_bounds, membrane_bounds, readout_bounds, synaptic_magnitudes
from hardware.network import DECAY_UNITY, FRACTION_BITS, STATE_LIMIT, IntegerNetwork
from hardware.targets.rules import Breach, Target

WEIGHT_BITS = 8
MIN_WEIGHT_MANTISSA, MAX_WEIGHT_MANTISSA = -(2 ** (WEIGHT_BITS - 1)), 2 ** (WEIGHT_BITS - 1) - 1
MAX_INT32 = 2**31 - 1
NEURON_BYTES = 3 * 4 + 1
"""Current, membrane and bias of 32 bits each, and a byte for the spike."""


def weight_mantissas_fit_8_bits(network: IntegerNetwork) -> Iterator[Breach]:
    """Weights are 8-bit mantissas that share one exponent per synapse."""
    for s in network.synapses:
        low, high = int(s.weight.min()) >> s.exponent, int(s.weight.max()) >> s.exponent
        if low < MIN_WEIGHT_MANTISSA or high > MAX_WEIGHT_MANTISSA:
            limit = f"{MIN_WEIGHT_MANTISSA}..{MAX_WEIGHT_MANTISSA} times 2**{s.exponent}"
            yield Breach(s.name, f"{low}..{high}", limit, f"quantise to {WEIGHT_BITS} bits or fewer")


def synaptic_sums_fit_32_bits(network: IntegerNetwork) -> Iterator[Breach]:
    """No partial sum of a step, in any order of summation, overflows its accumulator; proven for every input."""
    for name, magnitudes in synaptic_magnitudes(network).items():
        largest = int(magnitudes.max())
        if largest > MAX_INT32:
            remedy = "lower the population's scale, or use fewer bits"
            yield Breach(name, f"partial sums up to {largest}", f"at most {MAX_INT32}", remedy)


def states_fit_32_bits(network: IntegerNetwork) -> Iterator[Breach]:
    """A membrane, its current and its bias are added before the membrane is clipped; proven for every input."""
    currents = current_bounds(network)
    for p in network.populations:
        bounds = currents[p.name]
        current = np.maximum(np.abs(bounds.lower), np.abs(bounds.upper))
        largest = STATE_LIMIT + int((current + (np.abs(p.bias) << FRACTION_BITS)).max())
        if largest > MAX_INT32:
            remedy = "lower the population's scale"
            yield Breach(p.name, f"state up to {largest}", f"at most {MAX_INT32}", remedy)


def thresholds_fit_32_bits(network: IntegerNetwork) -> Iterator[Breach]:
    """Thresholds are compared with membranes, so they carry the same fractional bits."""
    for p in network.populations:
        if p.spiking and p.threshold << FRACTION_BITS > MAX_INT32:
            limit = f"0..{MAX_INT32 >> FRACTION_BITS}"
            yield Breach(p.name, str(p.threshold), limit, "lower the population's scale")


def decay_products_fit_32_bits(network: IntegerNetwork) -> Iterator[Breach]:
    """A decaying state is multiplied by its 12-bit share before the division by 4096; proven for every input."""
    currents, membranes = current_bounds(network), membrane_bounds(network)
    for p in network.populations:
        for state, bounds, lost in (
            ("current", currents[p.name], p.current_decay),
            ("membrane", membranes[p.name], p.voltage_decay),
        ):
            low, high = bounds.range
            largest = max(-low, high) * (DECAY_UNITY - lost)
            if 0 < lost < DECAY_UNITY and largest > MAX_INT32:
                remedy = "lower the population's scale, or use neurons that do not leak"
                yield Breach(p.name, f"{state} times share up to {largest}", f"at most {MAX_INT32}", remedy)


def readout_sums_fit_32_bits(network: IntegerNetwork) -> Iterator[Breach]:
    """The answer is an integer sum over all steps; proven for every input."""
    low, high = readout_bounds(network).range
    if max(-low, high) > MAX_INT32:
        remedy = "lower the readout's scale, or run fewer steps"
        yield Breach(network.readout.name, f"{low}..{high}", f"-{MAX_INT32}..{MAX_INT32}", remedy)


GENERIC_INT8 = Target(
    "generic-int8",
    (
        weight_mantissas_fit_8_bits,
        synaptic_sums_fit_32_bits,
        states_fit_32_bits,
        thresholds_fit_32_bits,
        decay_products_fit_32_bits,
        readout_sums_fit_32_bits,
    ),
    neuron_bytes=NEURON_BYTES,
    smallest_weight_bits=WEIGHT_BITS,
    core=None,
)
