"""The constant part of an image as constant channels: kernel, code, bias and what is left add up to it, tap by tap."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardware.network import INPUT, InputSpec
from pipeline.constant_channels import ConstantChannels, shared_codes, split_constant
from pipeline.folding import RealSynapse
from pipeline.models.graph import PIXEL_LEVELS
from pipeline.number_formats import WIDE, NumberFormat, target_format

Float64Array = NDArray[np.float64]
SHAPE = (2, 6, 6)
EIGHT_BITS = target_format(8)
NO_CODES: tuple[int, ...] = ()


def conv(kernel: int, padding: int, constant: Float64Array | None) -> RealSynapse:
    return RealSynapse(INPUT, "conv", np.ones((3, 2, kernel, kernel)), constant, 1, padding)


def dense() -> RealSynapse:
    return RealSynapse(INPUT, "dense", np.ones((3, 8)))


@st.composite
def convs(draw: st.DrawFn, with_anchor: bool | None = None) -> RealSynapse:
    """A conv with a constant part, of any size relative to weights."""
    kernel, padding = draw(st.integers(1, 5)), draw(st.integers(0, 3))
    if with_anchor is not None:
        assume(has_anchor(kernel, padding) == with_anchor)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return conv(kernel, padding, rng.normal(size=(3, kernel, kernel)) * 10.0 ** draw(st.integers(-2, 1)))


def has_anchor(kernel: int, padding: int) -> bool:
    """Whether one tap is inside the image wherever the kernel stands: the one over the pixel itself."""
    positions = range(-padding, SHAPE[1] + padding - kernel + 1)
    return any(all(0 <= first + tap < SHAPE[1] for first in positions) for tap in range(kernel))


@st.composite
def biases(draw: st.DrawFn) -> Float64Array:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.normal(size=3) * 10.0 ** draw(st.integers(-1, 5))


def standing(kernel: Float64Array, padding: int) -> Float64Array:
    """What a constant of 1 adds at every output position, ``(out, height, width)``; explicit loops."""
    size = kernel.shape[-1]
    side = SHAPE[1] + 2 * padding - size + 1
    total = np.zeros((len(kernel), side, side))
    for y in range(side):
        for x in range(side):
            for i in range(size):
                for j in range(size):
                    if 0 <= y + i - padding < SHAPE[1] and 0 <= x + j - padding < SHAPE[2]:
                        total[:, y, x] += kernel[:, i, j]
    return total


def carried(split: ConstantChannels) -> Float64Array:
    """What the channels hold, per tap."""
    total: Float64Array = np.einsum("oc...,c->o...", split.kernel, np.array(split.codes, float))
    return total


@given(convs(), biases(), st.floats(0.1, 1e4), st.integers(0, 7), st.sampled_from([EIGHT_BITS, target_format(3), WIDE]))
def test_everywhere_channels_and_bias_are_the_constant_part_but_for_the_error(
    synapse: RealSynapse, bias: Float64Array, scale: float, exponent: int, numbers: NumberFormat
) -> None:
    """At the border as inside, for all kernels and paddings."""
    step = 2**exponent
    split = split_constant(synapse, scale, step, numbers, bias, SHAPE)
    assert synapse.constant is not None
    wanted = standing(synapse.constant * scale, synapse.padding) + bias[:, None, None]
    found = standing(carried(split), synapse.padding) + split.bias[:, None, None]
    error = standing(split.error, synapse.padding)
    largest = 1 + np.abs(synapse.constant).max() * scale + np.abs(bias).max()
    assert np.abs(found - wanted - error).max() < 1e-12 * largest * synapse.weight[0, 0].size
    (code,) = split.codes
    assert np.abs(split.error).max() <= code * step / 2 * (1 + 1e-9) + 1e-9 * largest


@given(convs(), biases(), st.floats(0.1, 1e4), st.integers(0, 7), st.sampled_from([EIGHT_BITS, target_format(3), WIDE]))
def test_kernels_lie_on_the_grid_and_a_code_less_would_not_do(
    synapse: RealSynapse, bias: Float64Array, scale: float, exponent: int, numbers: NumberFormat
) -> None:
    step, (_, high) = 2**exponent, numbers.mantissas
    split = split_constant(synapse, scale, step, numbers, bias, SHAPE)
    assert split.kernel.shape == (3, 1, *synapse.weight.shape[2:])
    mantissas = split.kernel / step
    assert np.array_equal(mantissas, np.rint(mantissas))
    assert np.abs(mantissas).max() <= high
    assert split.codes == split.smallest_codes
    (code,) = split.codes
    assert synapse.constant is not None
    part = synapse.constant * scale
    if numbers.max_bias is not None and has_anchor(synapse.weight.shape[2], synapse.padding):
        part[:, synapse.padding, synapse.padding] += bias
    assert np.abs(part).max() <= code * high * step * (1 + 1e-12)
    assert code == 1 or np.abs(part).max() > (code - 1) * high * step * (1 - 1e-12)
    assert np.array_equal(split.kernel[:, 0], np.rint(part / (code * step)) * step)
    assert split.room == PIXEL_LEVELS / code


@given(convs(with_anchor=True), biases(), st.floats(1, 100))
def test_where_a_tap_meets_every_position_it_carries_the_bias_of_a_chip(
    synapse: RealSynapse, bias: Float64Array, scale: float
) -> None:
    """What is left for the bias is less than half a code; there the kernel has no error."""
    split = split_constant(synapse, scale, 1, EIGHT_BITS, bias, SHAPE)
    assert np.abs(split.bias).max() <= split.codes[0] / 2 * (1 + 1e-9)
    assert not split.error[:, synapse.padding, synapse.padding].any()


@given(convs(with_anchor=False), biases(), st.floats(1, 100))
def test_where_no_tap_does_the_bias_stays(synapse: RealSynapse, bias: Float64Array, scale: float) -> None:
    split = split_constant(synapse, scale, 1, EIGHT_BITS, bias, SHAPE)
    assert np.array_equal(split.bias, bias)


@given(convs(with_anchor=True), biases(), st.floats(1, 100))
def test_where_biases_have_no_limit_they_only_make_up_for_the_kernel(
    synapse: RealSynapse, bias: Float64Array, scale: float
) -> None:
    split = split_constant(synapse, scale, 1, WIDE, bias, SHAPE)
    alone = split_constant(synapse, scale, 1, WIDE, np.zeros(3), SHAPE)
    assert np.array_equal(split.kernel, alone.kernel)
    assert np.array_equal(split.bias, bias + alone.bias)
    assert np.abs(alone.bias).max() <= split.codes[0] / 2 * (1 + 1e-9)


@pytest.mark.parametrize("synapse", [conv(3, 1, None), conv(3, 0, np.zeros((3, 3, 3))), conv(1, 2, None), dense()])
@pytest.mark.parametrize("limit", [4095, None])
def test_without_a_constant_part_and_with_a_bias_that_fits_no_channel_is_needed(
    synapse: RealSynapse, limit: int | None
) -> None:
    bias = np.array([4095.0, -4095.0, 0.25])
    split = split_constant(synapse, 7.0, 2, replace(EIGHT_BITS, max_bias=limit), bias, SHAPE)
    assert split.codes == split.smallest_codes == NO_CODES
    assert split.kernel.shape == (3, 0, *synapse.weight.shape[2:])
    assert np.array_equal(split.bias, bias)
    assert not split.error.any()
    assert split.room == np.inf


@pytest.mark.parametrize(
    ("synapse", "taps"), [(conv(3, 1, None), (3, 3)), (conv(5, 2, None), (5, 5)), (dense(), (36,))]
)
def test_a_bias_beyond_its_bits_is_carried_by_one_tap(synapse: RealSynapse, taps: tuple[int, ...]) -> None:
    """The one over the pixel itself, or a dense synapse's first position."""
    bias = np.array([4096.0, -30000.0, 3.0])
    split = split_constant(synapse, 7.0, 2, EIGHT_BITS, bias, SHAPE)
    assert split.codes == (119,)  # 30000 / (2 * 127), rounded up
    kernel = split.kernel.reshape(3, *taps)
    where = (0,) if synapse.kind == "dense" else (synapse.padding, synapse.padding)
    assert np.array_equal(kernel[:, *where], 2 * np.rint(bias / 238))
    assert np.count_nonzero(kernel) == 2
    assert np.array_equal(kernel[:, *where] * 119 + split.bias, bias)
    assert not split.error.any()
    unlimited = split_constant(synapse, 7.0, 2, WIDE, bias, SHAPE)
    assert unlimited.codes == NO_CODES
    assert np.array_equal(unlimited.bias, bias)


