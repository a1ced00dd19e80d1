"""What single operations of a torch module amount to as layers, or why they cannot be deployed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import snntorch
import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from pipeline.models.graph import LayerKind, Options, Shape
from pipeline.models.layers import Normalize, Scale
from pipeline.neurons import MIN_THRESHOLD, Leaky


@dataclass(frozen=True)
class Step:
    """One layer to be: its kind and options, and the module that holds its parameters."""

    kind: LayerKind
    options: Options
    module: nn.Module | None = None


class Unsupported(Exception):  # control flow inside this module, never seen by users
    """An operation that cannot be deployed: what it is, and what to use instead."""

    def __init__(self, operation: str, allowed: str, remedy: str) -> None:
        super().__init__(operation, allowed, remedy)
        self.operation, self.allowed, self.remedy = operation, allowed, remedy


_ALLOWED = "conv, linear, batch norm, ReLU or snntorch.Leaky, average pooling, flatten, dropout, sums, scalar products"
_REMEDIES: Mapping[str, str] = {
    "maxpool": "use nn.AvgPool2d: a maximum over spikes has no integer synapse",
    "softmax": "return logits; the loss applies the softmax",
    "norm": "use nn.BatchNorm2d: only its statistics are fixed at inference and fold into weights",
    "elu": "use nn.ReLU, which spiking neurons replace",
    "tanh": "use nn.ReLU, which spiking neurons replace",
    "sigmoid": "use nn.ReLU, which spiking neurons replace",
    "silu": "use nn.ReLU, which spiking neurons replace",
    "softplus": "use nn.ReLU, which spiking neurons replace",
    "synaptic": "use snntorch.Leaky: current decay is for imported graphs only",
    "leaky": "use snntorch.Leaky: one first-order neuron, without recurrent synapses",
    "lapicque": "use snntorch.Leaky with the same decay",
    "sub": "add with a scalar factor of -1",
    "neg": "multiply by -1",
    "cat": "use a sum: concatenated channels are two layers into one",
    "stack": "return the logits of one time step, without a loop over time",
    "permute": "use torch.flatten(x, 1)",
    "unflatten": "use torch.flatten(x, 1)",
    "dropout": "use nn.Dropout",
}


def refusal_of(operation: str) -> Unsupported:
    """Refusal of an operation by its name, with the remedy that suits it."""
    plain = operation.lower().replace("_", "")
    remedy = next((text for key, text in _REMEDIES.items() if key in plain), "replace it by a supported layer")
    return Unsupported(operation, _ALLOWED, remedy)


def read_module(module: nn.Module, shape: Shape) -> Step:
    """The layer that a leaf module is, on an input of ``shape`` (empty if unknown).

    Raises:
        Unsupported: if it is none.
    """
    for kind_of_module, reader in _MODULES.items():
        if type(module) is kind_of_module:
            kind, options = reader(module, shape)
            return Step(kind, options, module)
    raise refusal_of(type(module).__name__)


def _one(value: int | tuple[int, ...], what: str) -> int:
    sizes = {value} if isinstance(value, int) else set(value)
    if len(sizes) != 1:
        raise Unsupported(f"{what} {value}", f"square {what}", f"use the same {what} in both directions")
    return int(sizes.pop())


def _read_conv(conv: nn.Conv2d, _: Shape) -> tuple[LayerKind, Options]:
    if conv.groups != 1 or _one(conv.dilation, "dilation") != 1:
        raise Unsupported("a grouped or dilated conv", "groups 1, dilation 1", "use a plain nn.Conv2d")
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        raise Unsupported(f"padding {conv.padding!r} ({conv.padding_mode})", "a number of zeros", "give an integer")
    return "conv", {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": _one(conv.kernel_size, "kernel size"),
        "stride": _one(conv.stride, "stride"),
        "padding": _one(conv.padding, "padding"),
        "bias": conv.bias is not None,
    }


def _read_linear(linear: nn.Linear, _: Shape) -> tuple[LayerKind, Options]:
    return "linear", {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
    }


def _read_batch_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, _: Shape) -> tuple[LayerKind, Options]:
    if not norm.track_running_stats or not norm.affine:
        raise Unsupported("a batch norm without statistics or affine", "both", "use the defaults")
    if norm.momentum is None:
        raise Unsupported("a batch norm that averages over all batches", "a momentum", "give one, such as 0.1")
    spatial = isinstance(norm, nn.BatchNorm2d)
    return "batch_norm", {"features": norm.num_features, "eps": norm.eps, "momentum": norm.momentum, "spatial": spatial}


def _read_leaky(neuron: snntorch.Leaky, _: Shape) -> tuple[LayerKind, Options]:
    if any(value.numel() != 1 for value in (neuron.beta, neuron.threshold, neuron.graded_spikes_factor)):
        raise Unsupported("a beta, threshold or factor per neuron", "one per layer", "use scalars")
    if neuron.inhibition or neuron.state_quant or float(neuron.graded_spikes_factor) != 1:
        raise Unsupported("inhibition, state quantisation or graded spikes", "plain spikes", "use the defaults")
    is_ours, reset = type(neuron) is Leaky, neuron.reset_mechanism
    if reset == "none" or (reset == "subtract" and not is_ours):
        raise Unsupported(f"reset {reset!r}", "reset 'zero'", "set reset_mechanism='zero' and fine-tune")
    threshold = neuron.threshold.item()
    if not is_ours and not threshold >= MIN_THRESHOLD:
        remedy = "multiply it and the weights and biases before it by one factor"
        raise Unsupported(f"threshold {threshold:g}", f"{MIN_THRESHOLD} or more", remedy)
    with torch.no_grad():
        if not is_ours and neuron.spike_grad(torch.tensor([-1.0, 0.0, 1.0])).tolist() != [0, 0, 1]:
            allowed = "1 above the threshold, 0 elsewhere"
            raise Unsupported("a spike function of its own", allowed, "use one of snntorch.surrogate")
    return "spike", {"beta": float(neuron.beta.detach().clamp(0, 1)), "subtract": reset == "subtract"}


def _average_pool(kernel: Any, stride: Any, padding: Any, ceil_mode: Any, divisor: Any) -> tuple[LayerKind, Options]:
    size = _one(kernel, "kernel size")
    if divisor is not None:
        raise Unsupported("a pooling with a divisor of its own", "the kernel's size", "leave divisor_override out")
    if (stride is not None and _one(stride, "stride") != size) or padding or ceil_mode:
        raise Unsupported("an overlapping or padded pooling", "stride equal to the kernel", "use AvgPool2d(k)")
    return "avg_pool", {"kernel_size": size}


def _adaptive_pool(output: Any, shape: Shape) -> tuple[LayerKind, Options]:
    """Adaptive pooling is plain pooling with a kernel that the input's size gives."""
    target = (output, output) if isinstance(output, int) else tuple(output)
    if len(shape) != 3:  # the input is unknown because of a problem before it, or wrong, which the graph will say
        return "avg_pool", {"kernel_size": 1}
    kernels = {
        size // wanted if wanted and size % wanted == 0 else 0 for size, wanted in zip(shape[1:], target, strict=True)
    }
    if len(kernels) != 1 or 0 in kernels:
        raise Unsupported(f"adaptive pooling of {shape[1:]} to {output}", "equal square windows", "pool square images")
    return "avg_pool", {"kernel_size": kernels.pop()}


