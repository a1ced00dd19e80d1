"""PGD on a spiking model: the forward pass is the true model on pixel codes, only the gradient is a surrogate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hardware.surrogates import Surrogate
from pipeline.attacks.targets import BATCH, Codes, GradientTarget, Labels


@dataclass(frozen=True)
class Crafted:
    """What an attack made of each image.

    Attributes:
        codes: uint8 ``(samples, *shape)`` within the budget: of the images that fooled the target (else of all that
            were tried) the one with the highest loss, because one that barely fools one model rarely fools another.
        fooled: bool ``(samples,)``, as the target itself answered during the attack.
        zero_gradients: share of input gradients that were exactly zero over a whole image; None without gradients.
        queries: forward passes per image at most.
    """

    codes: Codes
    fooled: NDArray[np.bool_]
    zero_gradients: float | None
    queries: int


def pgd(
    target: GradientTarget,
    codes: Codes,
    labels: Labels,
    indices: NDArray[np.int64],
    *,
    budget: int,
    steps: int,
    surrogate: Surrogate,
    seed: int,
    advance: Callable[..., None] = lambda *_, **__: None,
) -> Crafted:
    """Projected gradient descent on the cross-entropy, uniform start, steps of 2.5 budget / steps.

    Every iterate counts, and is rounded to codes before it is shown: what fooled the target is what is returned.

    Args:
        target: what is attacked.
        codes: uint8 ``(samples, *shape)``, the clean images.
        labels: ``(samples,)``.
        indices: of the images in their data set; they seed the starts, so batching changes nothing.
        budget: l-infinity radius in codes.
        steps: gradient steps.
        surrogate: gradient of the spikes.
        seed: of the random starts.
        advance: told about every finished image.
    """
    result = codes.copy()
    fooled = np.zeros(len(codes), bool)
    zero, total = 0, 0
    for first in range(0, len(codes), BATCH):
        part = slice(first, first + BATCH)
        part_codes, part_fooled, part_zero, part_total = _attack_batch(
            target, codes[part], labels[part], indices[part], budget, steps, surrogate, seed
        )
        result[part], fooled[part] = part_codes, part_fooled
        zero, total = zero + part_zero, total + part_total
        advance(units=len(part_codes))
    return Crafted(result, fooled, zero / max(total, 1), steps + 1)


def _attack_batch(
    target: GradientTarget,
    codes: Codes,
    labels: Labels,
    indices: NDArray[np.int64],
    budget: int,
    steps: int,
    surrogate: Surrogate,
    seed: int,
) -> tuple[Codes, NDArray[np.bool_], int, int]:
    clean = torch.from_numpy(codes.astype(np.float32))
    low, high = (clean - budget).clamp(min=0), (clean + budget).clamp(max=255)
    iterate = (clean + random_starts(codes.shape, indices, budget, seed)).clamp(low, high)
    truth = torch.from_numpy(labels)
    kept, fooled = clean.clone(), torch.zeros(len(codes), dtype=torch.bool)
    kept_loss = torch.full((len(codes),), -torch.inf)
    zero = 0
    for step in range(steps + 1):
        shown = iterate.round()
        images = (shown / 255).requires_grad_(step < steps)
        logits = target.forward(images, surrogate)
        losses = F.cross_entropy(logits, truth, reduction="none")
        wrong = logits.argmax(1) != truth
        better = (wrong & ~fooled) | ((wrong == fooled) & (losses > kept_loss))
        kept[better], kept_loss[better] = shown[better], losses.detach()[better].float()
        fooled |= wrong
        if step < steps:
            (gradient,) = torch.autograd.grad(losses.sum(), images)
            zero += int((gradient.flatten(1).abs().amax(1) == 0).sum())
            iterate = (iterate + 2.5 * budget / steps * gradient.sign()).clamp(low, high)
    return kept.numpy().astype(np.uint8), fooled.numpy(), zero, steps * len(codes)


def random_starts(shape: tuple[int, ...], indices: NDArray[np.int64], budget: int, seed: int) -> Tensor:
    """Uniform perturbations in [-budget, budget], one generator per image so that order and batching do not matter."""
    starts = np.empty(shape, np.float32)
    for row, index in enumerate(indices):
        starts[row] = np.random.default_rng([seed, int(index)]).uniform(-budget, budget, shape[1:])
    return torch.from_numpy(starts)
