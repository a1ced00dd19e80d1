"""A population as integers at a scale: every number is the nearest there is, and the comparison means the same."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardware.errors import RuleViolations
from hardware.network import INPUT, InputSpec, IntegerNetwork, Population, Synapse
from hardware.reference import run_reference
from pipeline.constant_channels import split_constant
from pipeline.folding import RealPopulation, RealSynapse, fold
from pipeline.integer_recipe import (
    MAX_WHOLE,
    Grid,
    assemble,
    lies_on_the_grid,
    require_roundable,
    round_population,
    rounding_order,
    threshold_mantissa,
)
from pipeline.models.spiking import SpikingNetwork
from pipeline.number_formats import WIDE, target_format
from pipeline.rounding import InputStatistics
from tests.pipeline.random_networks import spiking_networks
from tests.pipeline.samples import NETWORKS, spiking_network

Float64Array = NDArray[np.float64]
seeds = st.integers(0, 2**32 - 1)
bit_widths = st.integers(2, 8)
exponents = st.integers(0, 4)


def two_synapses(seed: int) -> RealPopulation:
    """A conv and an identity of other spikes."""
    rng = np.random.default_rng(seed)
    synapses = (
        RealSynapse("x", "conv", rng.normal(size=(3, 2, 3, 3)), None, 1, 1),
        RealSynapse("y", "conv", 3 * rng.normal(size=(3, 3, 1, 1))),
    )
    return RealPopulation("p", (3, 4, 5), synapses, rng.normal(size=3), 0.8)


def nearest(weight: Float64Array, scale: float, bits: int, exponent: int) -> Float64Array:
    """Mantissa by mantissa, clipped."""
    mantissas = [round(float(w) * scale / 2**exponent) for w in weight.ravel()]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return np.array([min(max(m, low), high) * 2**exponent for m in mantissas]).reshape(weight.shape)


@given(seeds, bit_widths, exponents, exponents, st.floats(0.5, 300))
def test_weights_are_the_nearest_multiples_within_their_bits(
    seed: int, bits: int, first: int, second: int, scale: float
) -> None:
    real = two_synapses(seed)
    rounded = round_population(real, Grid(scale, target_format(bits), (first, second)), (1, 4, 5))
    for synapse, integer, exponent in zip(real.synapses, rounded.synapses, (first, second), strict=True):
        assert np.array_equal(integer.weight, nearest(synapse.weight, scale, bits, exponent))
        assert integer.weight.dtype == np.int32
        assert (integer.source, integer.target, integer.kind) == (synapse.source, "p", "conv")
        assert (integer.stride, integer.padding) == (synapse.stride, synapse.padding)
        assert (integer.bits, integer.exponent) == (bits, exponent)
    assert rounded.constant is None
    assert rounded.constant_codes == ()
    assert not rounded.mean_error.any()
    assert rounded.population.scale == scale
    assert rounded.population.bias.shape == real.shape
    assert rounded.population.bias.dtype == np.int64
    whole = np.rint(real.bias * scale)
    assert (rounded.population.bias == whole[:, None, None]).all()
    assert np.array_equal(rounded.bias_error, whole - real.bias * scale)


@given(seeds, exponents, exponents)
def test_statistics_meet_their_own_inputs_whatever_the_order(seed: int, first: int, second: int) -> None:
    """The coarser synapse is rounded first; independent inputs leave nothing to compensate but the mean."""
    real = two_synapses(seed)
    grid = Grid(40.0, target_format(8), (first, second))
    means = {"x": np.linspace(0, 1, 18), "y": np.linspace(2, 3, 3)}
    order = ["y", "x"] if second > first else ["x", "y"]
    statistics = InputStatistics(np.concatenate([means[name] for name in order]), (np.eye(21),))
    rounded = round_population(real, grid, (1, 4, 5), statistics)
    plain = round_population(real, grid, (1, 4, 5))
    assert all(np.array_equal(a.weight, b.weight) for a, b in zip(rounded.synapses, plain.synapses, strict=True))
    expected = np.zeros(3)
    for synapse, integer in zip(real.synapses, rounded.synapses, strict=True):
        expected += (integer.weight - 40.0 * synapse.weight).reshape(3, -1) @ means[synapse.source]
    assert rounded.mean_error == pytest.approx(expected, abs=1e-9)
    bias = real.bias * 40.0 - rounded.mean_error
    assert np.array_equal(rounded.population.bias[:, 0, 0], np.rint(bias))
    assert np.array_equal(rounded.bias_error, np.rint(bias) - bias)


@given(seeds, exponents, exponents)
def test_the_finer_synapse_makes_up_for_the_coarser(seed: int, coarse: int, fine: int) -> None:
    """Two inputs that always fire together: their sum is wrong by no more than half the finer step."""
    assume(coarse > fine)
    rng = np.random.default_rng(seed)
    weights = rng.uniform(-20, 20, (2, 4, 1))
    synapses = tuple(RealSynapse(name, "dense", weight) for name, weight in zip("xy", weights, strict=True))
    real = RealPopulation("p", (4,), synapses, np.zeros(4), 1.0)
    together = np.linalg.cholesky(np.linalg.inv(np.ones((2, 2)) + 1e-9 * np.eye(2))).T
    statistics = InputStatistics(np.zeros(2), (together,))
    for pair in ((coarse, fine), (fine, coarse)):
        rounded = round_population(real, Grid(1.0, target_format(8), pair), (1,), statistics)
        error = sum(s.weight for s in rounded.synapses) - weights.sum(0)
        assert np.abs(error).max() <= 2**fine / 2 + 1e-6


@given(st.lists(st.integers(0, 7), max_size=6))
def test_coarser_synapses_are_rounded_first_and_equal_ones_as_they_come(given_exponents: list[int]) -> None:
    order = rounding_order(given_exponents)
    assert sorted(order) == list(range(len(given_exponents)))
    keys = [(-given_exponents[i], i) for i in order]
    assert keys == sorted(keys)


@given(seeds, st.floats(1, 50), exponents)
def test_what_reads_pixels_gets_its_constant_channels_last(seed: int, scale: float, exponent: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = RealSynapse(INPUT, "conv", rng.normal(size=(3, 2, 3, 3)), rng.normal(size=(3, 3, 3)), 1, 1)
    other = RealSynapse("x", "conv", rng.normal(size=(3, 1, 1, 1)))
    real = RealPopulation("p", (3, 6, 6), (other, pixels), rng.normal(size=3), 0.5)
    rounded = round_population(real, Grid(scale, target_format(8), (0, exponent)), (2, 6, 6))
    expected = split_constant(pixels, scale, 2**exponent, target_format(8), real.bias * scale, (2, 6, 6))
    assert rounded.constant is not None
    assert rounded.constant_codes == expected.codes
    assert np.array_equal(rounded.synapses[1].weight[:, 2:], expected.kernel)
    assert np.array_equal(rounded.synapses[1].weight[:, :2], nearest(pixels.weight, scale, 8, exponent))
    assert rounded.synapses[0].weight.shape == other.weight.shape
    assert np.array_equal(rounded.population.bias[:, 3, 3], np.rint(expected.bias))
    shared = round_population(real, Grid(scale, target_format(8), (0, exponent), (200,)), (2, 6, 6))
    assert shared.constant_codes == (200,)


def neuron(threshold: float | None, beta: float = 1.0, subtract: bool = False) -> RealPopulation:
    synapse = RealSynapse(INPUT, "dense", np.ones((1, 1)))
    return RealPopulation("p", (1,), (synapse,), np.zeros(1), threshold, beta, subtract)


@given(st.floats(0.03, 50), st.floats(0.5, 1000))
def test_on_the_grid_above_the_mantissa_is_at_the_nearest_threshold_or_beyond(threshold: float, scale: float) -> None:
    real = neuron(threshold)
    assert lies_on_the_grid(real)
    mantissa, nearest_threshold = threshold_mantissa(real, scale), round(threshold * scale)
    assert mantissa >= 0
    for u in range(max(nearest_threshold - 3, 1), nearest_threshold + 4):
        assert (u > mantissa) == (u >= nearest_threshold)


@given(st.floats(0.03, 50), st.floats(0.01, 1000), st.sampled_from([(0.9, False), (1.0, True), (0.9, True)]))
def test_off_the_grid_the_mantissa_is_the_nearest_and_never_nothing_to_subtract(
    threshold: float, scale: float, kind: tuple[float, bool]
) -> None:
    real = neuron(threshold, *kind)
    assert not lies_on_the_grid(real)
    mantissa = threshold_mantissa(real, scale)
    assert mantissa == round(threshold * scale) or (real.subtract and mantissa == 1)
    assert mantissa >= real.subtract


@given(st.floats(0, 1), st.booleans(), st.floats(0.05, 5))
def test_neurons_keep_their_reset_and_the_nearest_leak(beta: float, subtract: bool, threshold: float) -> None:
    real = neuron(threshold, beta, subtract)
    population = round_population(real, Grid(100.0, target_format(8), (1,)), (1,)).population
    assert abs(population.voltage_decay / 4096 - (1 - beta)) <= 1 / 8192
    assert population.reset == ("subtract" if subtract else "zero")
    assert population.spiking
    assert population.threshold == threshold_mantissa(real, 100.0)


def test_a_readout_has_no_threshold() -> None:
    population = round_population(neuron(None), Grid(100.0, target_format(8), (1,)), (1,)).population
    assert (population.spiking, population.threshold, population.voltage_decay) == (False, 0, 0)


@given(seeds, st.integers(1, 12), st.floats(0, 1))
def test_a_leak_is_wrong_by_no_more_than_it_is_said_to_be(seed: int, steps: int, beta: float) -> None:
    """By its 12 bits at most T / 8192 of all that entered; by truncation 1 / (64 (1 - beta)), or T / 64 units."""
    rng = np.random.default_rng(seed)
    real = neuron(1e9, beta)
    population = round_population(real, Grid(1.0, target_format(8), (1,)), (1,)).population
    silent = replace(population, threshold=2**40)
    codes = rng.integers(0, 256, (1, steps, 1))
    out = Population("out", (1,), 0, np.zeros(1, np.int64), 1.0, spiking=False)
    synapses = [Synapse(INPUT, "p", "dense", np.array([[2]], np.int32), 8, 1)]
    synapses.append(Synapse("p", "out", "dense", np.array([[2]], np.int32), 8, 1))
    network = IntegerNetwork(InputSpec((1,)), (silent, out), tuple(synapses), steps)
    membranes = run_reference(network, codes).populations["p"].membranes
    assert membranes is not None
    exact, kept, entered = Fraction(0), Fraction(0), 0
    for t in range(steps):
        exact = exact * Fraction(beta) + 2 * int(codes[0, t, 0])
        kept = kept * Fraction(4096 - population.voltage_decay, 4096) + 2 * int(codes[0, t, 0])
        entered += 2 * int(codes[0, t, 0])
        found = Fraction(int(membranes[0, t, 0]), 64)
        lost = 1 - Fraction(4096 - population.voltage_decay, 4096)
        assert abs(found - kept) <= Fraction(1, 64) * min(Fraction(t + 1), 1 / lost if lost else t + 1)
        assert abs(kept - exact) <= Fraction(t + 1, 8192) * entered


@pytest.mark.parametrize("bias", [1e20, -1e20, 1e300])
def test_a_bias_beyond_all_integers_does_not_wrap(bias: float) -> None:
    real = replace(neuron(1.0), synapses=(RealSynapse("x", "dense", np.ones((1, 1))),), bias=np.array([bias]))
    rounded = round_population(real, Grid(100.0, target_format(8), (1,)), (1,))
    assert rounded.population.bias.tolist() == [MAX_WHOLE if bias > 0 else -MAX_WHOLE]
    assert rounded.bias_error == pytest.approx(-bias * 100.0)


@given(spiking_networks(), bit_widths)
def test_rounded_populations_are_the_integer_network_of_any_graph(network: SpikingNetwork, bits: int) -> None:
    """Names, shapes, order and synapses are those of the folded network; each neuron has its channel's bias."""
    shape, populations = network.graph.input_shape, fold(network)
    codes = (255,) if any(s.constant is not None for p in populations for s in p.synapses) else ()
    numbers = replace(target_format(bits), max_bias=None)
    rounded = []
    for real in populations:
        scale = numbers.ceiling(real)
        while True:
            one = round_population(real, Grid(scale, numbers, numbers.exponents_at(real, scale), codes), shape)
            if one.constant is None or one.constant.room >= 1:
                break
            scale *= 0.8
        rounded.append(one)
    deployed = assemble(rounded, shape, network.steps, {"note": "drawn"})
    assert (deployed.input.shape, deployed.input.constant_codes) == (shape, codes)
    assert (deployed.steps, deployed.provenance) == (network.steps, {"note": "drawn"})
    assert [(p.name, p.shape, p.spiking) for p in deployed.populations] == [
        (p.name, p.shape, p.threshold is not None) for p in populations
    ]
    for real in populations:
        assert [s.source for s in deployed.incoming(real.name)] == [s.source for s in real.synapses]
        bias = deployed.by_name[real.name].bias.reshape(len(real.bias), -1)
        assert (bias == bias[:, :1]).all()


