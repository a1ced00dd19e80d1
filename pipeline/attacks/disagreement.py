"""Attacks on the difference of two models: one stays right while the other goes wrong (DIVA, arXiv 2204.10933)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.attacks.backward import Backward
from pipeline.attacks.losses import cross_entropy
from pipeline.attacks.search import Crafted, Search, batches, generators_of, join, unit_gradient
from pipeline.attacks.steps import WALKS
from pipeline.attacks.targets import BATCH, Answer, Codes, GradientTarget, Labels, Oracle


@dataclass
class DisagreementOracle:
    """Success is "``right`` right, ``wrong`` wrong"; the loss is the difference of their cross-entropies.

    The two gradients are brought to the same size first, so that neither model's scale drowns the other.
    """

    right: Oracle
    wrong: Oracle

    def __call__(self, images: Tensor, labels: Tensor, differentiate: bool) -> Answer:
        """See :class:`~pipeline.attacks.targets.Oracle`."""
        stays, goes = (oracle(images, labels, differentiate) for oracle in (self.right, self.wrong))
        loss = goes.strength - stays.strength
        gradient = None
        if goes.gradient is not None and stays.gradient is not None:
            gradient = unit_gradient(goes.gradient) - unit_gradient(stays.gradient)
        return Answer(goes.fooled & ~stays.fooled, loss, loss, gradient)


def disagree(
    right: GradientTarget,
    wrong: GradientTarget,
    codes: Codes,
    labels: Labels,
    indices: NDArray[np.int64],
    *,
    backward: Backward,
    walk: str,
    steps: int,
    budget: int,
    seed: int,
    advance: Callable[..., None] = lambda *_, **__: None,
) -> Crafted:
    """Images that ``right`` classifies correctly and ``wrong`` does not.

    Args:
        right, wrong: the model that is to stay right, and the one that is to go wrong.
        backward, walk, steps: as in :class:`~pipeline.attacks.ensemble.Member`.
        codes, labels, indices, budget, seed, advance: as for :func:`~pipeline.attacks.ensemble.run_member`.
    """
    parts = []
    for part in batches(len(codes), BATCH):
        oracle = DisagreementOracle(right.oracle(backward, cross_entropy), wrong.oracle(backward, cross_entropy))
        search = Search(oracle, codes[part], labels[part], budget, generators_of(indices[part], seed, 0))
        WALKS[walk](search, steps)
        parts.append(search.result())
        advance(units=len(labels[part]))
    return join(parts, codes)
