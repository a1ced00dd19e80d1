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
from hardware.surrogate_kernels import NOT_SEEN, adapt


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

    @property
    def half_width(self) -> float:
        """w / 2, which all slopes are proportional to."""
        return math.tan(math.pi * self.share) / math.pi

    def running_means(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """M and D, to be moved in place; made in the first call. Below 0, M has not seen its neuron.

        Args:
            like: of the shape, type and order in memory of z; its values are not read.

        Raises:
            SpikeguardError: if its shape is not that of the first call.
        """
        if self._mean is None or self._deviation is None:
            self._mean = torch.full_like(like, NOT_SEEN if self.warm_start else 1)
            self._deviation = torch.zeros_like(like)
        if self._mean.shape != like.shape:
            raise SpikeguardError(
                f"the adaptive surrogate follows neurons {tuple(self._mean.shape)} and was given {tuple(like.shape)}; "
                "make a new one for each layer and each attack run"
            )
        return self._mean, self._deviation

    @torch.no_grad()
    def gradient(self, z: Tensor) -> Tensor:
        """ds/dz at every z ``(steps, samples, ...)``, after one more iteration of M and D.

        Raises:
            SpikeguardError: if z has another shape than in the first call.
        """
        mean, deviation = self.running_means(z)
        if z.device.type == "cpu" and z.dtype in (torch.float32, torch.float64):
            return _adapt_compiled(z, self.half_width, mean, deviation)
        return adapt_in_torch(z, self.half_width, mean, deviation)


def _adapt_compiled(z: Tensor, half_width: float, mean: Tensor, deviation: Tensor) -> Tensor:
    slopes = torch.empty_like(mean)
    # Layers have their channels last in memory; all arrays are walked in the order of M's.
    order = sorted(range(mean.ndim), key=mean.stride, reverse=True)
    distances = z.detach().permute(order).reshape(-1).numpy()
    moved = (values.permute(order).view(-1).numpy() for values in (mean, deviation, slopes))
    adapt(distances, distances.dtype.type(half_width), *moved)
    return slopes


def adapt_in_torch(z: Tensor, half_width: float, mean: Tensor, deviation: Tensor) -> Tensor:
    """:func:`hardware.surrogate_kernels.adapt` for devices and types that are not compiled for."""
    distance = z.abs()
    mean.copy_(torch.where(mean < 0, distance, mean)).lerp_(distance, 0.1)
    deviation.lerp_(distance.sub_(mean).abs_(), 0.1)
    width = torch.add(mean, deviation, alpha=1.5).add_(1e-4)
    half_slope = width.reciprocal_().mul_(half_width)
    return half_slope / (half_slope * z).mul_(math.pi).square_().add_(1)