def _flatten(start: int, end: int) -> tuple[LayerKind, Options]:
    if (start, end) != (1, -1):
        raise Unsupported(f"flatten({start}, {end})", "flatten(1)", "flatten everything but the batch")
    return "flatten", {}


_MODULES: Mapping[type[nn.Module], Callable[[Any, Shape], tuple[LayerKind, Options]]] = {
    Normalize: lambda m, _: ("normalize", {"features": len(m.mean)}),
    Scale: lambda m, _: ("scale", {"learned": isinstance(m.value, nn.Parameter)}),
    nn.Conv2d: _read_conv,
    nn.Linear: _read_linear,
    nn.BatchNorm1d: _read_batch_norm,
    nn.BatchNorm2d: _read_batch_norm,
    nn.ReLU: lambda *_: ("relu", {}),
    snntorch.Leaky: _read_leaky,
    Leaky: _read_leaky,
    nn.AvgPool2d: lambda m, _: _average_pool(m.kernel_size, m.stride, m.padding, m.ceil_mode, m.divisor_override),
    nn.AdaptiveAvgPool2d: lambda m, shape: _adaptive_pool(m.output_size, shape),
    nn.Flatten: lambda m, _: _flatten(m.start_dim, m.end_dim),
    nn.Dropout: lambda m, _: ("dropout", {"p": m.p}),
    nn.Identity: lambda *_: ("dropout", {"p": 0.0}),
}


