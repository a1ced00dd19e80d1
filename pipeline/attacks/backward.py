"""How gradients flow back through spikes: the rows of every ensemble, as data.

The forward pass is the true model for all of them; only the conversion rules also run a proxy, and only to
differentiate it (Özdenizci & Legenstein, TMLR 2024, section on the adversarial ensemble).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hardware.surrogates import AdaptiveSurrogate, GradientRule, Rate, Surrogate


@dataclass(frozen=True)
class Adaptive:
    """ASSG: an arctangent surrogate whose width follows each neuron's distance to its threshold (arXiv 2512.22522).

    Attributes:
        share: the constant a of the method, between 0 and 1/2; the paper finds about 0.4 by search.
        warm_start: see :class:`~hardware.surrogates.AdaptiveSurrogate`; not in the paper.
    """

    share: float = 0.4
    warm_start: bool = False

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"ASSG {self.share:g}" + (" warm" if self.warm_start else "")


@dataclass(frozen=True)
class Conversion:
    """Differentiate a proxy in which every neuron is a ReLU, or with ``clipped`` the rate clip(x / threshold, 0, 1)."""

    clipped: bool

    @property
    def name(self) -> str:
        """How tables call it."""
        return "clipped ReLU" if self.clipped else "ReLU"


Backward = Surrogate | Rate | Adaptive | Conversion


def begin(backward: Surrogate | Rate | Adaptive, neurons: Iterable[str]) -> dict[str, GradientRule] | Surrogate | Rate:
    """The rules of one attack on one batch; stateful ones start afresh in every layer."""
    if isinstance(backward, Adaptive):
        return {name: AdaptiveSurrogate(backward.share, backward.warm_start) for name in neurons}
    return backward
