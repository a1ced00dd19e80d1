"""Which integers a population may have: what a target keeps of them, and the scales at which they are all of use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.network import InputSpec, IntegerNetwork, Population, Synapse
from hardware.targets.loihi2 import (
    LOIHI2,
    MAX_BIAS,
    MAX_DENSE_WEIGHT,
    MAX_WEIGHT_MANTISSA,
    MIN_DENSE_WEIGHT,
    MIN_WEIGHT_MANTISSA,
    check,
)
from pipeline.folding import RealPopulation, RealSynapse
from pipeline.number_formats import WIDE, WIDE_BITS, NumberFormat, target_format

Kind = Literal["conv", "dense"]
KINDS: tuple[Kind, ...] = ("conv", "dense")
BITS = range(2, 9)
FORMATS = [*(target_format(bits) for bits in BITS), WIDE]


def real_synapse(kind: Kind, largest: float, sign: float = 1.0) -> RealSynapse:
    """Four weights, one of which has the magnitude ``largest`` and all others less."""
    weight = largest * np.array([0.1, sign, 0.0, -0.3])
    return RealSynapse(kind, kind, weight.reshape((2, 2, 1, 1) if kind == "conv" else (2, 2)))


def real_population(synapses: list[RealSynapse], threshold: float | None = 1.0) -> RealPopulation:
    return RealPopulation("p", (2,), tuple(synapses), np.zeros(2), threshold)


magnitudes = st.floats(1e-6, 1e6)
kinds = st.sampled_from(KINDS)
synapses_of_a_population = st.lists(
    st.builds(real_synapse, kinds, magnitudes, st.sampled_from([1.0, -1.0])), min_size=1, max_size=4
)
formats = st.sampled_from(FORMATS)


@pytest.mark.parametrize("bits", [*BITS, WIDE_BITS])
def test_mantissas_are_those_of_twos_complement(bits: int) -> None:
    low, high = NumberFormat(bits, {}, None).mantissas
    assert (low, high) == (-(2**bits) // 2, 2**bits // 2 - 1)
    assert high - low + 1 == 2**bits


def deployed(kind: Kind, bits: int, exponent: int, mantissa: int) -> IntegerNetwork:
    """A readout with one such weight beside its negative, for mixed signs."""
    weight = np.array([mantissa << exponent, -(1 << exponent)], np.int32)
    shape = (1, 2, 1, 1) if kind == "conv" else (1, 2)
    source = (2, 1, 1) if kind == "conv" else (2,)
    target = (1, 1, 1) if kind == "conv" else (1,)
    readout = Population("out", target, 0, np.zeros(target, np.int64), 1.0, spiking=False)
    synapse = Synapse("input", "out", kind, weight.reshape(shape), bits, exponent)
    return IntegerNetwork(InputSpec(source, 1), (readout,), (synapse,), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_the_target_takes_every_weight_of_its_formats(bits: int, kind: Kind) -> None:
    numbers = target_format(bits)
    assert numbers.bits == bits
    assert numbers.max_bias == MAX_BIAS
    assert numbers.constant_channels == 1
    for exponent in numbers.exponents[kind]:
        for mantissa in numbers.mantissas:
            assert check(deployed(kind, bits, exponent, mantissa), LOIHI2) == []


@pytest.mark.parametrize("bits", BITS)
def test_fewer_bits_are_shifted_to_where_eight_would_be_and_no_further(bits: int) -> None:
    """The largest weight of each exponent range fills the target's own width, to the bits there are."""
    numbers = target_format(bits)
    low, high = numbers.mantissas
    dense, conv = numbers.exponents["dense"], numbers.exponents["conv"]
    assert (dense[0], conv[0]) == (1, 0)
    assert low << dense[-1] == MIN_DENSE_WEIGHT
    assert MAX_DENSE_WEIGHT - (high << dense[-1]) < 1 << dense[-1]
    assert low << conv[-1] == MIN_WEIGHT_MANTISSA << 7
    assert (MAX_WEIGHT_MANTISSA << 7) - (high << conv[-1]) < 1 << conv[-1]
    for beyond, mantissa in ((dense[0] - 1, 1), (dense[-1] + 1, low)):
        (row,) = check(deployed("dense", bits, beyond, mantissa), LOIHI2)
        assert row.rule == "dense weights are even and have 8 bits"