def _arguments(node: torch.fx.Node, function: Callable[..., Any]) -> dict[str, Any]:
    try:
        bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    except TypeError as error:
        raise Unsupported(f"unusual arguments ({error})", "the usual arguments", "use the layer of torch.nn") from error
    bound.apply_defaults()
    return dict(bound.arguments)


def _call_flatten(node: torch.fx.Node, _: Shape) -> list[Step]:
    given = _arguments(node, lambda input, start_dim=0, end_dim=-1: None)  # noqa: ARG005
    return [Step(*_flatten(given["start_dim"], given["end_dim"]))]


def _call_avg_pool(node: torch.fx.Node, _: Shape) -> list[Step]:
    given = _arguments(node, _avg_pool2d)
    options = ("kernel_size", "stride", "padding", "ceil_mode", "divisor_override")
    return [Step(*_average_pool(*(given[name] for name in options)))]


def _avg_pool2d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: Any = False,
    count_include_pad: Any = True,
    divisor_override: Any = None,
) -> None:
    """The arguments of torch's function, whose own signature cannot be read."""


def _call_adaptive_pool(node: torch.fx.Node, shape: Shape) -> list[Step]:
    given = _arguments(node, lambda input, output_size: None)  # noqa: ARG005
    return [Step(*_adaptive_pool(given["output_size"], shape))]


def _call_mean(node: torch.fx.Node, shape: Shape) -> list[Step]:
    """A mean over both image axes is global pooling."""
    given = _arguments(node, lambda input, dim=None, keepdim=False: None)  # noqa: ARG005
    axes = given["dim"]
    if not isinstance(axes, (tuple, list)) or sorted(axis % 4 for axis in axes) != [2, 3]:
        raise Unsupported(f"a mean over {axes}", "a mean over (2, 3)", "use nn.AdaptiveAvgPool2d(1)")
    pool = Step(*_adaptive_pool(1, shape))
    return [pool] if given["keepdim"] else [pool, Step("flatten", {})]


def _call_dropout(node: torch.fx.Node, _: Shape) -> list[Step]:
    given = _arguments(node, lambda input, p=0.5, training=True, inplace=False: None)  # noqa: ARG005
    return [Step("dropout", {"p": given["p"]})]


def _call_relu(*_: Any) -> list[Step]:
    return [Step("relu", {})]


Reader = Callable[[torch.fx.Node, Shape], list[Step]]
CALLS: Mapping[Any, Reader] = {
    F.relu: _call_relu,
    torch.relu: _call_relu,
    torch.flatten: _call_flatten,
    torch.mean: _call_mean,
    F.avg_pool2d: _call_avg_pool,
    F.adaptive_avg_pool2d: _call_adaptive_pool,
    F.dropout: _call_dropout,
}
"""Functions that amount to layers, given the node and the shape it reads."""
METHODS: Mapping[str, Reader] = {"relu": _call_relu, "flatten": _call_flatten, "mean": _call_mean}
"""The same for methods of tensors."""
