"""What can be attacked: anything that answers with logits, and more easily if it gives gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hardware.emulator import Emulator
from hardware.network import IntegerNetwork
from hardware.surrogates import Surrogate
from hardware.twin import Twin
from pipeline.models.spiking import SpikingNetwork

Codes = NDArray[np.uint8]
Labels = NDArray[np.int64]
Logits = NDArray[np.float64]
BATCH = 128


class Target(Protocol):
    """A model that answers queries: uint8 codes ``(samples, *shape)`` to logits ``(samples, classes)``."""

    @property
    def name(self) -> str:
        """How reports call it."""
        ...

    def logits(self, codes: Codes) -> Logits:
        """Logits in real units, on which attacks and judgements rest."""
        ...


class GradientTarget(Target, Protocol):
    """A model whose answers can also be differentiated, through a chosen surrogate."""

    def forward(self, images: Tensor, surrogate: Surrogate) -> Tensor:
        """Logits of images in [0, 1] that lie on the code grid, with gradients to the images."""
        ...


@dataclass(frozen=True)
class FloatTarget:
    """The float SNN (in eval mode)."""

    network: SpikingNetwork
    name: str = "float"

    def logits(self, codes: Codes) -> Logits:
        """See :class:`Target`."""
        with torch.no_grad():
            parts = [self.network(to_images(codes[i : i + BATCH])) for i in range(0, len(codes), BATCH)]
        return torch.cat(parts).double().numpy()

    def forward(self, images: Tensor, surrogate: Surrogate) -> Tensor:
        """See :class:`GradientTarget`."""
        logits: Tensor = self.network(images, surrogate)
        return logits


@dataclass(frozen=True)
class IntegerTarget:
    """The deployed integer model: answers from the emulator, gradients through its differentiable twin."""

    network: IntegerNetwork
    name: str = "integer"

    @cached_property
    def _emulator(self) -> Emulator:
        return Emulator(self.network)

    @cached_property
    def _twin(self) -> Twin:
        return Twin(self.network)

    def logits(self, codes: Codes) -> Logits:
        """See :class:`Target`."""
        return self.network.logits(self._emulator.run(codes).readouts)

    def forward(self, images: Tensor, surrogate: Surrogate) -> Tensor:
        """See :class:`GradientTarget`."""
        logits: Tensor = self._twin.with_surrogate(surrogate)(images)
        return logits


def to_images(codes: Codes) -> Tensor:
    """Codes as float32 images in [0, 1]."""
    return torch.from_numpy(codes).float() / 255


def correct(target: Target, codes: Codes, labels: Labels) -> NDArray[np.bool_]:
    """Which images the target classifies correctly."""
    hits: NDArray[np.bool_] = target.logits(codes).argmax(1) == labels
    return hits


def budget_of(epsilon: float) -> int:
    """An l-infinity radius in pixel units as whole codes, rounded down so that results stay inside it."""
    return int(epsilon * 255 + 1e-9)
