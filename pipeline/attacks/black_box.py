"""Attacks that only ask: random noise, and the Square attack (Andriushchenko et al., ECCV 2020)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from pipeline.attacks.search import Crafted, generators_of
from pipeline.attacks.targets import Codes, Labels, Logits, Target

INITIAL_SHARE = 0.8
REPORT_QUERIES = 50
# The share of the image a square covers is halved at these fractions of the queries.
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def random_noise(codes: Codes, indices: NDArray[np.int64], *, budget: int, seed: int) -> Codes:
    """Every pixel moved by the whole budget, up or down at random, then clipped to 0..255."""
    noisy = np.empty_like(codes)
    for row, index in enumerate(indices):
        signs = np.random.default_rng([seed, int(index)]).choice((-budget, budget), codes.shape[1:])
        noisy[row] = np.clip(codes[row].astype(np.int64) + signs, 0, 255)
    return noisy


def margins(logits: Logits, labels: Labels) -> NDArray[np.float64]:
    """Logit of the label minus the largest other one; negative once fooled, 0 counts as fooled if argmax says so."""
    rows = np.arange(len(labels))
    others = logits.copy()
    others[rows, labels] = -np.inf
    difference: NDArray[np.float64] = logits[rows, labels] - others.max(1)
    return difference


def square(
    target: Target,
    codes: Codes,
    labels: Labels,
    indices: NDArray[np.int64],
    *,
    budget: int,
    queries: int,
    seed: int,
    advance: Callable[..., None] = lambda *_, **__: None,
) -> Crafted:
    """Random search over squares of +-budget, keeping what lowers the margin.

    Args:
        target: only asked for logits.
        codes: uint8 ``(samples, channels, height, width)``, the clean images.
        labels: ``(samples,)``.
        indices: of the images in their data set; they seed the search, so batching changes nothing.
        budget: l-infinity radius in codes.
        queries: per image at most.
        seed: of the search.
        advance: told now and then how many images are left.
    """
    if len(codes) == 0:
        return Crafted(codes.copy(), np.zeros(0, bool), np.zeros(0), None, 0)
    clean = codes.astype(np.int64)
    low, high = np.maximum(clean - budget, 0), np.minimum(clean + budget, 255)
    _, channels, height, width = codes.shape
    generators = generators_of(indices, seed, 0)
    stripes = np.stack([g.choice((-budget, budget), (channels, 1, width)) for g in generators])
    best = np.clip(clean + stripes, low, high).astype(np.uint8)
    logits = target.logits(best)
    best_logits, best_margin, fooled = logits.copy(), margins(logits, labels), logits.argmax(1) != labels
    asked = len(codes)
    for query in range(1, queries):
        alive = np.flatnonzero(~fooled)
        if len(alive) == 0:
            break
        if query % REPORT_QUERIES == 0:
            advance(f"Square {query} of {queries}, {len(alive)} left", units=0)
        halvings = sum(query / queries > fraction for fraction in HALVINGS)
        side = max(1, round(np.sqrt(INITIAL_SHARE * 0.5**halvings * height * width)))
        side = min(side, height, width)
        proposal = best[alive].copy()
        for row, image in enumerate(alive):
            generator = generators[image]
            y, x = (int(generator.integers(size - side + 1)) for size in (height, width))
            sign = generator.choice((-budget, budget), (channels, 1, 1))
            window = (slice(None), slice(y, y + side), slice(x, x + side))
            moved = clean[image][window] + sign
            proposal[row][window] = np.clip(moved, low[image][window], high[image][window])
        logits = target.logits(proposal)
        asked += len(alive)
        margin, wrong = margins(logits, labels[alive]), logits.argmax(1) != labels[alive]
        better = (margin < best_margin[alive]) | wrong
        rows = alive[better]
        best[rows], best_margin[rows], best_logits[rows] = proposal[better], margin[better], logits[better]
        fooled[alive[wrong]] = True
    strength = logsumexp(best_logits, axis=1) - best_logits[np.arange(len(labels)), labels]
    return Crafted(best, fooled, strength, None, asked)
