"""Surrogate gradients: what stands in for the derivative of the spike, as a table.

Every rule maps z, the distance of the membrane to its threshold in real units, to ds/dz
(METHOD: Özdenizci & Legenstein, TMLR 2024, ensemble members 1 to 17).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def _triangle(z: Tensor, width: float) -> Tensor:
    return z.abs().neg_().add_(width).clamp_(min=0).div_(width**2)


def _rectangle(z: Tensor, width: float) -> Tensor:
    return (z.abs() < width / 2).to(z.dtype).div_(width)


def _exponential(z: Tensor, width: float) -> Tensor:
    return z.abs().div_(-width).exp_()


def _arctan(z: Tensor, width: float) -> Tensor:
    return (z * (math.pi * width / 2)).square_().add_(1).reciprocal_().mul_(width / 2)


def _straight_through(z: Tensor, width: float) -> Tensor:  # noqa: ARG001
    return torch.ones_like(z)


RULES: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "triangle": _triangle,
    "rectangle": _rectangle,
    "exponential": _exponential,
    "arctan": _arctan,
    "straight_through": _straight_through,
}


class GradientRule(Protocol):
    """Anything that stands in for the derivative of the spike; adaptive rules may keep state."""

    def gradient(self, z: Tensor) -> Tensor:
        """ds/dz at every z ``(steps, samples, ...)``."""
        ...


@dataclass(frozen=True)
class Surrogate:
    """A rule of ``RULES`` with its width and height.

    Attributes:
        rule: name of the rule.
        width: real units (for arctan, its slope).
        height: factor on the whole gradient.
    """

    rule: str
    width: float = 1.0
    height: float = 1.0

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.rule} {self.width:g}" + (f" x{self.height:g}" if self.height != 1 else "")

    def gradient(self, z: Tensor) -> Tensor:
        """ds/dz at every z."""
        slope = RULES[self.rule](z, self.width)
        return slope if self.height == 1 else self.height * slope


TRIANGLE = Surrogate("triangle", 1.0)
