"""Reading a user's torch module into a layer graph, or refusing it in one table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from hardware.errors import RuleViolations, SpikeguardError, Violation
from pipeline.models.graph import Layer, LayerGraph, LayerKind, Options
from pipeline.models.layers import Normalize


@dataclass(frozen=True)
class TracedNetwork:
    """A network as a graph, and the modules that hold its parameters, by layer name."""

    graph: LayerGraph
    modules: Mapping[str, nn.Module]


class Unsupported(Exception):  # control flow inside this module, never seen by users
    """An operation that cannot be deployed: what it is, and what to use instead."""

    def __init__(self, operation: str, allowed: str, remedy: str) -> None:
        super().__init__(operation, allowed, remedy)
        self.operation, self.allowed, self.remedy = operation, allowed, remedy


def trace_network(module: nn.Module, input_shape: tuple[int, ...]) -> TracedNetwork:
    """Read a torch module into a layer graph.

    Args:
        module: anything ``torch.fx`` can trace, built as a chain of conv, linear, batch norm, ReLU, average
            pooling, flatten and dropout, with :class:`Normalize` first if the input is to be normalised.
        input_shape: of one image, without the batch axis.

    Raises:
        RuleViolations: one row for every operation that cannot be deployed.
        SpikeguardError: if the module cannot be traced at all.
    """
    try:
        nodes = list(_Tracer().trace(module).nodes)
    except Exception as error:  # torch.fx raises many types when forward branches on values
        raise SpikeguardError(
            f"{type(module).__name__} cannot be traced ({error}); write forward without control flow on values"
        ) from error
    layers: list[Layer] = []
    modules: dict[str, nn.Module] = {}
    problems: list[Violation] = []
    previous: torch.fx.Node | None = None
    for node in nodes:
        path = str(node.target)
        try:
            if node.op == "placeholder":
                if previous is not None:
                    raise Unsupported("a second input", "one input", "pass everything in one tensor")
            elif node.op == "output":
                if node.args[0] is not previous:
                    raise Unsupported("another output than the last layer's", "logits", "return the logits only")
            else:
                if list(node.all_input_nodes) != [previous]:
                    raise Unsupported("a branch or residual sum", "a chain of layers", "remove the branch")
                kind, options, holder = _read_node(node, module)
                stem = "neurons" if kind == "relu" else kind
                name = f"{stem}{sum(layer.kind == kind for layer in layers) + 1}"
                layers.append(Layer(name, kind, options, path))
                if holder is not None:
                    modules[name] = holder
        except Unsupported as refusal:
            problems.append(Violation(path, "can be deployed", refusal.operation, refusal.allowed, refusal.remedy))
        previous = node
    if problems:
        raise RuleViolations(f"network {type(module).__name__}", problems)
    return TracedNetwork(LayerGraph(tuple(input_shape), tuple(layers)), modules)


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Normalize) or super().is_leaf_module(m, module_qualified_name)


def _read_node(node: torch.fx.Node, root: nn.Module) -> tuple[LayerKind, Options, nn.Module | None]:
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        for kind_of_module, reader in _MODULES.items():
            if type(module) is kind_of_module:
                kind, options = reader(module)
                return kind, options, module
        raise _refusal_of(type(module).__name__)
    if node.op == "get_attr":
        raise Unsupported("a bare parameter", "parameters inside layers", "use nn.Linear or nn.Conv2d")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    reader_of_call = _CALLS.get(node.target) if not isinstance(node.target, str) else _METHODS.get(node.target)
    if reader_of_call is None:
        raise _refusal_of(name)
    kind, options = reader_of_call(node)
    return kind, options, None


_ALLOWED = "conv, linear, batch norm, ReLU, average pooling, flatten, dropout"
_REMEDIES: Mapping[str, str] = {
    "maxpool": "use nn.AvgPool2d: a maximum over spikes has no integer synapse",
    "adaptiveavgpool": "use nn.AvgPool2d with the kernel size it amounts to",
    "softmax": "return logits; the loss applies the softmax",
    "norm": "use nn.BatchNorm2d: only its statistics are fixed at inference and fold into weights",
    "elu": "use nn.ReLU, which spiking neurons replace",
    "tanh": "use nn.ReLU, which spiking neurons replace",
    "sigmoid": "use nn.ReLU, which spiking neurons replace",
    "add": "remove the residual sum",
    "view": "use torch.flatten(x, 1)",
    "reshape": "use torch.flatten(x, 1)",
    "size": "use torch.flatten(x, 1)",
}


def _refusal_of(operation: str) -> Unsupported:
    plain = operation.lower().replace("_", "")
    remedy = next((text for key, text in _REMEDIES.items() if key in plain), "replace it by a supported layer")
    return Unsupported(operation, _ALLOWED, remedy)


def _one(value: int | tuple[int, ...], what: str) -> int:
    sizes = {value} if isinstance(value, int) else set(value)
    if len(sizes) != 1:
        raise Unsupported(f"{what} {value}", f"square {what}", f"use the same {what} in both directions")
    return int(sizes.pop())


def _read_conv(conv: nn.Conv2d) -> tuple[LayerKind, Options]:
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


def _read_linear(linear: nn.Linear) -> tuple[LayerKind, Options]:
    return "linear", {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
    }


def _read_batch_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[LayerKind, Options]:
    if not norm.track_running_stats or not norm.affine:
        raise Unsupported("a batch norm without statistics or affine", "both", "use the defaults")
    momentum = 0.1 if norm.momentum is None else norm.momentum
    spatial = isinstance(norm, nn.BatchNorm2d)
    return "batch_norm", {
        "features": norm.num_features,
        "eps": norm.eps,
        "momentum": momentum,
        "spatial": spatial,
    }


def _average_pool(kernel: Any, stride: Any, padding: Any, ceil_mode: Any, divisor: Any) -> tuple[LayerKind, Options]:
    size = _one(kernel, "kernel size")
    if divisor is not None:
        raise Unsupported("a pooling with a divisor of its own", "the kernel's size", "leave divisor_override out")
    if (stride is not None and _one(stride, "stride") != size) or padding or ceil_mode:
        raise Unsupported("an overlapping or padded pooling", "stride equal to the kernel", "use AvgPool2d(k)")
    return "avg_pool", {"kernel_size": size}


_MODULES: Mapping[type[nn.Module], Callable[[Any], tuple[LayerKind, Options]]] = {
    Normalize: lambda m: ("normalize", {"features": len(m.mean)}),
    nn.Conv2d: _read_conv,
    nn.Linear: _read_linear,
    nn.BatchNorm1d: _read_batch_norm,
    nn.BatchNorm2d: _read_batch_norm,
    nn.ReLU: lambda _: ("relu", {}),
    nn.AvgPool2d: lambda m: _average_pool(m.kernel_size, m.stride, m.padding, m.ceil_mode, m.divisor_override),
    nn.Flatten: lambda m: _flatten(m.start_dim, m.end_dim),
    nn.Dropout: lambda m: ("dropout", {"p": m.p}),
    nn.Identity: lambda _: ("dropout", {"p": 0.0}),
}


def _flatten(start: int, end: int) -> tuple[LayerKind, Options]:
    if (start, end) != (1, -1):
        raise Unsupported(f"flatten({start}, {end})", "flatten(1)", "flatten everything but the batch")
    return "flatten", {}


def _arguments(node: torch.fx.Node, function: Callable[..., Any]) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _call_flatten(node: torch.fx.Node) -> tuple[LayerKind, Options]:
    given = _arguments(node, lambda input, start_dim=0, end_dim=-1: None)  # noqa: ARG005
    return _flatten(given["start_dim"], given["end_dim"])


def _avg_pool2d(
    input: Any,  # noqa: ARG001
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: Any = False,
    count_include_pad: Any = True,  # noqa: ARG001
    divisor_override: Any = None,
) -> tuple[LayerKind, Options]:
    return _average_pool(kernel_size, stride, padding, ceil_mode, divisor_override)


def _call_avg_pool(node: torch.fx.Node) -> tuple[LayerKind, Options]:
    return _avg_pool2d(*node.args, **node.kwargs)


def _call_dropout(node: torch.fx.Node) -> tuple[LayerKind, Options]:
    given = _arguments(node, lambda input, p=0.5, training=True, inplace=False: None)  # noqa: ARG005
    return "dropout", {"p": given["p"]}


_CALLS: Mapping[Any, Callable[[torch.fx.Node], tuple[LayerKind, Options]]] = {
    F.relu: lambda _: ("relu", {}),
    torch.relu: lambda _: ("relu", {}),
    torch.flatten: _call_flatten,
    F.avg_pool2d: _call_avg_pool,
    F.dropout: _call_dropout,
}
_METHODS: Mapping[str, Callable[[torch.fx.Node], tuple[LayerKind, Options]]] = {
    "relu": lambda _: ("relu", {}),
    "flatten": _call_flatten,
}
