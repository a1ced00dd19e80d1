"""The float spiking network: a layer graph whose neurons spike, run for T steps with direct coding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hardware.surrogates import TRIANGLE, Surrogate
from pipeline.models.graph import LayerGraph, build_module
from pipeline.neurons import IntegrateAndFire


@dataclass(frozen=True)
class LayerActivity:
    """What one spiking layer did: bool spikes and float membranes before reset, both (samples, steps, neurons)."""

    spikes: Tensor
    membranes: Tensor
    threshold: float


class SpikingNetwork(nn.Module):
    """A chain of layers whose "spike" layers are integrate-and-fire neurons.

    Each layer runs all T steps before the next one starts, as batch norm's statistics over batch, space and time
    demand. Until the first spikes the input is the same at every step and is computed once. Logits are the time
    average of the last linear layer.

    Args:
        graph: with "spike" layers and no "relu".
        steps: T.
        surrogate: gradient used in training.
    """

    def __init__(self, graph: LayerGraph, steps: int, surrogate: Surrogate = TRIANGLE) -> None:
        super().__init__()
        self.graph = graph
        self.steps = steps
        self.layers = nn.ModuleDict(
            {
                layer.name: IntegrateAndFire(surrogate=surrogate) if layer.kind == "spike" else build_module(layer)
                for layer in graph.layers
            }
        )

    def forward(self, images: Tensor, surrogate: Surrogate | None = None) -> Tensor:
        """Logits ``(samples, classes)`` of images ``(samples, *shape)`` in [0, 1].

        Args:
            images: what to classify.
            surrogate: gradient to use instead of each neuron's own, for attacks.
        """
        activity = images.unsqueeze(0)
        for _, module in self.layers.items():
            activity = self.advance(module, activity, surrogate)
        return activity.mean(0)

    def advance(self, module: nn.Module, activity: Tensor, surrogate: Surrogate | None = None) -> Tensor:
        """One layer for all steps: ``(steps or 1, samples, ...)`` in and out."""
        if isinstance(module, IntegrateAndFire):
            spikes: Tensor = module(activity, self.steps, surrogate)
            return spikes
        folded: Tensor = module(activity.flatten(0, 1))
        return folded.reshape(*activity.shape[:2], *folded.shape[1:])

    @torch.no_grad()
    def record(self, images: Tensor) -> tuple[Tensor, dict[str, LayerActivity]]:
        """Logits, and what every spiking layer did."""
        activity = images.unsqueeze(0)
        recorded: dict[str, LayerActivity] = {}
        for name, module in self.layers.items():
            current, activity = activity, self.advance(module, activity)
            if isinstance(module, IntegrateAndFire):
                membranes = module.membranes(current, self.steps)
                recorded[name] = LayerActivity(
                    activity.bool().flatten(2).transpose(0, 1),
                    membranes.flatten(2).transpose(0, 1),
                    float(module.effective_threshold.detach()),
                )
        return activity.mean(0), recorded

    def neurons(self) -> Iterator[tuple[str, IntegrateAndFire]]:
        """The spiking layers by name, front to back."""
        for name, module in self.layers.items():
            if isinstance(module, IntegrateAndFire):
                yield name, module


class RateNetwork(nn.Module):
    """The same chain with ReLUs: the network before conversion."""

    def __init__(self, graph: LayerGraph) -> None:
        super().__init__()
        self.graph = graph
        self.layers = nn.ModuleDict({layer.name: build_module(layer) for layer in graph.layers})

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(samples, classes)`` of images ``(samples, *shape)`` in [0, 1]."""
        for module in self.layers.values():
            images = module(images)
        return images
