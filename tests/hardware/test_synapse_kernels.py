from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.geometry import edges, positions_and_channels, windows
from hardware.network import Shape, Synapse
from hardware.reference import propagate
from hardware.synapse_kernels import TILE_SIZES, WORD_BITS, GatheringSynapse, pack_spikes

Rng = np.random.Generator
UNTOUCHED = 12345


def random_synapse(
    rng: Rng, outputs: int, channels: int, kind: Literal["conv", "dense"] = "conv"
) -> tuple[Synapse, Shape]:
    """Any kernel, stride and padding, wider padding than kernels included; and the shape it reads."""
    shape = (channels, int(rng.integers(1, 8)), int(rng.integers(1, 8)))
    stride, padding = int(rng.integers(1, 4)), int(rng.integers(0, 4))
    kernel = tuple(int(rng.integers(1, size + 2 * padding + 1)) for size in shape[1:])
    weights = (outputs, channels, *kernel) if kind == "conv" else (outputs, int(np.prod(shape)))
    weight = rng.integers(-128, 128, weights).astype(np.int32)
    if kind == "dense":
        return Synapse("input", "out", "dense", weight, 8), shape
    return Synapse("input", "out", "conv", weight, 8, 0, stride, padding), shape


def check(synapse: Synapse, shape: Shape, rng: Rng, narrow: bool, graded: bool, rate: float) -> None:
    """Sums are added to what was there before, and are those of the reference."""
    activity = np.asarray(rng.random((3, *shape)) < rate, np.int64)
    if graded:
        activity *= rng.integers(0, 256, activity.shape)
    expected = propagate(synapse, activity)
    positions, channels = positions_and_channels(expected.shape[1:])
    rows = np.moveaxis(activity, 1, -1).reshape(3, -1)
    sums = np.full((3, positions * channels), UNTOUCHED, np.int32 if narrow else np.int64)
    gathering = GatheringSynapse.of(synapse, shape, narrow)
    if graded:
        gathering.add_codes(rows.astype(np.int32), sums)
    else:
        gathering.add_spikes(pack_spikes(rows.astype(bool)), sums)
    in_order = np.moveaxis(expected.reshape(3, channels, positions), 1, -1).reshape(3, -1)
    assert np.array_equal(sums, in_order + UNTOUCHED)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.sampled_from(["conv", "dense"]))
def test_sums_are_those_of_the_reference(seed: int, narrow: bool, graded: bool, kind: Literal["conv", "dense"]) -> None:
    rng = np.random.default_rng(seed)
    synapse, shape = random_synapse(rng, int(rng.integers(1, 70)), int(rng.integers(1, 20)), kind)
    check(synapse, shape, rng, narrow, graded, rng.random())


@pytest.mark.parametrize("outputs", sorted({size + more for size in (*TILE_SIZES, 128) for more in (-1, 0, 1)}))
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("graded", [True, False])
def test_any_number_of_outputs_fills_tiles(outputs: int, narrow: bool, graded: bool) -> None:
    rng = np.random.default_rng(outputs)
    synapse = Synapse("input", "out", "conv", rng.integers(-128, 128, (outputs, 5, 3, 3)).astype(np.int32), 8, 0, 1, 1)
    check(synapse, (5, 4, 4), rng, narrow, graded, 0.3)


@pytest.mark.parametrize("neurons", [1, 7, 8, WORD_BITS - 1, WORD_BITS, WORD_BITS + 1, 64, 65, 1000])
@pytest.mark.parametrize("rate", [0.0, 0.05, 1.0])
def test_runs_end_where_words_do(neurons: int, rate: float) -> None:
    rng = np.random.default_rng(neurons)
    synapse = Synapse("input", "out", "dense", rng.integers(-128, 128, (10, neurons)).astype(np.int32), 8)
    check(synapse, (neurons,), rng, True, False, rate)


def test_weights_and_sums_may_be_as_wide_as_their_types() -> None:
    narrow = Synapse("input", "out", "dense", np.array([[2**15 - 1, -(2**15) + 1]] * 3, np.int32), 16)
    wide = Synapse("input", "out", "dense", np.array([[2**31 - 1, 2**31 - 1]] * 3, np.int32), 32)
    for synapse, is_narrow in ((narrow, True), (wide, False)):
        sums = np.zeros((2, 3), np.int32 if is_narrow else np.int64)
        codes = np.array([[255, 0], [255, 255]], np.int32)
        GatheringSynapse.of(synapse, (2,), is_narrow).add_codes(codes, sums)
        expected = codes.astype(np.int64) @ synapse.weight.T.astype(np.int64)
        assert np.array_equal(sums, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_windows_and_edges_connect_the_same_neurons(seed: int, longest: int) -> None:
    rng = np.random.default_rng(seed)
    synapse, shape = random_synapse(rng, 1, int(rng.integers(1, 5)))
    channels = shape[0]
    e, w = edges(synapse, shape), windows(synapse, shape, longest)
    from_edges = {
        (position * channels + channel, int(e.target[edge]), int(e.tap[edge]) * channels + channel)
        for position in range(len(e.first) - 1)
        for edge in range(e.first[position], e.first[position + 1])
        for channel in range(channels)
    }
    from_windows = [
        (int(source) + i, target, int(row) + i)
        for target in range(len(w.first) - 1)
        for source, row, length in w.runs[w.first[target] : w.first[target + 1]]
        for i in range(length)
    ]
    assert len(from_windows) == len(from_edges)
    assert set(from_windows) == from_edges
    assert w.runs[:, 2].max(initial=1) <= longest
    assert w.runs[:, 2].min(initial=1) >= 1