def test_wide_weights_fit_32_bits_and_no_bias_needs_a_channel() -> None:
    low, high = WIDE.mantissas
    for allowed in WIDE.exponents.values():
        assert allowed[0] == 0
        assert low << allowed[-1] >= np.iinfo(np.int32).min
        assert high << allowed[-1] <= np.iinfo(np.int32).max
    assert WIDE.max_bias is None


def largest(synapse: RealSynapse) -> float:
    return max(abs(float(value)) for value in synapse.weight.ravel())


def fitting(numbers: NumberFormat, synapse: RealSynapse, scale: float) -> Iterator[int]:
    """Exponents at which every weight is at most the largest mantissa, but for the rounding of the product."""
    for exponent in numbers.exponents[synapse.kind]:
        if largest(synapse) * scale <= numbers.mantissas[1] * 2**exponent * (1 + 1e-12):
            yield exponent


@given(formats, synapses_of_a_population, st.floats(-30, 30))
def test_exponents_are_the_smallest_that_fit_or_the_largest_there_are(
    numbers: NumberFormat, synapses: list[RealSynapse], magnitude: float
) -> None:
    scale = 2.0**magnitude
    found = numbers.exponents_at(real_population(synapses), scale)
    expected = [min(fitting(numbers, s, scale), default=max(numbers.exponents[s.kind])) for s in synapses]
    assert list(found) == expected


@given(formats, synapses_of_a_population)
def test_at_the_ceiling_everything_fits_and_beyond_it_nothing_is_gained(
    numbers: NumberFormat, synapses: list[RealSynapse]
) -> None:
    real = real_population(synapses)
    ceiling = numbers.ceiling(real)

    def is_of_use(scale: float) -> bool:
        """All weights fit, one of them at the smallest exponent of its kind."""
        fits = [list(fitting(numbers, synapse, scale)) for synapse in synapses]
        smallest = [numbers.exponents[s.kind][0] in exponents for s, exponents in zip(synapses, fits, strict=True)]
        return all(fits) and any(smallest)

    assert is_of_use(ceiling)
    assert not is_of_use(ceiling * (1 + 1e-9))
    exponents = numbers.exponents_at(real, ceiling)
    assert any(e == numbers.exponents[s.kind][0] for s, e in zip(synapses, exponents, strict=True))


@given(formats, kinds, magnitudes)
def test_one_synapse_uses_all_its_bits_at_the_ceiling(numbers: NumberFormat, kind: Kind, magnitude: float) -> None:
    synapse = real_synapse(kind, magnitude)
    ceiling = numbers.ceiling(real_population([synapse]))
    (exponent,) = numbers.exponents_at(real_population([synapse]), ceiling)
    assert exponent == numbers.exponents[kind][0]
    assert np.rint(largest(synapse) * ceiling / 2**exponent) == numbers.mantissas[1]


@given(formats, synapses_of_a_population, st.integers(-20, 20))
def test_the_ceiling_follows_the_weights(numbers: NumberFormat, synapses: list[RealSynapse], power: int) -> None:
    """A population is the same at any unit; a power of two changes no float by a rounding."""
    scaled = [synapse.scaled(np.array([2.0**power])) for synapse in synapses]
    real, other = real_population(synapses), real_population(scaled)
    assert numbers.ceiling(other) == numbers.ceiling(real) / 2.0**power
    assert numbers.exponents_at(other, numbers.ceiling(other)) == numbers.exponents_at(real, numbers.ceiling(real))


@given(formats, synapses_of_a_population, kinds)
def test_a_synapse_without_weights_has_no_say(numbers: NumberFormat, synapses: list[RealSynapse], kind: Kind) -> None:
    silent = real_synapse(kind, 0.0)
    assert numbers.ceiling(real_population([silent, *synapses])) == numbers.ceiling(real_population(synapses))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numbers", FORMATS, ids=lambda numbers: str(numbers.bits))
def test_without_any_weight_the_threshold_counts_as_one(numbers: NumberFormat, kind: Kind) -> None:
    silent = real_synapse(kind, 0.0)
    for threshold in (0.25, 3.0, None):
        real = real_population([silent], threshold)
        assert numbers.ceiling(real) == numbers.ceiling(real_population([real_synapse(kind, threshold or 1.0)]))
        assert numbers.exponents_at(real, numbers.ceiling(real)) == (numbers.exponents[kind][0],)
