"""What attacks maximise: one number per sample from logits in real units and labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hardware.errors import SpikeguardError


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y."""
    return F.cross_entropy(logits, labels, reduction="none")


def difference_of_logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """DLR: -(z_y - max_{i != y} z_i) / (z_(1) - z_(3)), blind to the scale of the logits (Croce & Hein, ICML 2020).

    Raises:
        SpikeguardError: with fewer than 3 classes, where it is not defined.
    """
    _require_classes(logits, 3, "DLR")
    ordered, order = logits.sort(dim=1)
    right = _own(logits, labels)
    is_best = order[:, -1] == labels
    best_other = torch.where(is_best, ordered[:, -2], ordered[:, -1])
    return -(right - best_other) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def targeted_difference_of_logits_ratio(rank: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Targeted DLR towards the class of the ``rank``-th largest logit on the first images asked about.

    -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2). The target class is chosen at the first question and kept, so each
    batch needs a fresh one.

    Args:
        rank: 2 for the runner-up, 3 for the next, and so on.

    Raises:
        SpikeguardError: when asked, with fewer than 4 classes or fewer than ``rank``.
    """
    chosen: list[Tensor] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        _require_classes(logits, 4, "targeted DLR")
        if rank > logits.shape[1]:
            raise SpikeguardError(
                f"targeted DLR aims at class {rank} by likelihood, the model has {logits.shape[1]}; choose a lower rank"
            )
        if not chosen:
            chosen.append(_nth_other(logits.detach(), labels, rank - 1))
        ordered = logits.sort(dim=1).values
        towards = _own(logits, chosen[0])
        return -(_own(logits, labels) - towards) / (ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + 1e-12)

    return loss


def _own(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None])[:, 0]


def _nth_other(logits: Tensor, labels: Tensor, n: int) -> Tensor:
    """The n-th most likely class that is not the label (n = 1: the most likely)."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.argsort(dim=1, descending=True)[:, n - 1]


def _require_classes(logits: Tensor, least: int, name: str) -> None:
    if logits.shape[1] < least:
        raise SpikeguardError(
            f"{name} needs {least} classes, the model has {logits.shape[1]}; attack it with the cross-entropy"
        )