@given(convs(), st.integers(0, 200), st.integers(0, 3))
def test_given_codes_are_kept_and_their_room_is_told(synapse: RealSynapse, more: int, exponent: int) -> None:
    own = split_constant(synapse, 50.0, 2**exponent, EIGHT_BITS, np.zeros(3), SHAPE)
    code = own.codes[0] + more
    split = split_constant(synapse, 50.0, 2**exponent, EIGHT_BITS, np.zeros(3), SHAPE, (code,))
    assert split.codes == (code,)
    assert split.smallest_codes == own.smallest_codes
    assert np.abs(split.kernel).max() <= np.abs(own.kernel).max()
    assert split.room == (code / own.codes[0] if more else PIXEL_LEVELS / code)
    if own.codes[0] > 1:
        short = split_constant(synapse, 50.0, 2**exponent, EIGHT_BITS, np.zeros(3), SHAPE, (own.codes[0] - 1,))
        assert short.room < 1


def test_codes_of_others_are_no_burden_to_who_needs_none() -> None:
    bias = np.array([5.0, 6.0, 7.0])
    split = split_constant(conv(3, 1, None), 2.0, 1, EIGHT_BITS, bias, SHAPE, (90,))
    assert split.kernel.shape == (3, 1, 3, 3)
    assert not split.kernel.any()
    assert np.array_equal(split.bias, bias)
    assert split.smallest_codes == (0,)
    assert split.room == np.inf


