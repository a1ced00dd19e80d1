"""Compensated rounding: on the grid, within its range, and with smaller errors where it matters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardware.network import Synapse
from hardware.reference import propagate
from pipeline.folding import RealPopulation
from pipeline.quantization import round_population
from pipeline.rounding import InputStatistics, input_statistics, round_compensated


def correlated(rng: np.random.Generator, samples: int, inputs: int) -> NDArray[np.float64]:
    """Spikes of inputs that fire together."""
    drive = rng.normal(size=(samples, 3)) @ rng.normal(size=(3, inputs)) + 0.3 * rng.normal(size=(samples, inputs))
    return (drive > 0.5).astype(np.float64)


def moments(activity: NDArray[np.float64]) -> InputStatistics:
    return InputStatistics(activity.mean(0), np.cov(activity, rowvar=False, bias=True))


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.sampled_from([1, 2]))
def test_results_lie_on_the_grid_and_in_its_range(seed: int, bits: int, step: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = rng.normal(size=(4, 12)) * high * step
    rounded, mean_error = round_compensated(weight, moments(correlated(rng, 200, 12)), low, high, step)
    mantissas = rounded / step
    assert np.array_equal(mantissas, np.rint(mantissas))
    assert mantissas.min() >= low
    assert mantissas.max() <= high
    assert np.isfinite(mean_error).all()


def test_the_mean_error_is_what_the_bias_has_to_take_back() -> None:
    rng = np.random.default_rng(1)
    activity = correlated(rng, 500, 20)
    weight = rng.normal(size=(5, 20)) * 10
    rounded, mean_error = round_compensated(weight, moments(activity), -128, 127, 1)
    errors = activity @ (rounded - weight).T - mean_error
    assert np.abs(errors.mean(0)).max() < 1e-9


def test_errors_of_the_sums_shrink_on_correlated_inputs() -> None:
    rng = np.random.default_rng(2)
    activity = correlated(rng, 2000, 64)
    weight = rng.normal(size=(16, 64)) * 10
    rounded, mean_error = round_compensated(weight, moments(activity), -128, 127, 1)
    nearest = np.rint(weight)
    compensated = activity @ (rounded - weight).T - mean_error
    plain = activity @ (nearest - weight).T
    plain -= plain.mean(0)
    assert np.square(compensated).mean() < 0.6 * np.square(plain).mean()


def test_independent_inputs_leave_nothing_to_compensate() -> None:
    weight = np.random.default_rng(3).normal(size=(3, 9)) * 10
    rounded, _ = round_compensated(weight, InputStatistics(np.zeros(9), np.eye(9)), -128, 127, 1)
    assert np.array_equal(rounded, np.rint(weight))


def test_inputs_that_never_fire_do_no_harm() -> None:
    weight = np.random.default_rng(4).normal(size=(3, 6)) * 10
    rounded, mean_error = round_compensated(weight, InputStatistics(np.zeros(6), np.zeros((6, 6))), -128, 127, 1)
    assert np.array_equal(rounded, np.rint(weight))
    assert not mean_error.any()


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (6, 2, 2), (1, 1, 0)])
def test_statistics_of_a_conv_are_those_of_what_its_neurons_read(kernel: int, stride: int, padding: int) -> None:
    """Each tap in turn as a kernel of its own: the reference's propagation says what a neuron reads through it."""
    rng = np.random.default_rng(5)
    activity = rng.integers(0, 2, (7, 2, 8, 8))
    real = RealPopulation(
        "p", "x", "conv", np.zeros((1, 2, kernel, kernel)), None, np.zeros(1), 1.0, (1, 8, 8), stride, padding
    )
    taps = np.eye(2 * kernel**2, dtype=np.int32).reshape(-1, 2, kernel, kernel)
    read = propagate(Synapse("x", "p", "conv", taps, 8, 0, stride, padding), activity.astype(np.int64))
    rows = read.transpose(0, 2, 3, 1).reshape(-1, len(taps)).astype(np.float64)
    found = input_statistics(real, activity)
    assert found.mean == pytest.approx(rows.mean(0), abs=1e-6)
    assert found.covariance == pytest.approx(np.cov(rows, rowvar=False, bias=True), abs=1e-5)


def test_a_population_takes_the_mean_error_out_of_its_bias() -> None:
    rng = np.random.default_rng(6)
    activity = correlated(rng, 400, 10)
    real = RealPopulation("p", "x", "dense", rng.normal(size=(4, 10)), None, rng.normal(size=4), 1.0, (4,))
    weight, bias = round_population(real, 20.0, 8, input_statistics(real, activity))
    wanted = 20.0 * (activity @ real.weight.T + real.bias)
    assert (activity @ weight.T + bias - wanted).mean(0) == pytest.approx(np.zeros(4), abs=1e-4)
