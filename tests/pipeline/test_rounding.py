"""Compensated rounding: on the grid, within its range, and with smaller errors where it matters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardware.network import INPUT, Synapse
from hardware.reference import propagate
from pipeline import rounding
from pipeline.folding import RealPopulation, RealSynapse
from pipeline.integer_recipe import Grid, round_population
from pipeline.number_formats import target_format
from pipeline.rounding import DAMPING, InputStatistics, compensation_factor, input_statistics, round_compensated


def correlated(rng: np.random.Generator, samples: int, inputs: int) -> NDArray[np.float64]:
    """Spikes of inputs that fire together."""
    drive = rng.normal(size=(samples, 3)) @ rng.normal(size=(3, inputs)) + 0.3 * rng.normal(size=(samples, inputs))
    return (drive > 0.5).astype(np.float64)


def moments(activity: NDArray[np.float64]) -> InputStatistics:
    covariance = np.cov(activity, rowvar=False, bias=True)
    return InputStatistics(activity.mean(0), (factor(covariance),))


def factor(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    return compensation_factor(covariance, np.full(len(covariance), np.diag(covariance).mean()))


def ones(inputs: int) -> NDArray[np.float64]:
    return np.ones(inputs)


@given(st.integers(0, 2**32 - 1), st.integers(2, 8))
def test_results_lie_on_the_grid_and_in_its_range(seed: int, bits: int) -> None:
    """Each input's own grid, where several synapses with exponents of their own enter."""
    rng = np.random.default_rng(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    steps = 2.0 ** rng.integers(0, 4, 12)
    weight = rng.normal(size=(4, 12)) * high * steps
    rounded, mean_error = round_compensated(weight, moments(correlated(rng, 200, 12)), low, high, steps)
    mantissas = rounded / steps
    assert np.array_equal(mantissas, np.rint(mantissas))
    assert mantissas.min() >= low
    assert mantissas.max() <= high
    assert np.isfinite(mean_error).all()


@given(st.integers(0, 2**32 - 1))
def test_weights_on_the_grid_stay_where_they_are(seed: int) -> None:
    """Whatever the inputs: there is no error to pass on."""
    rng = np.random.default_rng(seed)
    steps = 2.0 ** rng.integers(0, 4, 40)
    weight = rng.integers(-8, 8, (5, 40)) * steps
    rounded, mean_error = round_compensated(weight, moments(correlated(rng, 100, 40)), -8, 7, steps)
    assert np.array_equal(rounded, weight)
    assert not mean_error.any()


@pytest.mark.parametrize("inputs", [1, 31, 32, 33, 70])
def test_errors_are_passed_on_as_by_the_formula(inputs: int) -> None:
    """Panels are a matter of speed: one input after the other, each correcting all after it, gives the same."""
    rng = np.random.default_rng(inputs)
    covariance = np.atleast_2d(np.cov(correlated(rng, 500, inputs), rowvar=False, bias=True))
    damped = covariance + DAMPING * np.diag(covariance).mean() * np.eye(inputs)
    remaining = rng.normal(size=(3, inputs)) * 5
    weight = remaining.copy()
    inverse = np.linalg.inv(damped)
    for j in range(inputs):
        kept = np.clip(np.rint(remaining[:, j]), -8, 7)
        # Optimal brain surgeon: the others move so that the squared error of the sums grows least.
        change = (kept - remaining[:, j]) / inverse[0, 0]
        remaining[:, j + 1 :] += np.outer(change, inverse[0, 1:])
        remaining[:, j] = kept
        inverse = np.linalg.inv(damped[j + 1 :, j + 1 :])
    statistics = InputStatistics(np.zeros(inputs), (factor(covariance),))
    assert np.array_equal(round_compensated(weight, statistics, -8, 7, ones(inputs))[0], remaining)


def test_blocks_of_inputs_are_rounded_as_if_alone() -> None:
    rng = np.random.default_rng(8)
    activity = correlated(rng, 300, 20)
    halves = [moments(activity[:, :12]), moments(activity[:, 12:])]
    both = InputStatistics(np.concatenate([half.mean for half in halves]), (halves[0].factors[0], halves[1].factors[0]))
    weight = rng.normal(size=(4, 20)) * 10
    together, _ = round_compensated(weight, both, -128, 127, ones(20))
    first, _ = round_compensated(weight[:, :12], halves[0], -128, 127, ones(12))
    second, _ = round_compensated(weight[:, 12:], halves[1], -128, 127, ones(8))
    assert np.array_equal(together, np.concatenate([first, second], axis=1))


def test_the_mean_error_is_what_the_bias_has_to_take_back() -> None:
    rng = np.random.default_rng(1)
    activity = correlated(rng, 500, 20)
    weight = rng.normal(size=(5, 20)) * 10
    rounded, mean_error = round_compensated(weight, moments(activity), -128, 127, ones(20))
    errors = activity @ (rounded - weight).T - mean_error
    assert np.abs(errors.mean(0)).max() < 1e-9


def test_errors_of_the_sums_shrink_on_correlated_inputs() -> None:
    rng = np.random.default_rng(2)
    activity = correlated(rng, 2000, 64)
    weight = rng.normal(size=(16, 64)) * 10
    rounded, mean_error = round_compensated(weight, moments(activity), -128, 127, ones(64))
    nearest = np.rint(weight)
    compensated = activity @ (rounded - weight).T - mean_error
    plain = activity @ (nearest - weight).T
    plain -= plain.mean(0)
    assert np.square(compensated).mean() < 0.6 * np.square(plain).mean()


def test_independent_inputs_leave_nothing_to_compensate() -> None:
    weight = np.random.default_rng(3).normal(size=(3, 9)) * 10
    statistics = InputStatistics(np.zeros(9), (factor(np.eye(9)),))
    rounded, _ = round_compensated(weight, statistics, -128, 127, ones(9))
    assert np.array_equal(rounded, np.rint(weight))


def test_inputs_that_never_fire_do_no_harm() -> None:
    weight = np.random.default_rng(4).normal(size=(3, 6)) * 10
    statistics = InputStatistics(np.zeros(6), (factor(np.zeros((6, 6))),))
    rounded, mean_error = round_compensated(weight, statistics, -128, 127, ones(6))
    assert np.array_equal(rounded, np.rint(weight))
    assert not mean_error.any()


def conv(source: str, channels: int, kernel: int, stride: int, padding: int) -> RealSynapse:
    return RealSynapse(source, "conv", np.zeros((1, channels, kernel, kernel)), None, stride, padding)


def read_through(synapse: RealSynapse, activity: NDArray[np.int64]) -> NDArray[np.float64]:
    """What neurons read through each tap in turn, ``(rows, inputs)``, as the reference's propagation says."""
    inputs = synapse.weight[0].size
    taps = np.eye(inputs, dtype=np.int32).reshape(inputs, *synapse.weight.shape[1:])
    read = propagate(Synapse("x", "p", synapse.kind, taps, 8, 0, synapse.stride, synapse.padding), activity)
    if synapse.kind == "dense":
        return read.astype(np.float64)
    return read.transpose(0, 2, 3, 1).reshape(-1, inputs).astype(np.float64)


def covariance_of(statistics: InputStatistics) -> list[NDArray[np.float64]]:
    """The damped covariances that the factors were made from."""
    return [np.linalg.inv(one.T @ one) for one in statistics.factors]


def damped(rows: NDArray[np.float64], like: NDArray[np.int64]) -> NDArray[np.float64]:
    covariance = np.atleast_2d(np.cov(rows, rowvar=False, bias=True))
    variances = np.diag(covariance)
    means = np.bincount(like, variances) / np.bincount(like)
    return covariance + DAMPING * np.diag(means[like])


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (6, 2, 2), (1, 1, 0), (2, 3, 1)])
def test_statistics_of_a_conv_are_those_of_what_its_neurons_read(kernel: int, stride: int, padding: int) -> None:
    """Several synapses count as one row of inputs; padding is read too."""
    rng = np.random.default_rng(5)
    spikes = rng.integers(0, 2, (3, 4, 2, 8, 8))
    synapse = conv("x", 2, kernel, stride, padding)
    rows = read_through(synapse, spikes.reshape(12, 2, 8, 8))
    found = input_statistics([synapse], {"x": spikes})
    assert found.mean == pytest.approx(rows.mean(0), abs=1e-6)
    assert covariance_of(found)[0] == pytest.approx(damped(rows, np.zeros(rows.shape[1], np.int64)), abs=1e-5)


