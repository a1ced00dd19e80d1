"""Statistics of paired accuracies: what a check may conclude from n images judged by two models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest, norm

Verdict = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True)
class PairedOutcome:
    """Two models on the same images.

    Attributes:
        samples: number of images.
        reference_right, deployed_right: how many each classified correctly.
        only_reference, only_deployed: discordant pairs.
    """

    samples: int
    reference_right: int
    deployed_right: int
    only_reference: int
    only_deployed: int

    @property
    def difference(self) -> float:
        """Deployed minus reference accuracy."""
        return (self.only_deployed - self.only_reference) / self.samples


def pair(reference: NDArray[np.bool_], deployed: NDArray[np.bool_]) -> PairedOutcome:
    """Count from which images each model got right."""
    return PairedOutcome(
        len(reference),
        int(reference.sum()),
        int(deployed.sum()),
        int((reference & ~deployed).sum()),
        int((~reference & deployed).sum()),
    )


def tango_score(outcome: PairedOutcome, difference: float) -> float:
    """Score statistic of the hypothesis that deployed - reference accuracy is ``difference`` (Tango, 1998).

    With n pairs, c only right when deployed and b only on the reference::

        z = (c - b - n d) / sqrt(n (2 q + d (1 - d)))

    where q, the probability of "only reference", is its maximum-likelihood estimate under the hypothesis:
    the larger root of 2n q^2 + (-b - c + (2n + b - c) d) q - b d (1 - d) = 0.

    T. Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17 (1998) 891-908.
    """
    return _score(outcome.samples, outcome.only_reference, outcome.only_deployed, difference)


def _score(n: float, b: float, c: float, difference: float) -> float:
    linear = -b - c + (2 * n + b - c) * difference
    constant = -b * difference * (1 - difference)
    q = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
    variance = n * (2 * q + difference * (1 - difference))
    numerator = c - b - n * difference
    if variance <= 0:
        return math.copysign(math.inf, numerator) if numerator else 0.0
    return numerator / math.sqrt(variance)


def tango_bound(outcome: PairedOutcome, confidence: float, side: Literal["lower", "upper"]) -> float:
    """One-sided confidence bound of deployed - reference accuracy, by inverting :func:`tango_score`."""
    target = float(norm.ppf(confidence)) * (1 if side == "lower" else -1)
    edge = 1 - 1e-9
    low, high = (-edge, outcome.difference) if side == "lower" else (outcome.difference, edge)
    excess_low = tango_score(outcome, low) - target
    if excess_low * (tango_score(outcome, high) - target) > 0:
        return -1.0 if side == "lower" else 1.0
    return float(brentq(lambda d: tango_score(outcome, d) - target, low, high, xtol=1e-10))


def wilson_interval(right: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Wilson interval of an accuracy."""
    interval = binomtest(right, samples).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(outcome: PairedOutcome) -> float:
    """Exact two-sided p-value that both models are equally often right."""
    discordant = outcome.only_reference + outcome.only_deployed
    return 1.0 if discordant == 0 else float(binomtest(outcome.only_reference, discordant).pvalue)


def judge(outcome: PairedOutcome, margin: float, confidence: float) -> Verdict:
    """Non-inferior at the margin, inferior to it, or neither proven."""
    if tango_bound(outcome, confidence, "lower") > -margin:
        return "pass"
    return "fail" if tango_bound(outcome, confidence, "upper") < -margin else "inconclusive"


def samples_to_decide(outcome: PairedOutcome, margin: float, confidence: float) -> int | None:
    """Images that would prove non-inferiority if the observed rates hold; None if they lie at or beyond the margin."""
    if outcome.difference + margin <= 0:
        return None
    target = float(norm.ppf(confidence))

    def proves(samples: int) -> bool:
        share = samples / outcome.samples
        return _score(samples, share * outcome.only_reference, share * outcome.only_deployed, -margin) > target

    low, high = 0, outcome.samples
    while not proves(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if proves(middle) else (middle, high)
    return high