def test_who_needs_a_channel_where_there_is_none_has_no_room() -> None:
    split = split_constant(conv(3, 1, np.ones((3, 3, 3))), 2.0, 1, EIGHT_BITS, np.zeros(3), SHAPE, ())
    assert split.smallest_codes == (1,)
    assert split.room < 1


@given(convs(), st.floats(1, 1e4))
def test_a_second_channel_carries_what_the_first_leaves(synapse: RealSynapse, scale: float) -> None:
    numbers = replace(target_format(4), constant_channels=2)
    one = split_constant(synapse, scale, 1, target_format(4), np.zeros(3), SHAPE)
    two = split_constant(synapse, scale, 1, numbers, np.zeros(3), SHAPE)
    assert two.codes[0] == one.codes[0]
    assert np.array_equal(two.kernel[:, :1], one.kernel)
    if one.error.any():
        # Half the first code is left, which the second's seven steps of its own reach.
        assert len(two.codes) == 2
        assert two.codes[1] <= one.codes[0] // 14 + 1
        assert np.abs(two.error).max() <= two.codes[1] / 2 * (1 + 1e-9)
    else:
        assert len(two.codes) == 1


def test_nothing_that_was_given_is_changed() -> None:
    synapse, bias = conv(3, 1, np.full((3, 3, 3), 0.3)), np.full(3, 9000.0)
    split_constant(synapse, 1.0, 1, EIGHT_BITS, bias, SHAPE)
    assert synapse.constant is not None
    assert (synapse.constant == 0.3).all()
    assert (bias == 9000.0).all()


def reader(*smallest: int) -> ConstantChannels:
    return ConstantChannels(np.zeros((1, 0)), smallest, smallest, np.zeros(1), np.zeros((1, 1)))


def test_shared_codes_are_the_largest_that_any_reader_needs() -> None:
    assert shared_codes([reader(3, 200), reader(7), reader()]) == (7, 200)
    assert shared_codes([reader(), reader()]) == ()
    assert shared_codes(iter([])) == ()


@given(st.lists(convs(), min_size=2, max_size=3), st.lists(st.floats(0.1, 30), min_size=3, max_size=3))
def test_at_shared_codes_every_reader_has_room(synapses: list[RealSynapse], scales: list[float]) -> None:
    pairs = list(zip(synapses, scales, strict=False))
    own = [split_constant(synapse, scale, 1, EIGHT_BITS, np.zeros(3), SHAPE) for synapse, scale in pairs]
    codes = shared_codes(own)
    assume(max(codes) <= PIXEL_LEVELS)
    for synapse, scale in pairs:
        split = split_constant(synapse, scale, 1, EIGHT_BITS, np.zeros(3), SHAPE, codes)
        assert split.room >= 1
        assert np.abs(split.kernel).max() <= EIGHT_BITS.mantissas[1]


def test_the_input_presents_pixels_and_then_the_codes() -> None:
    spec = InputSpec((2, 3, 3), 255, (7, 255))
    assert spec.presented_shape == (4, 3, 3)
    images = np.arange(36, dtype=np.uint8).reshape(2, 2, 3, 3)
    presented = spec.present(images)
    assert np.array_equal(presented[:, :2], images)
    assert (presented[:, 2] == 7).all()
    assert (presented[:, 3] == 255).all()


def test_what_a_current_keeps_goes_through_the_channels_whatever_its_size() -> None:
    synapse = RealSynapse(INPUT, "conv", np.ones((3, 2, 3, 3)), None, 1, 1)
    bias = np.array([0.0, 20.0, -45.0])
    without = split_constant(synapse, 10.0, 1, EIGHT_BITS, bias, SHAPE)
    assert (without.codes, without.bias.tolist()) == ((), bias.tolist())
    split = split_constant(synapse, 10.0, 1, EIGHT_BITS, bias, SHAPE, max_code=1, outlasts_step=True)
    assert split.codes == (1,)
    assert not split.bias.any()
    assert split.kernel[:, 0, 1, 1].tolist() == bias.tolist()
    too_much = split_constant(synapse, 10.0, 1, EIGHT_BITS, 10 * bias, SHAPE, max_code=1, outlasts_step=True)
    assert too_much.room < 1
