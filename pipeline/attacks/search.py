"""The ground all gradient attacks stand on: rounding to codes, the budget, and any-iterate success."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.attacks.targets import Answer, Codes, Labels, Oracle


@dataclass(frozen=True)
class Crafted:
    """What an attack made of each image.

    Attributes:
        codes: uint8 ``(samples, *shape)`` within the budget: of the images that fooled the target (else of all that
            were tried) the one with the highest loss, because one that barely fools one model rarely fools another.
        fooled: bool ``(samples,)``, as the target itself answered during the attack.
        strength: float64 ``(samples,)``, cross-entropy of the kept image; -inf where none was tried.
        zero_gradients: share of input gradients that were exactly zero over a whole image; None without gradients.
        gradients: input gradients computed, images times steps; queries for attacks that only ask.
    """

    codes: Codes
    fooled: NDArray[np.bool_]
    strength: NDArray[np.float64]
    zero_gradients: float | None
    gradients: int


class Search:
    """The iterates of one attack on one batch.

    Iterates are floats in code units. Each is projected into the budget and rounded before the oracle sees it, so
    what fooled the target is what is returned.

    Args:
        oracle: answers about the batch.
        codes: uint8 ``(samples, *shape)``, the clean images.
        labels: ``(samples,)``.
        budget: l-infinity radius in codes.
        generators: one per image, so that neither order nor batching changes a start.
    """

    def __init__(
        self, oracle: Oracle, codes: Codes, labels: Labels, budget: int, generators: list[np.random.Generator]
    ) -> None:
        self._oracle = oracle
        self.clean = torch.from_numpy(codes.astype(np.float32))
        self.labels = torch.from_numpy(labels)
        self.budget = budget
        self.generators = generators
        self._low = (self.clean - budget).clamp(min=0)
        self._high = (self.clean + budget).clamp(max=255)
        self._kept = self.clean.clone()
        self._fooled = torch.zeros(len(codes), dtype=torch.bool)
        self._strength = torch.full((len(codes),), -torch.inf, dtype=torch.float64)
        self._zero = self._gradients = 0

    def project(self, iterate: Tensor) -> Tensor:
        """Into the budget and the range of codes."""
        return iterate.clamp(self._low, self._high)

    def uniform_start(self) -> Tensor:
        """A point of the budget, uniformly."""
        noise = np.stack([g.uniform(-1, 1, self.clean.shape[1:]) for g in self.generators])
        return self.project(self.clean + self.budget * torch.from_numpy(noise.astype(np.float32)))

    def normal_signs(self) -> Tensor:
        """Signs of standard normal noise."""
        noise = np.stack([g.standard_normal(self.clean.shape[1:]) for g in self.generators])
        return torch.from_numpy(noise.astype(np.float32)).sign()

    def ask(self, iterate: Tensor, differentiate: bool = True) -> tuple[Tensor, Tensor]:
        """Loss, and gradient scaled to a largest entry of 1 per image, at the rounded iterate; it is remembered.

        Steep surrogates compound over steps and layers until float32 overflows or underflows, hence the scaling.
        """
        shown = iterate.round()
        answer = self._oracle(shown / 255, self.labels, differentiate)
        self._remember(shown, answer)
        if answer.gradient is None:
            return answer.loss, torch.zeros(0)
        self._zero += int((answer.gradient.flatten(1).abs().amax(1) == 0).sum())
        self._gradients += len(shown)
        return answer.loss, unit_gradient(answer.gradient)

    def _remember(self, shown: Tensor, answer: Answer) -> None:
        stronger = (answer.fooled == self._fooled) & (answer.strength > self._strength)
        better = (answer.fooled & ~self._fooled) | stronger
        self._kept[better] = shown[better]
        self._strength[better] = answer.strength[better].double()
        self._fooled |= answer.fooled

    def result(self) -> Crafted:
        """What was found."""
        return Crafted(
            self._kept.numpy().astype(np.uint8),
            self._fooled.numpy(),
            self._strength.numpy(),
            self._zero / self._gradients if self._gradients else None,
            self._gradients,
        )


def unit_gradient(gradient: Tensor) -> Tensor:
    """A gradient divided by its largest magnitude per image; infinities are large, NaN is nothing, zero stays zero."""
    finite = torch.nan_to_num(gradient.double(), nan=0.0)
    largest = finite.flatten(1).abs().amax(1).view(-1, *([1] * (gradient.ndim - 1)))
    return torch.where(largest > 0, finite / largest.clamp(min=torch.finfo(torch.float64).tiny), finite).float()


def generators_of(indices: NDArray[np.int64], seed: int, restart: int) -> list[np.random.Generator]:
    """One random generator per image, from the seed, the restart and the image's index in its data set."""
    return [np.random.default_rng([seed, restart, int(index)]) for index in indices]


def batches(samples: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size``."""
    for first in range(0, samples, size):
        yield slice(first, min(first + size, samples))


def join(parts: list[Crafted], like: Codes) -> Crafted:
    """Results of consecutive batches as one; ``like`` gives the shape if there were none."""
    if not parts:
        return Crafted(like.copy(), np.zeros(0, bool), np.zeros(0), None, 0)
    gradients = sum(part.gradients for part in parts)
    zero = sum((part.zero_gradients or 0.0) * part.gradients for part in parts)
    with_gradients = any(part.zero_gradients is not None for part in parts)
    return Crafted(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.fooled for part in parts]),
        np.concatenate([part.strength for part in parts]),
        zero / gradients if with_gradients and gradients else None,
        gradients,
    )
