"""An ensemble of surrogate gradients as a table; each member is judged on the true model, survivors go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hardware.surrogates import Surrogate
from pipeline.attacks.gradient import Crafted, pgd
from pipeline.attacks.targets import Codes, GradientTarget, Labels, correct

# Ordered by yield measured on the digits network: the first members leave little work for the others.
QUICK: tuple[Surrogate, ...] = (
    Surrogate("triangle", 1.0),
    Surrogate("triangle", 0.5),
    Surrogate("triangle", 2.0),
    Surrogate("rectangle", 1.0),
)


def pgd_ensemble(
    target: GradientTarget,
    codes: Codes,
    labels: Labels,
    indices: NDArray[np.int64],
    *,
    budget: int,
    steps: int,
    seed: int,
    members: Sequence[Surrogate] = QUICK,
    advance: Callable[..., None] = lambda *_, **__: None,
) -> Crafted:
    """PGD through each member in turn, on the images that none before has fooled the target with.

    Images the target gets wrong without help are returned as they are. Arguments and result as for
    :func:`pipeline.attacks.gradient.pgd`; ``zero_gradients`` is the mean over the members that ran.
    """
    result = codes.copy()
    fooled = ~correct(target, codes, labels)
    advance(units=int(fooled.sum()) * len(members))
    shares, queries = [], 1
    for position, surrogate in enumerate(members):
        alive = np.flatnonzero(~fooled)
        if len(alive) == 0:
            break
        crafted = pgd(
            target,
            codes[alive],
            labels[alive],
            indices[alive],
            budget=budget,
            steps=steps,
            surrogate=surrogate,
            seed=seed + position,
            advance=advance,
        )
        advance(f"{surrogate.name}: {int(crafted.fooled.sum())} more", units=0)
        result[alive] = crafted.codes
        fooled[alive] = crafted.fooled
        advance(units=int(crafted.fooled.sum()) * (len(members) - position - 1))
        shares.append(crafted.zero_gradients or 0.0)
        queries += crafted.queries
    return Crafted(result, fooled, float(np.mean(shares)) if shares else 0.0, queries)