def test_statistics_of_several_synapses_are_joint() -> None:
    rng = np.random.default_rng(6)
    spikes = rng.integers(0, 2, (3, 4, 2, 6, 6))
    other = np.where(rng.random((3, 4, 3, 3, 3)) < 0.7, spikes[:, :, :1, ::2, ::2], 0)
    synapses = [conv("x", 2, 3, 2, 1), conv("y", 3, 1, 1, 0)]
    rows = np.concatenate(
        [
            read_through(synapse, values.reshape(12, *values.shape[2:]))
            for synapse, values in zip(synapses, (spikes, other), strict=True)
        ],
        axis=1,
    )
    found = input_statistics(synapses, {"x": spikes, "y": other})
    assert found.mean == pytest.approx(rows.mean(0), abs=1e-6)
    assert covariance_of(found)[0] == pytest.approx(damped(rows, np.repeat([0, 1], [18, 3])), abs=1e-5)


def test_pixels_count_once_for_all_steps() -> None:
    rng = np.random.default_rng(7)
    codes = rng.integers(0, 256, (50, 5))
    synapse = RealSynapse(INPUT, "dense", np.zeros((2, 5)))
    found = input_statistics([synapse], {INPUT: codes})
    assert found.mean == pytest.approx(codes.mean(0), rel=1e-6)
    assert covariance_of(found)[0] == pytest.approx(damped(codes.astype(float), np.zeros(5, np.int64)), rel=1e-4)


