"""Lava's simulator: what its stock processes, and lava-dl's netx loader, cannot do exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hardware.network import IntegerNetwork, Synapse
from hardware.targets.loihi2 import (
    CORE,
    MAX_DENSE_WEIGHT,
    MIN_DENSE_WEIGHT,
    NEURON_BYTES,
    biases_fit_13_bits,
    decays_fit_12_bits,
    membranes_reset_to_zero,
    synaptic_sums_cannot_wrap,
    thresholds_fit_17_bits,
)
from hardware.targets.rules import Breach, Target

# A dense matrix of one sign has eight bits of magnitude; a mixed one a sign and seven bits that count in twos.
DENSE_ONE_SIGN_LIMIT = 255
WEIGHT_EXPONENTS = range(-8, 8)


def populations_form_a_chain(network: IntegerNetwork) -> Iterator[Breach]:
    """The loader's file is a list of layers, each of which reads the one before it."""
    if not network.is_chain():
        pairs = ", ".join(synapse.name for synapse in network.synapses)
        limit = "each population reads the one before it"
        yield Breach("network", pairs, limit, "use the Lava processes instead of netx, or export NIR")


def dense_weights_are_8_bit_mantissas_with_one_exponent(network: IntegerNetwork) -> Iterator[Breach]:
    """Dense clips and truncates what it cannot hold."""
    for synapse in _dense(network):
        if dense_weight_exponent(synapse.weight) is None:
            actual = f"{synapse.weight.min()}..{synapse.weight.max()}"
            yield Breach(synapse.name, actual, "-128..127 times a power of two up to 2**8", "quantise to 8 bits")


def netx_keeps_dense_weights(network: IntegerNetwork) -> Iterator[Breach]:
    """The loader has no weight exponent, and corrupts matrices without a positive weight."""
    for synapse in _dense(network):
        smallest, largest = int(synapse.weight.min()), int(synapse.weight.max())
        high = MAX_DENSE_WEIGHT if smallest < 0 else DENSE_ONE_SIGN_LIMIT
        if largest <= 0:
            remedy = "use the Lava processes instead of netx"
            yield Breach(synapse.name, f"{smallest}..{largest}", "a positive weight", remedy)
        elif smallest < MIN_DENSE_WEIGHT or largest > high:
            limit = f"{MIN_DENSE_WEIGHT}..{MAX_DENSE_WEIGHT}, or 0..{DENSE_ONE_SIGN_LIMIT}"
            remedy = "quantise at a smaller scale, or use the Lava processes instead of netx"
            yield Breach(synapse.name, f"{smallest}..{largest}", limit, remedy)


# Both simulate the chip, so a network is placed as it would be there.
LAVA = Target(
    "lava",
    (
        membranes_reset_to_zero,
        thresholds_fit_17_bits,
        biases_fit_13_bits,
        decays_fit_12_bits,
        synaptic_sums_cannot_wrap,
        dense_weights_are_8_bit_mantissas_with_one_exponent,
    ),
    neuron_bytes=NEURON_BYTES,
    smallest_weight_bits=1,
    core=CORE,
)
NETX = replace(LAVA, name="netx", rules=(populations_form_a_chain, *LAVA.rules, netx_keeps_dense_weights))


def dense_weight_exponent(weight: NDArray[np.int32]) -> int | None:
    """The exponent e nearest to 0 for which Lava's Dense holds weight / 2**e exactly, None if there is none.

    Dense keeps 8-bit magnitudes of matrices of one sign, and even numbers in -256..254 of mixed ones.
    """
    values = weight.astype(np.int64)
    mixed = values.min() < 0 < values.max()
    one_sign = (-DENSE_ONE_SIGN_LIMIT, DENSE_ONE_SIGN_LIMIT)
    low, high = (MIN_DENSE_WEIGHT, MAX_DENSE_WEIGHT) if mixed else one_sign
    grid = 2 if mixed else 1
    for exponent in sorted(WEIGHT_EXPONENTS, key=abs):
        mantissas = values << -exponent if exponent < 0 else values >> exponent
        exact = exponent < 0 or np.array_equal(mantissas << exponent, values)
        if exact and mantissas.min() >= low and mantissas.max() <= high and not np.any(mantissas % grid):
            return exponent
    return None


def _dense(network: IntegerNetwork) -> Iterator[Synapse]:
    return (synapse for synapse in network.synapses if synapse.kind == "dense")