def test_a_constant_part_without_a_code_of_8_bits_is_refused() -> None:
    first, *others = fold(spiking_network())
    grids = [Grid(10.0, target_format(8), (1,), codes) for codes in ((300,), None, None, None)]
    rounded = [round_population(p, grid, (1, 8, 8)) for p, grid in zip((first, *others), grids, strict=True)]
    with pytest.raises(RuleViolations, match="constant code is a code") as caught:
        assemble(rounded, (1, 8, 8), 4, {})
    (row,) = caught.value.violations
    assert (row.object, row.actual, row.limit) == ("input", "300", "1..255")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_populations_with_parameters_that_are_no_numbers_are_named_all_at_once(value: float) -> None:
    """Be it a weight, a constant, a bias or a threshold."""
    first, second, third, readout = fold(spiking_network())
    require_roundable([first, second, third, readout])
    (pixels,) = first.synapses
    assert pixels.constant is not None
    pixels.constant[0, 0, 0] = value
    second.synapses[0].weight[1, 1, 1, 1] = value
    wrong = replace(third, threshold=value)
    readout.bias[2] = value
    with pytest.raises(RuleViolations, match=r"float network: 4 problem\(s\)") as caught:
        require_roundable([first, second, wrong, readout])
    assert [row.object for row in caught.value.violations] == [p.name for p in (first, second, third, readout)]
    assert {row.rule for row in caught.value.violations} == {"parameters are finite"}
    assert "lower learning rate" in str(caught.value)
    with pytest.raises(RuleViolations) as caught:
        require_roundable([wrong])
    assert len(caught.value.violations) == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_rounding_changes_nothing_in_what_is_rounded(name: str) -> None:
    network = spiking_network(name)
    for real, same in zip(fold(network), fold(network), strict=True):
        scale = WIDE.ceiling(real)
        round_population(real, Grid(scale, WIDE, WIDE.exponents_at(real, scale)), network.graph.input_shape)
        assert np.array_equal(real.bias, same.bias)
        for synapse, untouched in zip(real.synapses, same.synapses, strict=True):
            assert np.array_equal(synapse.weight, untouched.weight)
            if synapse.constant is not None and untouched.constant is not None:
                assert np.array_equal(synapse.constant, untouched.constant)
