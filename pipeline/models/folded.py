"""The float spiking network as attacks and evaluation run it: batch norm folded, neurons compiled, nothing trained.

Images go through in groups so small that the activity of a layer stays in the cache; a group runs all steps of a
layer before the next layer. Until the first spikes everything is the same at every step and is computed once; after
the last spikes everything is linear and is computed once for their average. Of convolutions and neurons only the
currents that enter neurons are kept for the backward pass.

On the CPU the neurons are those of :mod:`pipeline.models.neuron_kernels`; on other devices they are the torch function
that training uses (:mod:`pipeline.neurons`), with the same spikes and gradients.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from hardware.errors import RuleViolations, Violation
from hardware.surrogates import TRIANGLE, Rate, SpikeRule, Surrogate
from hardware.twin import Rules
from pipeline.models import neuron_kernels
from pipeline.models.neuron_kernels import RULE_IDS, Array
from pipeline.models.spiking import SpikingNetwork
from pipeline.neurons import IntegrateAndFire

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
        self.layers = nn.ModuleDict(_fold(network))
        self.layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.neuron_names = tuple(name for name, _ in network.neurons())
        self._largest_layer = max(math.prod(shape) for shape in network.graph.shapes().values())

    def forward(self, images: Tensor, rules: Rules = TRIANGLE) -> Tensor:
        """Logits ``(samples, classes)``, the time average, with gradients to the images.

        Args:
            images: ``(samples, *shape)`` in [0, 1].
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
            images: ``(samples, *shape)`` in [0, 1].
            clipped: whether neurons answer with ``clip(x / threshold, 0, 1)``, the rate that an IF neuron approaches,
                instead of ``max(x, 0)``.
        """
        activity = images.unsqueeze(0)
        for module in self.layers.values():
            if isinstance(module, IntegrateAndFire):
                activity = (activity / module.effective_threshold).clamp(0, 1) if clipped else activity.relu()
            else:
                activity = _advance(module, activity)
        return activity[0]

    def _group(self, images: Tensor, rules: Mapping[str, SpikeRule]) -> int:
        """Images that go through together: all on other devices, and for rules that may keep state."""
        may_keep_state = torch.is_grad_enabled() and not all(_is_compiled(rule) for rule in rules.values())
        if images.device.type != "cpu" or may_keep_state:
            return max(1, len(images))
        bytes_per_row = self._largest_layer * images.element_size()
        return max(1, max(GROUP_ROWS, GROUP_BYTES // bytes_per_row) // self.steps)

    def _logits(self, images: Tensor, rules: Mapping[str, SpikeRule]) -> Tensor:
        activity = images.unsqueeze(0)
        for name, module in self.layers.items():
            if not isinstance(module, IntegrateAndFire):
                activity = _advance(module, activity)
                continue
            activity = _spikes(module, activity, self.steps, rules[name])
            if name == self.neuron_names[-1]:
                activity = activity.sum(0, keepdim=True) / self.steps
        return activity[0]

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


def _fold(network: SpikingNetwork) -> dict[str, nn.Module]:
    """Copies of the layers, batch norm folded in float64 into the layer before it, dropout left out."""
    folded: dict[str, nn.Module] = {}
    fusion, weighted = "", ""
    for layer in network.graph.layers:
        module = copy.deepcopy(network.layers[layer.name]).eval().requires_grad_(False)
        if layer.kind == "batch_norm":
            folded[weighted] = _FUSIONS[fusion](folded[weighted].double(), module.double())
        elif layer.kind != "dropout":
            folded[layer.name] = module
        if layer.kind in _FUSIONS:
            fusion, weighted = layer.kind, layer.name
    dtype = next(network.parameters()).dtype
    return {name: module.to(dtype) for name, module in folded.items()}


def _advance(module: nn.Module, activity: Tensor) -> Tensor:
    """One layer without neurons, at all steps."""
    rows = activity.flatten(0, 1)
    answer: Tensor = _convolve(module, rows) if isinstance(module, nn.Conv2d) else module(rows)
    return answer.reshape(*activity.shape[:2], *answer.shape[1:])


def _spikes(neurons: IntegrateAndFire, current: Tensor, steps: int, rule: SpikeRule) -> Tensor:
    """0/1 spikes ``(steps, samples, *shape)``."""
    if current.device.type != "cpu":
        return torch_spikes(neurons, current, steps, rule)
    threshold = float(neurons.effective_threshold)
    spikes: Tensor = _CompiledSpikes.apply(current, threshold, steps, rule)  # type: ignore[no-untyped-call]
    return spikes


def torch_spikes(neurons: IntegrateAndFire, current: Tensor, steps: int, rule: SpikeRule) -> Tensor:
    """The same in torch, for devices that the compiled neurons do not run on."""
    spikes: Tensor
    if not isinstance(rule, Rate):
        spikes = neurons(current, steps, cast(Surrogate, rule))
        return spikes
    with torch.no_grad():
        spikes = neurons(current, steps)
    # Adds zero, and passes the gradient of every step to the current wherever the neuron spikes at all.
    passed: Tensor = spikes.amax(0) * (current - current.detach())
    return spikes + passed


def _is_compiled(rule: SpikeRule) -> bool:
    return isinstance(rule, Rate) or (type(rule) is Surrogate and rule.rule in RULE_IDS)


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


class _CompiledSpikes(torch.autograd.Function):
    """All steps of a layer of neurons in one node."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, threshold: float, steps: int, rule: SpikeRule) -> Tensor:
        ctx.save_for_backward(current)
        ctx.threshold, ctx.steps, ctx.rule = threshold, steps, rule
        spikes = _empty(current, steps)
        x = _flat(current)
        neuron_kernels.fire(x, x.dtype.type(threshold), _flat(spikes))
        return spikes

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor) -> tuple[Tensor, None, None, None]:
        (current,) = ctx.saved_tensors
        rule: SpikeRule = ctx.rule
        # An average over time has the same gradient at every step.
        constant = grad_spikes.stride(0) == 0
        grad_current = _empty(current, len(current))
        x = _flat(current)
        real = x.dtype.type
        arrays = x, real(ctx.threshold), _flat(grad_spikes[:1] if constant else grad_spikes), _flat(grad_current)
        if isinstance(rule, Rate):
            neuron_kernels.backpropagate_rate(*arrays, ctx.steps)
        elif _is_compiled(rule):
            rule = cast(Surrogate, rule)
            neuron_kernels.backpropagate(*arrays, ctx.steps, RULE_IDS[rule.rule], real(rule.width), real(rule.height))
        else:
            z = _empty(current, ctx.steps)
            neuron_kernels.integrate(x, real(ctx.threshold), _flat(z))
            slopes = rule.gradient(z.sub_(ctx.threshold))
            neuron_kernels.backpropagate_slopes(*arrays, _flat(slopes))
        return grad_current, None, None, None


def _empty(activity: Tensor, steps: int) -> Tensor:
    """Room for ``(steps, samples, *shape)``, channels last in memory."""
    channels_last = activity.movedim(2, -1)
    return activity.new_empty((steps, *channels_last.shape[1:])).movedim(-1, 2)


def _flat(activity: Tensor) -> Array:
    """``(steps or 1, neurons of all samples)`` in the order of memory; a view, if channels are last in memory."""
    flat: Array = activity.detach().movedim(2, -1).flatten(1).numpy()
    return flat
