"""What can be attacked: anything that answers with logits, and more easily if it gives gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hardware.emulator import Emulator
from hardware.network import IntegerNetwork
from hardware.runtimes.protocol import Runtime
from hardware.twin import Twin
from pipeline.attacks.backward import Backward, Conversion, begin
from pipeline.models.folded import FoldedNetwork
from pipeline.models.spiking import SpikingNetwork

Codes = NDArray[np.uint8]
Labels = NDArray[np.int64]
Logits = NDArray[np.float64]
Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits ``(samples, classes)`` and labels to one loss per sample, which an attack maximises."""
BATCH = 128


@dataclass(frozen=True)
class Answer:
    """What an oracle says about a batch of images.

    Attributes:
        fooled: bool ``(samples,)``, judged on the true model.
        strength: float ``(samples,)``; of two images that both fool (or both fail), the stronger one is kept.
        loss: float ``(samples,)``, what the attack maximises.
        gradient: of the loss, like the images; None if it was not asked for.
    """

    fooled: Tensor
    strength: Tensor
    loss: Tensor
    gradient: Tensor | None


class Oracle(Protocol):
    """Answers an attack about one batch; it may keep state from one question to the next."""

    def __call__(self, images: Tensor, labels: Tensor, differentiate: bool) -> Answer:
        """Judge images in [0, 1] that lie on the code grid, and differentiate the attack's loss if told so."""
        ...


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
    """A model whose answers can also be differentiated."""

    def oracle(self, backward: Backward, loss: Loss) -> Oracle:
        """A fresh oracle for one batch."""
        ...


class SpikingModule(Protocol):
    """A torch module that spikes, as attacks need it: :class:`Twin` and :class:`FoldedNetwork`."""

    def __call__(self, images: Tensor, rules: Any) -> Tensor:
        """Logits of the true forward pass, gradients through ``rules``."""
        ...

    def proxy(self, images: Tensor, clipped: bool) -> Tensor:
        """Logits of the network with (clipped) ReLUs in place of neurons."""
        ...


@dataclass
class ModuleOracle:
    """Questions to one spiking module through one way back."""

    module: SpikingModule
    neurons: tuple[str, ...]
    backward: Backward
    loss: Loss

    def __post_init__(self) -> None:
        self._rules = None if isinstance(self.backward, Conversion) else begin(self.backward, self.neurons)

    def __call__(self, images: Tensor, labels: Tensor, differentiate: bool) -> Answer:
        """See :class:`Oracle`. A gradient that does not reach the images is zero."""
        images = images.detach().requires_grad_(differentiate)
        through_proxy = isinstance(self.backward, Conversion)
        with torch.set_grad_enabled(differentiate and not through_proxy):
            logits = self.module(images, self._rules)
        judged = logits.detach().double()
        gradient = None
        if differentiate:
            source = logits
            if isinstance(self.backward, Conversion):
                source = self.module.proxy(images, self.backward.clipped)
            total = self.loss(source, labels).sum()
            if total.requires_grad:
                (gradient,) = torch.autograd.grad(total, images, allow_unused=True)
            gradient = torch.zeros_like(images) if gradient is None else gradient.detach()
        return Answer(
            judged.argmax(1) != labels,
            F.cross_entropy(judged, labels, reduction="none"),
            self.loss(judged, labels),
            gradient,
        )


@dataclass(frozen=True)
class FloatTarget:
    """The float SNN in eval mode, batch norm folded."""

    network: SpikingNetwork
    name: str = "float"

    @cached_property
    def _module(self) -> FoldedNetwork:
        return FoldedNetwork(self.network)

    def logits(self, codes: Codes) -> Logits:
        """See :class:`Target`."""
        return batched_logits(self._module, codes)

    def oracle(self, backward: Backward, loss: Loss) -> Oracle:
        """See :class:`GradientTarget`."""
        return ModuleOracle(self._module, self._module.neuron_names, backward, loss)


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

    def oracle(self, backward: Backward, loss: Loss) -> Oracle:
        """See :class:`GradientTarget`."""
        neurons = tuple(population.name for population in self.network.populations if population.spiking)
        return ModuleOracle(self._twin, neurons, backward, loss)


@dataclass(frozen=True)
class RuntimeTarget:
    """A deployed model behind a runtime: it only answers queries."""

    runtime: Runtime
    network: IntegerNetwork

    @property
    def name(self) -> str:
        """The runtime's."""
        return self.runtime.name

    def logits(self, codes: Codes) -> Logits:
        """See :class:`Target`."""
        return self.network.logits(self.runtime.run(codes).readouts)


def batched_logits(module: nn.Module, codes: Codes) -> Logits:
    """Logits of a torch module, in batches."""
    with torch.no_grad():
        parts = [module(to_images(codes[i : i + BATCH])) for i in range(0, max(len(codes), 1), BATCH)]
    return torch.cat(parts).double().numpy()


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
