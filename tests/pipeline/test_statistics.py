from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from pipeline.statistics import (
    PairedOutcome,
    judge,
    mcnemar,
    pair,
    samples_to_decide,
    tango_bound,
    tango_score,
    wilson_interval,
)

Z95 = float(norm.ppf(0.95))


def outcome(both: int, only_reference: int, only_deployed: int, neither: int) -> PairedOutcome:
    samples = both + only_reference + only_deployed + neither
    return PairedOutcome(samples, both + only_reference, both + only_deployed, only_reference, only_deployed)


COUNTS = st.integers(0, 60)
OUTCOMES = st.builds(outcome, COUNTS, COUNTS, COUNTS, COUNTS).filter(lambda o: o.samples > 0)


def restricted_score(o: PairedOutcome, difference: float) -> float:
    """Tango's statistic from its definition: (c - b - n d) over its standard deviation at the restricted maximum.

    With p = P(only reference) the likelihood under the hypothesis is that of (p, p + d, 1 - 2p - d); it is maximised
    numerically, and the variance of (c - b) / n is (2p + d - d**2) / n.
    """
    n, b, c = o.samples, o.only_reference, o.only_deployed

    def negative_log_likelihood(p: float) -> float:
        terms = ((b, p), (c, p + difference), (n - b - c, 1 - 2 * p - difference))
        return -sum(k * math.log(max(share, 1e-300)) for k, share in terms if k)

    low, high = max(0.0, -difference), (1 - difference) / 2
    p = minimize_scalar(negative_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-14}).x
    return float((c - b - n * difference) / math.sqrt(n * (2 * p + difference - difference**2)))


@given(OUTCOMES, st.floats(-0.9, 0.9))
def test_the_score_is_that_of_the_restricted_maximum_likelihood(o: PairedOutcome, difference: float) -> None:
    if abs(difference) < 1e-3:
        difference = 0.01
    assert tango_score(o, difference) == pytest.approx(restricted_score(o, difference), rel=1e-3, abs=1e-3)


def test_the_score_of_no_difference_is_mcnemars() -> None:
    assert tango_score(outcome(30, 4, 9, 7), 0.0) == pytest.approx((9 - 4) / math.sqrt(9 + 4))


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998) 2635-2650: score intervals of paired differences, 95 %.
    # Fagerland, Lydersen & Laake, Statistics in Medicine 33 (2014) 2850-2875, table of Bentur et al.: Tango's interval.
    [((36, 12, 2, 0), 0.0611, 0.3447), ((1, 1, 7, 12), -0.5172, -0.0260)],
)
def test_published_intervals(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    both, only_first, only_second, neither = counts
    o = outcome(both, only_second, only_first, neither)  # first minus second is deployed minus reference
    assert tango_bound(o, 0.975, "lower") == pytest.approx(low, abs=6e-5)
    assert tango_bound(o, 0.975, "upper") == pytest.approx(high, abs=6e-5)


def test_the_worked_example_of_tango() -> None:
    """Statistics in Medicine 17 (1998) 891-908: 44 pairs, one of them discordant, no more than 10 % inferior."""
    lenses = outcome(43, 1, 0, 0)
    score = tango_score(lenses, -0.1)
    assert score == pytest.approx(1.709, abs=5e-4)
    assert norm.sf(score) == pytest.approx(0.044, abs=5e-4)
    assert judge(lenses, 0.1, 0.95) == "pass"
    assert judge(lenses, 0.1, 0.975) == "inconclusive"


@given(OUTCOMES, st.sampled_from([0.8, 0.95, 0.99]))
def test_bounds_are_where_the_score_meets_the_quantile(o: PairedOutcome, confidence: float) -> None:
    z = float(norm.ppf(confidence))
    lower, upper = tango_bound(o, confidence, "lower"), tango_bound(o, confidence, "upper")
    assert -1 <= lower <= o.difference <= upper <= 1
    if lower > -1 + 1e-6:
        assert tango_score(o, lower) == pytest.approx(z, abs=1e-4)
    if upper < 1 - 1e-6:
        assert tango_score(o, upper) == pytest.approx(-z, abs=1e-4)


@given(OUTCOMES)
def test_swapping_the_models_mirrors_the_interval(o: PairedOutcome) -> None:
    swapped = PairedOutcome(o.samples, o.deployed_right, o.reference_right, o.only_deployed, o.only_reference)
    assert tango_bound(swapped, 0.95, "lower") == pytest.approx(-tango_bound(o, 0.95, "upper"), abs=1e-6)


@pytest.mark.parametrize("counts", [(1, 0, 0, 0), (50, 0, 0, 0), (0, 50, 0, 0), (0, 0, 50, 0), (0, 0, 0, 50)])
def test_extreme_tables_have_bounds(counts: tuple[int, int, int, int]) -> None:
    o = outcome(*counts)
    lower, upper = tango_bound(o, 0.95, "lower"), tango_bound(o, 0.95, "upper")
    assert -1 <= lower <= o.difference <= upper <= 1
    assert upper - lower > 0.03


def test_no_discordant_pair_leaves_the_doubt_of_the_sample_size() -> None:
    """Without a discordant pair the score is n d / sqrt(n |d| (1 - |d|)): the bound is z**2 / (n + z**2)."""
    for samples in (50, 540, 5000):
        expected = -(Z95**2) / (samples + Z95**2)
        assert tango_bound(outcome(samples, 0, 0, 0), 0.95, "lower") == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("samples", "discordant"), [(200, 0.05), (540, 0.04), (540, 0.10)])
