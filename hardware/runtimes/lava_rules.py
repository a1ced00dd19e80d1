"""What stock Lava, and lava-dl's netx loader, cannot do exactly: one function per rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from hardware.errors import RuleViolations, Violation
from hardware.network import DECAY_UNITY, IntegerNetwork, Synapse

MAX_VTH_MANTISSA = 2**17 - 1
MAX_BIAS_MANTISSA = 4095
MAX_VOLTAGE_DECAY = DECAY_UNITY - 1
MIN_CURRENT_DECAY = 1
# Weight memory of one dense synapse: eight bits of magnitude, or a sign and seven bits that count in twos.
DENSE_MIXED_RANGE = (-256, 254)
DENSE_ONE_SIGN_LIMIT = 255
WEIGHT_EXPONENTS = range(-8, 8)

Rule = Callable[[IntegerNetwork], Iterator[Violation]]


def is_a_chain(network: IntegerNetwork) -> Iterator[Violation]:
    """Branches would arrive at different steps: each layer delays by one."""
    if not network.is_chain():
        pairs = ", ".join(synapse.name for synapse in network.synapses)
        yield Violation(
            "network",
            "is a chain of populations",
            pairs,
            "each population reads the one before it",
            "run it on the emulator or export NIR",
        )


def resets_to_zero(network: IntegerNetwork) -> Iterator[Violation]:
    """Lava's LIF has no other reset."""
    for population in network.populations:
        if population.spiking and population.reset != "zero":
            yield Violation(
                population.name, "resets to zero", population.reset, "zero", "train with reset to zero"
            )


def threshold_fits_17_bits(network: IntegerNetwork) -> Iterator[Violation]:
    """Declared width of vth."""
    for population in network.populations:
        if population.spiking and not 0 <= population.threshold <= MAX_VTH_MANTISSA:
            yield Violation(
                population.name,
                "threshold fits 17 bits",
                str(population.threshold),
                f"0..{MAX_VTH_MANTISSA}",
                "quantise at a smaller scale",
            )


def bias_fits_13_bits(network: IntegerNetwork) -> Iterator[Violation]:
    """Declared width of bias_mant, symmetric; larger ones wrap in the simulator at 16 bits."""
    for population in network.populations:
        largest = int(np.abs(population.bias).max(initial=0))
        if largest > MAX_BIAS_MANTISSA:
            yield Violation(
                population.name,
                "bias fits 13 bits",
                f"+-{largest}",
                f"+-{MAX_BIAS_MANTISSA}",
                "quantise at a smaller scale, or carry the bias in a constant input channel",
            )


def decays_fit_12_bits(network: IntegerNetwork) -> Iterator[Violation]:
    """Lava's du is one less than the share of current lost; dv is the share of voltage lost."""
    for population in network.populations:
        current, voltage = population.current_decay, population.voltage_decay
        if not (MIN_CURRENT_DECAY <= current <= DECAY_UNITY and 0 <= voltage <= MAX_VOLTAGE_DECAY):
            yield Violation(
                population.name,
                "decays fit 12 bits",
                f"current {current}, voltage {voltage}",
                f"current {MIN_CURRENT_DECAY}..{DECAY_UNITY}, voltage 0..{MAX_VOLTAGE_DECAY}",
                "requantise the decays",
            )


def readout_only_integrates(network: IntegerNetwork) -> Iterator[Violation]:
    """The sum over steps is read from the membrane, which therefore must not leak."""
    if network.readout.is_leaky:
        yield Violation(
            network.readout.name,
            "readout only integrates",
            f"decays {network.readout.current_decay}, {network.readout.voltage_decay}",
            f"decays {DECAY_UNITY}, 0",
            "read out through neurons that do not leak",
        )


def dense_weights_fit_the_synapse(network: IntegerNetwork) -> Iterator[Violation]:
    """Dense clips and truncates what it cannot hold."""
    for synapse in _dense(network):
        if dense_weight_exponent(synapse.weight) is None:
            yield Violation(
                synapse.name,
                "dense weights are 8-bit mantissas with one exponent",
                f"{synapse.weight.min()}..{synapse.weight.max()}",
                "-128..127 times a power of two up to 2**8",
                "quantise to 8 bits",
            )


def netx_keeps_dense_weights(network: IntegerNetwork) -> Iterator[Violation]:
    """netx has no weight exponent, and corrupts matrices without a positive weight."""
    low, high = DENSE_MIXED_RANGE
    for synapse in _dense(network):
        smallest, largest = int(synapse.weight.min()), int(synapse.weight.max())
        if largest <= 0:
            yield Violation(
                synapse.name,
                "netx keeps dense weights only where one is positive",
                f"{smallest}..{largest}",
                "a positive weight",
                "use the Lava processes instead of netx",
            )
        elif smallest < low or largest > (high if smallest < 0 else DENSE_ONE_SIGN_LIMIT):
            yield Violation(
                synapse.name,
                "netx dense weights fit without an exponent",
                f"{smallest}..{largest}",
                f"{low}..{high}, or 0..{DENSE_ONE_SIGN_LIMIT}",
                "quantise at a smaller scale, or use the Lava processes instead of netx",
            )


LAVA_RULES: tuple[Rule, ...] = (
    is_a_chain,
    resets_to_zero,
    threshold_fits_17_bits,
    bias_fits_13_bits,
    decays_fit_12_bits,
    readout_only_integrates,
    dense_weights_fit_the_synapse,
)
NETX_RULES: tuple[Rule, ...] = (*LAVA_RULES, netx_keeps_dense_weights)


def require(network: IntegerNetwork, rules: tuple[Rule, ...], subject: str) -> None:
    """Refuse a network that breaks any rule.

    Raises:
        RuleViolations: with every violation of every rule.
    """
    violations = [violation for rule in rules for violation in rule(network)]
    if violations:
        raise RuleViolations(subject, violations)


def dense_weight_exponent(weight: NDArray[np.int32]) -> int | None:
    """The exponent e nearest to 0 for which Lava's Dense holds weight / 2**e exactly, None if there is none.

    Dense keeps 8-bit magnitudes of matrices of one sign, and even numbers in -256..254 of mixed ones.
    """
    values = weight.astype(np.int64)
    mixed = values.min() < 0 < values.max()
    low, high = DENSE_MIXED_RANGE if mixed else (-DENSE_ONE_SIGN_LIMIT, DENSE_ONE_SIGN_LIMIT)
    grid = 2 if mixed else 1
    for exponent in sorted(WEIGHT_EXPONENTS, key=abs):
        mantissas = values << -exponent if exponent < 0 else values >> exponent
        exact = exponent < 0 or np.array_equal(mantissas << exponent, values)
        if exact and mantissas.min() >= low and mantissas.max() <= high and not np.any(mantissas % grid):
            return exponent
    return None


def _dense(network: IntegerNetwork) -> Iterator[Synapse]:
    return (synapse for synapse in network.synapses if synapse.kind == "dense")
