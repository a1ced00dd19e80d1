"""Looking at a check before all of its images were attacked, without spending the probability of error twice.

A group-sequential test with the spending function of Lan & DeMets that follows O'Brien & Fleming: of the error alpha,
``2 - 2 Phi(z / sqrt(t))``, z the normal quantile of ``1 - alpha / 2``, may be spent by the time the share t of the
images was looked at. The critical values follow from the joint distribution of score statistics on growing samples,
that of a Brownian motion seen at the shares, by integrating over where it was not stopped before.

K. K. G. Lan & D. L. DeMets, Discrete sequential boundaries for clinical trials, Biometrika 70 (1983) 659-663.
P. Armitage, C. K. McPherson & B. C. Rowe, Repeated significance tests on accumulating data, Journal of the Royal
Statistical Society A 132 (1969) 235-244.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm

Float64Array = NDArray[np.float64]
POINTS, REACH = 801, 9.0
"""Grid that densities are integrated on, and its lower end in standard deviations."""


def spent(share: float, alpha: float) -> float:
    """One-sided error that may be spent when a share of the images was looked at."""
    return float(2 * norm.sf(norm.ppf(1 - alpha / 2) / math.sqrt(share)))


def critical_values(shares: Sequence[float], alpha: float) -> list[float]:
    """Values that the standard normal statistic must exceed at each look.

    Args:
        shares: of all images, growing, the last one 1.
        alpha: one-sided error of all looks together.
    """
    values: list[float] = []
    places, density = np.zeros(1), np.ones(1)
    before, used = 0.0, 0.0
    for share in shares:
        deviation = math.sqrt(share - before)
        allowed = spent(share, alpha) - used

        def excess(bound: float, places: Float64Array = places, density: Float64Array = density,
                   deviation: float = deviation, allowed: float = allowed) -> float:  # fmt: skip
            return float(density @ norm.sf((bound - places) / deviation)) - allowed

        bound = float(brentq(excess, -REACH, REACH, xtol=1e-10))
        values.append(bound / math.sqrt(share))
        reached = np.linspace(-REACH * math.sqrt(share), bound, POINTS)
        weights = np.full(POINTS, reached[1] - reached[0])
        weights[[0, -1]] /= 2
        moved = norm.pdf((reached[:, None] - places) / deviation) / deviation
        places, density = reached, weights * (moved @ density)
        before, used = share, spent(share, alpha)
    return values


def confidences(looks: Sequence[int], confidence: float) -> list[float]:
    """One-sided confidence of each look's bounds, so that those of all looks hold together with ``confidence``.

    Args:
        looks: images at each look, growing; the last is all of them.
        confidence: of the whole check.
    """
    if len(looks) == 1:
        return [confidence]
    shares = [count / looks[-1] for count in looks]
    return [float(norm.cdf(value)) for value in critical_values(shares, 1 - confidence)]


def look_sizes(samples: int, looks: int) -> list[int]:
    """Images at each of some looks, equally far apart; fewer looks where there are too few images."""
    return sorted({max(1, round(samples * look / looks)) for look in range(1, looks + 1)})
