"""Compensated rounding of the constant channels: what is left of their errors, position by position."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardware.network import INPUT, Synapse
from hardware.reference import propagate
from pipeline.constant_channels import ConstantChannels, split_constant
from pipeline.folding import RealSynapse, fold
from pipeline.integer_recipe import Grid, round_population
from pipeline.number_formats import target_format
from pipeline.rounding import InputStatistics, compensation_factor, input_statistics, round_compensated
from tests.pipeline.samples import random_images, spiking_network

Float64Array = NDArray[np.float64]
SHAPE = (2, 8, 8)
GEOMETRIES = [(3, 1, 1), (3, 2, 1), (5, 1, 2), (4, 2, 1), (6, 2, 2), (3, 1, 0), (1, 1, 0)]
"""Kernel, stride and padding, where one tap meets every output position."""


def conv(kernel: int, stride: int, padding: int, constant: Float64Array) -> RealSynapse:
    return RealSynapse(INPUT, "conv", np.ones((len(constant), 2, kernel, kernel)), constant, stride, padding)


def random_conv(geometry: tuple[int, int, int], seed: int, outputs: int = 6) -> RealSynapse:
    kernel = geometry[0]
    return conv(*geometry, np.random.default_rng(seed).normal(size=(outputs, kernel, kernel)))


def presence(synapse: RealSynapse) -> Float64Array:
    """Which taps lie inside the image, ``(taps, positions)``, as the reference's propagation says."""
    kernel = synapse.weight.shape[2]
    taps = np.eye(kernel**2, dtype=np.int32).reshape(-1, 1, kernel, kernel)
    ones = np.ones((1, 1, *SHAPE[1:]), np.int64)
    read = propagate(Synapse("x", "p", "conv", taps, 8, 0, synapse.stride, synapse.padding), ones)
    return read[0].reshape(kernel**2, -1).astype(np.float64)


def offsets(synapse: RealSynapse, split: ConstantChannels, scale: float, bias: Float64Array) -> Float64Array:
    """What channels and bias add too much, ``(out, positions)``: from the integers themselves."""
    assert synapse.constant is not None
    carried = np.einsum("ocij,c->oij", split.kernel, np.array(split.codes, float))
    errors = (carried - synapse.constant * scale).reshape(len(bias), -1)
    return errors @ presence(synapse) + (split.bias - bias)[:, None]


def split(
    synapse: RealSynapse, bits: int, scale: float, bias: Float64Array, *, compensated: bool = True, step: int = 1
) -> ConstantChannels:
    return split_constant(synapse, scale, step, target_format(bits), bias, SHAPE, compensated=compensated)


@settings(max_examples=60)
@given(
    st.sampled_from(GEOMETRIES),
    st.integers(0, 2**32 - 1),
    st.integers(2, 8),
    st.floats(1, 5e3),
    st.sampled_from([1, 4]),
)
def test_on_the_grid_and_in_its_range_and_no_offset_is_left_on_average(
    geometry: tuple[int, int, int], seed: int, bits: int, scale: float, step: int
) -> None:
    synapse = random_conv(geometry, seed)
    bias = np.random.default_rng(seed).normal(size=6) * scale
    found = split(synapse, bits, scale, bias, step=step)
    low, high = target_format(bits).mantissas
    mantissas = found.kernel / step
    assert np.array_equal(mantissas, np.rint(mantissas))
    assert low <= mantissas.min() <= mantissas.max() <= high
    left = offsets(synapse, found, scale, bias)
    assert np.abs(left.mean(1)).max() < 1e-5 * scale
    told = found.error.reshape(6, -1) @ presence(synapse)
    assert np.abs(left - told).max() < 1e-9 * scale * synapse.weight[0, 0].size
    assert split(synapse, bits, scale, bias, step=step, compensated=False).codes == found.codes


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_where_nothing_is_padded_the_bias_makes_up_for_every_error(bits: int) -> None:
    synapse = random_conv((3, 1, 0), 1)
    bias = np.linspace(-3, 3, 6)
    left = offsets(synapse, split(synapse, bits, 1000.0, bias), 1000.0, bias)
    assert np.abs(left).max() < 1e-9


