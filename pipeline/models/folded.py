"""The float spiking network as attacks and evaluation run it: batch norm folded, neurons compiled, nothing trained.

Images go through in groups so small that the activity of a layer stays in the cache; a group runs all steps of a
layer before the next layer. Until the first spikes everything is the same at every step and is computed once; after
the last spikes everything is linear and is computed once for their average. Of convolutions and neurons only the
currents that enter neurons are kept for the backward pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from hardware.errors import RuleViolations, Violation
from hardware.surrogates import TRIANGLE, SpikeRule
from hardware.twin import Rules
from pipeline.models.graph import Layer, LayerGraph
from pipeline.models.layers import LeakyReadout, SynapticCurrent
from pipeline.models.spiking import SpikingNetwork, steps_first
from pipeline.neurons import Leaky, is_compiled

# A group of images, at all steps: no more activity in a layer than the cache holds, but rows enough that the calls
# and the reading of weights do not outweigh the work (measured).
GROUP_BYTES = 2**23
GROUP_ROWS = 128


class FoldedNetwork(nn.Module):
    """A spiking network in eval mode, fast, with gradients to the images through any rule.

    Activity has shape ``(steps or 1, samples, *shape)`` and lies in memory with the channels last.

    Args:
        network: what is folded; it is not changed. The type of its parameters stays.
    """

    def __init__(self, network: SpikingNetwork) -> None:
        super().__init__()
        self.steps = network.steps
        self.graph, modules = _fold(network)
        self.layers = nn.ModuleDict(modules)
        self.layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.neuron_names = tuple(name for name, _ in network.neurons())
        self._shape_spikes = self.graph.before_last_spikes()
        self._largest_layer = max(math.prod(shape) for shape in network.graph.shapes().values())

    def forward(self, images: Tensor, rules: Rules = TRIANGLE) -> Tensor:
        """Logits ``(samples, classes)``, the time average, with gradients to the images.

        Args:
            images: ``(samples, *shape)``, or ``(samples, steps, *shape)``, in [0, 1].
            rules: how gradients pass the spikes, for all neurons or by name of the spiking layer. A rule other than
                a ``Surrogate`` or ``RATE`` may keep state: its ``gradient`` is called once per layer and backward
                pass, with z ``(steps, samples, *shape)`` of all images.

        Raises:
            RuleViolations: if ``rules`` leaves out a spiking layer or names one that does not exist.
        """
        by_name = self._rules_by_name(rules)
        return torch.cat([self._logits(part, by_name) for part in images.split(self._group(images, by_name))])

    def proxy(self, images: Tensor, clipped: bool) -> Tensor:
        """Logits of the static network that conversion would start from (ensemble members 19 and 20).

        Args:
            images: ``(samples, *shape)``, or ``(samples, steps, *shape)``, in [0, 1].
            clipped: whether neurons answer with ``clip(x / threshold, 0, 1)``, the rate that an IF neuron approaches,
                instead of ``max(x, 0)``. Leaks count as none.
        """

        def apply(layer: Layer, read: Sequence[Tensor]) -> Tensor:
            module = self.layers[layer.name]
            if isinstance(module, SynapticCurrent | LeakyReadout):
                return read[0]
            if not isinstance(module, Leaky):
                return _advance(module, read)
            return (read[0] / module.effective_threshold).clamp(0, 1) if clipped else read[0].relu()

        return self.graph.evaluate(steps_first(images, self.graph).mean(0, keepdim=True), apply)[0]

    def _group(self, images: Tensor, rules: Mapping[str, SpikeRule]) -> int:
        """Images that go through together: all on other devices, and for rules that may keep state."""
        may_keep_state = torch.is_grad_enabled() and not all(is_compiled(rule) for rule in rules.values())
        if images.device.type != "cpu" or may_keep_state:
            return max(1, len(images))
        bytes_per_row = self._largest_layer * images.element_size()
        return max(1, max(GROUP_ROWS, GROUP_BYTES // bytes_per_row) // self.steps)

    def _logits(self, images: Tensor, rules: Mapping[str, SpikeRule]) -> Tensor:
        def apply(layer: Layer, read: Sequence[Tensor]) -> Tensor:
            module = self.layers[layer.name]
            if isinstance(module, SynapticCurrent | LeakyReadout):
                return module.sequence(read[0], self.steps)
            if not isinstance(module, Leaky):
                return _advance(module, read)
            spikes = module.sequence(read[0], self.steps, rules[layer.name])
            return spikes if layer.name in self._shape_spikes else spikes.sum(0, keepdim=True) / self.steps

        # What is linear and the same at every step already is its own average.
        return self.graph.evaluate(steps_first(images, self.graph), apply).mean(0)

    def _rules_by_name(self, rules: Rules) -> Mapping[str, SpikeRule]:
        if not isinstance(rules, Mapping):
            return dict.fromkeys(self.neuron_names, rules)
        wrong = [(name, "no rule", "one rule") for name in self.neuron_names if name not in rules]
        wrong += [(name, "a rule", "spiking layers only") for name in rules if name not in self.neuron_names]
        if wrong:
            remedy = f"give rules for {', '.join(self.neuron_names)}"
            raise RuleViolations(
                "gradient rules",
                [Violation(name, "every spiking layer has a rule", has, limit, remedy) for name, has, limit in wrong],
            )
        return rules


_FUSIONS: Mapping[str, Callable[[Any, Any], nn.Module]] = {"conv": fuse_conv_bn_eval, "linear": fuse_linear_bn_eval}


def _fold(network: SpikingNetwork) -> tuple[LayerGraph, dict[str, nn.Module]]:
    """The graph without dropout and, where a weighted layer alone feeds it, batch norm; and copies of the layers, such
    batch norm folded in float64 into the layer before it.
    """
    graph = network.graph
    modules = {
        layer.name: copy.deepcopy(network.layers[layer.name]).eval().requires_grad_(False) for layer in graph.layers
    }
    stands_for: dict[str, str] = {}
    kept: list[Layer] = []
    for layer in graph.layers:
        sources = tuple(stands_for.get(name, name) for name in graph.sources[layer.name])
        before = graph.by_name.get(sources[0])
        is_folded = (
            layer.kind == "batch_norm"
            and before is not None
            and before.kind in _FUSIONS
            and len(graph.readers(before.name)) == 1
        )
        if is_folded and before is not None:
            modules[before.name] = _FUSIONS[before.kind](modules[before.name].double(), modules[layer.name].double())
        if is_folded or layer.kind == "dropout":
            stands_for[layer.name] = sources[0]
        else:
            kept.append(replace(layer, inputs=sources))
    dtype = next(network.parameters()).dtype
    return replace(graph, layers=tuple(kept)), {layer.name: modules[layer.name].to(dtype) for layer in kept}


def _advance(module: nn.Module, read: Sequence[Tensor]) -> Tensor:
    """One layer without neurons, at all steps."""
    if len(read) > 1:
        summed: Tensor = module(*read)
        return summed
    rows = read[0].flatten(0, 1)
    answer: Tensor = _convolve(module, rows) if isinstance(module, nn.Conv2d) else module(rows)
    return answer.reshape(*read[0].shape[:2], *answer.shape[1:])


def _convolve(layer: nn.Conv2d, rows: Tensor) -> Tensor:
    answer: Tensor = _Convolution.apply(rows, layer)  # type: ignore[no-untyped-call]
    return answer


class _Convolution(torch.autograd.Function):
    """A convolution whose weights need no gradient, and which therefore need not keep its input."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: nn.Conv2d) -> Tensor:
        ctx.layer, ctx.size = layer, rows.shape[2:]
        answer: Tensor = layer(rows)
        return answer

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layer: nn.Conv2d = ctx.layer
        stride, padding, kernel = int(layer.stride[0]), int(layer.padding[0]), int(layer.kernel_size[0])
        # Rows and columns at the far border that no kernel reaches.
        unread = [(size + 2 * padding - kernel) % stride for size in ctx.size]
        return F.conv_transpose2d(gradient, layer.weight, None, stride, padding, unread), None
