"""Surrogate gradients: what stands in for the derivative of the spike, as a table.

Every gradient rule maps z, the distance of the membrane to its threshold in real units, to ds/dz; ``RATE`` replaces
the whole way back through a neuron (Özdenizci & Legenstein, TMLR 2024, ensemble members 1 to 18).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from hardware.errors import SpikeguardError


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

ENSEMBLE: tuple[Surrogate, ...] = (
    *(Surrogate("triangle", width) for width in (1.0, 2.0, 3.0, 0.5, 0.25)),
    *(Surrogate("exponential", width, height) for height in (0.3, 1.0) for width in (2.0, 1.0, 0.5)),
    *(Surrogate("rectangle", width) for width in (0.25, 0.5, 1.0, 2.0, 4.0)),
    Surrogate("straight_through"),
)
"""Members 1 to 17 of the method's ensemble, in its order."""


@dataclass(frozen=True)
class Rate:
    """Backward through the firing rate (member 18): no recursion through time, neurons that never spike are cut.

    With x the input of a step in real units and s the spikes: ``dL/dx_t = dL/ds_t [mean_t s > 0]``.
    """

    @property
    def name(self) -> str:
        """How tables call it."""
        return "rate"


RATE = Rate()

SpikeRule = GradientRule | Rate
"""How gradients pass a spiking neuron."""


@dataclass(eq=False)
class AdaptiveSurrogate:
    """ASSG (arXiv 2512.22522): an arctangent whose width follows the typical distance to the threshold.

    Per neuron, step and iteration, with ``w = (2 / pi) tan(pi share)``::

        M <- 0.9 M + 0.1 |z|    D <- 0.9 D + 0.1 ||z| - M|    slope = w / (M + 1.5 D + 1e-4)

    so that ``share`` of the surrogate's unit area lies between the threshold and ``M + 1.5 D`` on either side. It keeps
    state: every call is one iteration, so each layer and each attack run needs an instance of its own.

    Attributes:
        share: above 0 and below 0.5.
        warm_start: M starts at the first ``|z|`` instead of 1 as published. Not from the paper: it spares the first
            twenty or so iterations, in which M only finds its scale.

    Raises:
        SpikeguardError: if ``share`` is not in its range.
    """

    share: float = 0.4
    warm_start: bool = False
    _mean: Tensor | None = field(default=None, init=False, repr=False)
    _deviation: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.share < 0.5:
            raise SpikeguardError(f"the adaptive surrogate's share is {self.share:g}; choose one between 0 and 0.5")

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"adaptive {self.share:g}"

    @torch.no_grad()
    def gradient(self, z: Tensor) -> Tensor:
        """ds/dz at every z ``(steps, samples, ...)``, after one more iteration of M and D.

        Raises:
            SpikeguardError: if z has another shape than in the first call.
        """
        if self._mean is None or self._deviation is None:
            self._mean = z.abs() if self.warm_start else torch.ones_like(z)
            self._deviation = torch.zeros_like(z)
        if self._mean.shape != z.shape:
            raise SpikeguardError(
                f"the adaptive surrogate follows neurons {tuple(self._mean.shape)} and was given {tuple(z.shape)}; "
                "make a new one for each layer and each attack run"
            )
        distance = z.abs()
        self._mean.lerp_(distance, 0.1)
        self._deviation.lerp_(distance.sub_(self._mean).abs_(), 0.1)
        width = torch.add(self._mean, self._deviation, alpha=1.5).add_(1e-4)
        half_slope = width.reciprocal_().mul_(math.tan(math.pi * self.share) / math.pi)
        return half_slope / (half_slope * z).mul_(math.pi).square_().add_(1)