@pytest.mark.parametrize("geometry", [(3, 1, 1), (5, 1, 2), (4, 2, 1), (6, 2, 2)])
def test_offsets_are_far_smaller_than_of_taps_rounded_to_the_nearest(geometry: tuple[int, int, int]) -> None:
    """And than of those whose mean offset alone the bias takes back."""
    synapse, bias = random_conv(geometry, 2, outputs=200), np.zeros(200)
    nearest = offsets(synapse, split(synapse, 8, 3000.0, bias, compensated=False), 3000.0, bias)
    joint = offsets(synapse, split(synapse, 8, 3000.0, bias), 3000.0, bias)
    assert np.square(joint).mean() < 0.2 * np.square(nearest).mean()
    assert np.square(joint).mean() < 0.7 * nearest.var(axis=1).mean()


def test_offsets_are_near_the_least_that_rounding_up_or_down_can_reach() -> None:
    """All 256 ways to round the taps about the centre."""
    synapse, bias = random_conv((3, 1, 1), 3, outputs=60), np.zeros(60)
    found = split(synapse, 8, 3000.0, bias)
    joint = offsets(synapse, found, 3000.0, bias).var(axis=1)
    assert synapse.constant is not None
    (code,) = found.codes
    wanted = synapse.constant.reshape(60, 9) * 3000.0
    ways = np.array([(*way[:4], 0, *way[4:]) for way in product((0, 1), repeat=8)])
    errors = (np.floor(wanted / code)[:, None] + ways) * code - wanted[:, None]
    least = (errors @ presence(synapse)).var(axis=2).min(axis=1)
    assert joint.mean() < 1.3 * least.mean()


def test_a_bias_alone_is_carried_by_one_tap_and_leaves_no_error() -> None:
    synapse, bias = conv(3, 1, 1, np.zeros((3, 3, 3))), np.array([4096.0, -30000.0, 3.0])
    found = split(synapse, 8, 7.0, bias)
    assert np.count_nonzero(found.kernel) == 2
    assert not found.error.any()
    assert np.array_equal(found.kernel[:, 0, 1, 1] * found.codes[0] + found.bias, bias)


def test_without_a_tap_that_meets_every_position_each_is_rounded_to_the_nearest() -> None:
    """There the bias takes nothing back, for it has a limit of its own and no tap to help it."""
    synapse, bias = random_conv((2, 1, 1), 4), np.ones(6)
    found, nearest = (split(synapse, 8, 1000.0, bias, compensated=compensated) for compensated in (True, False))
    assert np.array_equal(found.kernel, nearest.kernel)
    assert np.array_equal(found.bias, bias)


@pytest.mark.parametrize("shape", [(1, 9), (5, 1), (1, 1), (4, 6)])
def test_weights_that_are_rounded_stay_as_they_were_and_their_mean_error_is_told(shape: tuple[int, int]) -> None:
    """Of one neuron, or of one input, too: there a transposed matrix is contiguous without a copy."""
    weight, inputs = np.random.default_rng(5).normal(size=shape) * 10, shape[1]
    before = weight.copy()
    statistics = InputStatistics(np.full(inputs, 0.5), (compensation_factor(np.eye(inputs), np.ones(inputs)),))
    rounded, mean_error = round_compensated(weight, statistics, -128, 127, np.ones(inputs))
    assert np.array_equal(weight, before)
    assert np.array_equal(mean_error, rounded @ statistics.mean - before @ statistics.mean)
    assert mean_error.all()


def test_populations_with_statistics_of_their_inputs_are_compensated_and_others_are_not() -> None:
    network = spiking_network("conv")
    shape = network.graph.input_shape
    first = fold(network)[0]
    (pixels,) = first.synapses
    numbers = target_format(8)
    grid = Grid(numbers.ceiling(first), numbers, numbers.exponents_at(first, numbers.ceiling(first)))
    statistics = input_statistics([pixels], {INPUT: random_images(shape, 8)})
    for known in (statistics, None):
        rounded = round_population(first, grid, shape, known)
        bias = first.bias * grid.scale - rounded.mean_error
        expected = split_constant(pixels, grid.scale, 1, numbers, bias, shape, compensated=known is not None)
        channels = rounded.synapses[0].weight[:, shape[0] :]
        assert np.array_equal(channels, expected.kernel)
        assert np.array_equal(rounded.population.bias[:, 0, 0], np.rint(expected.bias))