def test_an_inferior_model_passes_no_oftener_than_allowed(samples: int, discordant: float) -> None:
    """Difference exactly at the margin: at most 5 % of the samples may prove non-inferiority (simulation error 1 %)."""
    margin, draws = 0.02, 4000
    only_reference, only_deployed = (discordant + margin) / 2, (discordant - margin) / 2
    rng = np.random.default_rng(1)
    tables = rng.multinomial(samples, [only_reference, only_deployed, 1 - discordant], draws)
    unique, counts = np.unique(tables, axis=0, return_counts=True)
    passes = sum(
        int(count)
        for (b, c, rest), count in zip(unique, counts, strict=True)
        if judge(outcome(int(rest), int(b), int(c), 0), margin, 0.95) == "pass"
    )
    assert passes / draws < 0.06
    assert passes / draws > 0.01


@given(OUTCOMES, st.sampled_from([0.01, 0.02, 0.1]), st.sampled_from([0.9, 0.95]))
def test_a_verdict_is_what_the_bounds_say(o: PairedOutcome, margin: float, confidence: float) -> None:
    lower, upper = tango_bound(o, confidence, "lower"), tango_bound(o, confidence, "upper")
    verdict = judge(o, margin, confidence)
    assert (verdict == "pass") == (lower > -margin)
    assert (verdict == "fail") == (upper < -margin)
    if verdict == "pass":
        assert o.difference > -margin


def test_the_three_verdicts() -> None:
    assert judge(outcome(530, 5, 5, 0), 0.02, 0.95) == "pass"
    assert judge(outcome(500, 40, 0, 0), 0.02, 0.95) == "fail"
    assert judge(outcome(90, 5, 5, 0), 0.02, 0.95) == "inconclusive"
    assert judge(outcome(98, 2, 0, 0), 0.02, 0.95) == "inconclusive"


@given(OUTCOMES, st.sampled_from([0.02, 0.05]))
def test_the_samples_to_decide_are_the_fewest_that_pass_at_the_observed_rates(o: PairedOutcome, margin: float) -> None:
    needed = samples_to_decide(o, margin, 0.95)
    if o.difference <= -margin:
        assert needed is None
        return
    assert needed is not None
    assert (needed <= o.samples) == (judge(o, margin, 0.95) == "pass")
    rounding = 3 / math.sqrt(max(needed, 1))
    larger = math.ceil(needed * (1.3 + rounding) / o.samples)
    times = PairedOutcome(
        larger * o.samples,
        larger * o.reference_right,
        larger * o.deployed_right,
        larger * o.only_reference,
        larger * o.only_deployed,
    )
    assert judge(times, margin, 0.95) == "pass"


def test_a_difference_a_hair_above_the_margin_still_ends() -> None:
    assert (samples_to_decide(outcome(98, 2, 0, 0), 0.02 + 1e-12, 0.95) or 0) > 10**9


@pytest.mark.parametrize(("right", "samples"), [(0, 10), (10, 10), (7, 20), (523, 540)])
def test_wilson_is_its_formula(right: int, samples: int) -> None:
    z, p = float(norm.ppf(0.975)), right / samples
    centre = (p + z**2 / (2 * samples)) / (1 + z**2 / samples)
    half = z / (1 + z**2 / samples) * math.sqrt(p * (1 - p) / samples + z**2 / (4 * samples**2))
    assert wilson_interval(right, samples) == pytest.approx((centre - half, centre + half), abs=1e-9)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (12, 2), (0, 9)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    total = b + c
    tail = sum(math.comb(total, k) for k in range(min(b, c) + 1)) / 2**total
    assert mcnemar(outcome(20, b, c, 3)) == pytest.approx(min(1.0, 2 * tail))


def test_pairs_are_counted_from_hits() -> None:
    reference = np.array([True, True, True, False, False])
    deployed = np.array([True, False, False, True, False])
    assert pair(reference, deployed) == PairedOutcome(5, 3, 2, 2, 1)
    assert pair(reference, deployed).difference == pytest.approx(-0.2)