def test_wide_populations_have_statistics_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is the statistics of its inputs alone, in their order."""
    monkeypatch.setattr(rounding, "MAX_INPUTS", 20)
    monkeypatch.setattr(rounding, "BLOCK_INPUTS", 8)
    rng = np.random.default_rng(9)
    spikes = rng.integers(0, 2, (3, 4, 3, 5, 5))
    other = rng.integers(0, 2, (3, 4, 2, 5, 5))
    synapses = [conv("x", 3, 3, 1, 1), conv("y", 2, 3, 1, 1)]
    found = input_statistics(synapses, {"x": spikes, "y": other})
    rows = np.concatenate(
        [read_through(synapse, v.reshape(12, -1, 5, 5)) for synapse, v in zip(synapses, (spikes, other), strict=True)],
        axis=1,
    )
    ends = np.cumsum([0, 8, 8, 8, 3, 18])
    assert [len(one) for one in found.factors] == np.diff(ends).tolist()
    assert found.mean == pytest.approx(rows.mean(0), abs=1e-6)
    for start, stop, covariance in zip(ends[:-1], ends[1:], covariance_of(found), strict=True):
        assert covariance == pytest.approx(damped(rows[:, start:stop], np.zeros(stop - start, np.int64)), abs=1e-5)


def test_more_activity_than_needed_is_sampled_and_repeatably(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "VALUES", 0)
    rng = np.random.default_rng(10)
    spikes = rng.integers(0, 2, (400, 4, 6))
    synapse = RealSynapse("x", "dense", np.zeros((2, 6)))
    found, again = (input_statistics([synapse], {"x": spikes}) for _ in range(2))
    assert np.array_equal(found.mean, again.mean)
    # Four rows per input, no more and no less: means are multiples of their share.
    assert found.mean * 24 == pytest.approx(np.rint(found.mean * 24), abs=1e-5)
    assert not np.array_equal(found.mean, input_statistics([synapse], {"x": spikes}, seed=1).mean)


def test_a_population_takes_the_mean_error_out_of_its_bias() -> None:
    rng = np.random.default_rng(6)
    activity = correlated(rng, 400, 10)
    synapse = RealSynapse("x", "dense", rng.normal(size=(4, 10)))
    real = RealPopulation("p", (4,), (synapse,), rng.normal(size=4), 1.0)
    grid = Grid(20.0, target_format(8), (1,))
    rounded = round_population(real, grid, (1,), input_statistics([synapse], {"x": activity[:, None]}))
    weight, bias = rounded.synapses[0].weight, rounded.population.bias
    wanted = 20.0 * (activity @ synapse.weight.T + real.bias)
    found = (activity @ weight.T + bias - wanted).mean(0)
    assert np.abs(found).max() <= 0.5 + 1e-4
    assert found == pytest.approx(rounded.bias_error, abs=1e-4)
