"""The float networks: a layer graph whose neurons spike, run for T steps with direct coding, and the one with ReLUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hardware.surrogates import TRIANGLE, Surrogate
from pipeline.models.graph import Layer, LayerGraph, build_module
from pipeline.models.layers import LeakyReadout, SynapticCurrent
from pipeline.models.tracing import TracedNetwork
from pipeline.neurons import Leaky, Reset


@dataclass(frozen=True)
class LayerActivity:
    """What one spiking layer did: bool spikes and float membranes before reset, both (samples, steps, neurons)."""

    spikes: Tensor
    membranes: Tensor
    threshold: float


class SpikingNetwork(nn.Module):
    """A network whose "spike" layers are (leaky) integrate-and-fire neurons.

    Each layer runs all T steps before the next one starts, as batch norm's statistics over batch, space and time
    demand. Until the first spikes everything is the same at every step and is computed once, unless the input changes
    over time. Logits are the time average of the last layer, or what a leaky readout ends with.

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
                layer.name: _neurons(layer, surrogate) if layer.kind == "spike" else build_module(layer)
                for layer in graph.layers
            }
        )
        # Faster on CPUs and GPUs alike, neurons included.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor, surrogate: Surrogate | None = None) -> Tensor:
        """Logits ``(samples, classes)`` of images in [0, 1], ``(samples, *shape)`` or ``(samples, steps, *shape)``.

        Args:
            images: what to classify.
            surrogate: gradient to use instead of each neuron's own, for attacks.
        """

        def apply(layer: Layer, read: Sequence[Tensor]) -> Tensor:
            return self.advance(layer.name, read, surrogate)

        return self.graph.evaluate(steps_first(images, self.graph), apply).mean(0)

    def advance(self, name: str, read: Sequence[Tensor], surrogate: Surrogate | None = None) -> Tensor:
        """Layer ``name`` for all steps: ``(steps or 1, samples, ...)`` in and out."""
        module = self.layers[name]
        if isinstance(module, Leaky):
            return module.sequence(read[0], self.steps, surrogate)
        if isinstance(module, SynapticCurrent | LeakyReadout):
            return module.sequence(read[0], self.steps)
        if len(read) > 1:
            summed: Tensor = module(*read)
            return summed
        folded: Tensor = module(read[0].flatten(0, 1))
        return folded.reshape(*read[0].shape[:2], *folded.shape[1:])

    @torch.no_grad()
    def record(self, images: Tensor) -> tuple[Tensor, dict[str, LayerActivity]]:
        """Logits, and what every spiking layer did."""
        recorded: dict[str, LayerActivity] = {}

        def apply(layer: Layer, read: Sequence[Tensor]) -> Tensor:
            activity = self.advance(layer.name, read)
            module = self.layers[layer.name]
            if isinstance(module, Leaky):
                recorded[layer.name] = LayerActivity(
                    activity.bool().flatten(2).transpose(0, 1),
                    module.membranes(read[0], self.steps).flatten(2).transpose(0, 1),
                    float(module.effective_threshold.detach()),
                )
            return activity

        return self.graph.evaluate(steps_first(images, self.graph), apply).mean(0), recorded

    def images(self, codes: NDArray[np.uint8]) -> Tensor:
        """Codes ``(samples, [steps,] *shape)`` in [0, 1], as the network reads them."""
        return torch.from_numpy(codes).float() / self.graph.max_code

    def neurons(self) -> Iterator[tuple[str, Leaky]]:
        """The spiking layers by name, front to back."""
        for name, module in self.layers.items():
            if isinstance(module, Leaky):
                yield name, module


def steps_first(images: Tensor, graph: LayerGraph) -> Tensor:
    """Images ``(samples, [steps,] *shape)`` as ``(steps or 1, samples, *shape)``."""
    return images.unsqueeze(0) if images.ndim == len(graph.input_shape) + 1 else images.transpose(0, 1)


def _neurons(layer: Layer, surrogate: Surrogate) -> Leaky:
    reset: Reset = "subtract" if layer.options["subtract"] else "zero"
    return Leaky(beta=float(layer.options["beta"]), reset_mechanism=reset, spike_grad=surrogate)


class RateNetwork(nn.Module):
    """The same network with ReLUs: before conversion."""

    def __init__(self, graph: LayerGraph) -> None:
        super().__init__()
        self.graph = graph
        self.layers = nn.ModuleDict({layer.name: build_module(layer) for layer in graph.layers})
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(samples, classes)`` of images ``(samples, *shape)`` in [0, 1]."""

        def apply(layer: Layer, read: Sequence[Tensor]) -> Tensor:
            activity: Tensor = self.layers[layer.name](*read)
            return activity

        return self.graph.evaluate(images, apply)


def rebuild(traced: TracedNetwork, steps: int) -> RateNetwork | SpikingNetwork:
    """A traced module as a network of our own, with its weights; spiking, with T ``steps``, if its neurons spike."""
    network = SpikingNetwork(traced.graph, steps) if traced.is_spiking else RateNetwork(traced.graph)
    for name, module in traced.modules.items():
        target = network.layers[name]
        if isinstance(target, Leaky):
            threshold = cast(Tensor, module.threshold).detach().float().reshape(())
            # snnTorch spikes above the threshold, we at it: the next number up makes both the same.
            is_ours = isinstance(module, Leaky)
            exact = threshold if is_ours else torch.nextafter(threshold, threshold.new_tensor(torch.inf))
            target.load_state_dict({"threshold": exact})
        else:
            target.load_state_dict(module.state_dict())
    return network
