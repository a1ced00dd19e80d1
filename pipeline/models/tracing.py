"""Reading a user's torch module into a layer graph, or refusing it in one table."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import snntorch
import torch
import torch.fx
from torch import Tensor, nn

from hardware.errors import RuleViolations, SpikeguardError, Violation
from pipeline.models.graph import INPUT, NEURONS, Layer, LayerGraph, Shape, output_shape
from pipeline.models.layers import Add, Normalize, Scale
from pipeline.models.operations import CALLS, METHODS, Step, Unsupported, read_module, refusal_of


@dataclass(frozen=True)
class TracedNetwork:
    """A network as a graph, and the modules that hold its parameters, by layer name."""

    graph: LayerGraph
    modules: Mapping[str, nn.Module]

    @property
    def is_spiking(self) -> bool:
        """Whether its neurons spike: it then needs no conversion."""
        return any(layer.kind == "spike" for layer in self.graph.layers)


def trace_network(module: nn.Module, input_shape: tuple[int, ...]) -> TracedNetwork:
    """Read a torch module into a layer graph.

    Args:
        module: anything ``torch.fx`` can trace, built of conv, linear, batch norm, ReLU, average pooling (adaptive
            too), flatten, dropout, additions and products with scalars, with :class:`Normalize` first if the input is
            to be normalised. Or a spiking network of ``snntorch.Leaky`` neurons in place of the ReLUs, whose forward
            does one time step.
        input_shape: of one image, without the batch axis.

    Raises:
        RuleViolations: one row for every operation that cannot be deployed.
        SpikeguardError: if the module cannot be traced at all.
    """
    try:
        traced = _Tracer().trace(module)
    except Exception as error:  # torch.fx raises many types when forward branches on values
        raise SpikeguardError(
            f"{type(module).__name__} cannot be traced ({error}); write forward without control flow on values"
        ) from error
    reading = _Reading(module, tuple(input_shape))
    for node in traced.nodes:
        reading.read(node)
    if reading.problems:
        raise RuleViolations(f"network {type(module).__name__}", reading.problems)
    return TracedNetwork(LayerGraph(tuple(input_shape), reading.finish()), reading.modules)


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, (Normalize, Add, Scale, snntorch.SpikingNeuron))
        return ours or super().is_leaf_module(m, module_qualified_name)


class _Reading:
    """The nodes of a trace, one after the other, into layers and problems."""

    def __init__(self, root: nn.Module, input_shape: Shape) -> None:
        self.root = root
        self.layers: list[Layer] = []
        self.modules: dict[str, nn.Module] = {}
        self.problems: list[Violation] = []
        # An empty shape stands for what a problem has made unknown.
        self.shapes: dict[str, Shape] = {INPUT: input_shape, _REFUSED: ()}
        self._names: dict[torch.fx.Node, str] = {}
        self._scalars: dict[torch.fx.Node, float | Tensor] = {}
        self._sizes: dict[torch.fx.Node, int | None] = {}
        self._called: set[str] = set()
        self._counts: dict[str, int] = {}
        self._owners: dict[str, str] = {}

    def read(self, node: torch.fx.Node) -> None:
        """Book one node."""
        try:
            if node.op == "placeholder":
                self._read_placeholder(node)
            elif node.op == "output":
                self._read_output(node)
            elif node.op == "get_attr":
                self._scalars[node] = _scalar(self.root, str(node.target))
            elif not (self._is_size(node) or self._is_part_of_neuron(node)):
                self._read_operation(node)
        except Unsupported as refusal:
            path = _path(node)
            self.problems.append(Violation(path, "can be deployed", refusal.operation, refusal.allowed, refusal.remedy))
            self._names[node] = _REFUSED

    def _read_placeholder(self, node: torch.fx.Node) -> None:
        if self._names:
            raise Unsupported("a second input", "one input", "pass everything in one tensor")
        self._names[node] = INPUT

    def _read_output(self, node: torch.fx.Node) -> None:
        answer = node.args[0]
        name = self._names.get(answer) if isinstance(answer, torch.fx.Node) else None
        if name is None or (self.layers and name not in (self.layers[-1].name, _REFUSED)):
            raise Unsupported("another output than the last layer's", "logits", "return the logits only")

    def _is_size(self, node: torch.fx.Node) -> bool:
        """Book the pieces of ``x.size(0)`` and ``x.shape[0]``, which only ever feed a reshape."""
        if node.op == "call_method" and node.target == "size" and node.args[0] in self._names:
            self._sizes[node] = int(node.args[1]) if len(node.args) > 1 else None  # type: ignore[arg-type]
        elif node.target is getattr and node.args[1] == "shape" and node.args[0] in self._names:
            self._sizes[node] = None
        elif node.target is operator.getitem and node.args[0] in self._sizes and isinstance(node.args[1], int):
            self._sizes[node] = node.args[1]
        return node in self._sizes

    def _is_part_of_neuron(self, node: torch.fx.Node) -> bool:
        """Book the spikes and the membrane that snnTorch's neurons return together."""
        if node.target is not operator.getitem or node.args[0] not in self._names:
            return False
        neuron = node.args[0]
        if not isinstance(neuron, torch.fx.Node) or neuron.op != "call_module" or node.args[1] not in (0, 1):
            return False
        if node.args[1] == 0:
            self._names[node] = self._names[neuron]
        elif node.users:
            raise Unsupported("use of a membrane", "spikes", "pass on the spikes, and leave the state to the neurons")
        return True

    def _read_operation(self, node: torch.fx.Node) -> None:
        inputs, steps = self._steps(node)
        for step in steps:
            stem = "neurons" if step.kind in ("relu", "spike") else step.kind
            self._counts[stem] = self._counts.get(stem, 0) + 1
            name = f"{stem}{self._counts[stem]}"
            layer = Layer(name, step.kind, step.options, _path(node), inputs)
            known = [self.shapes[source] for source in inputs]
            self.shapes[name] = output_shape(layer, known) if all(known) else ()
            self.layers.append(layer)
            self._owners[name] = _owner(node)
            if step.module is not None:
                self.modules[name] = step.module
            inputs = (name,)
        self._names[node] = inputs[0]

    def _steps(self, node: torch.fx.Node) -> tuple[tuple[str, ...], list[Step]]:
        """What a node reads, and the layers it amounts to."""
        if node.op == "call_module":
            return self._inputs(node), [self._module_step(node)]
        operation = node.target
        if operation in _ADDITIONS:
            return self._addition(node)
        if operation in _PRODUCTS or operation in _QUOTIENTS:
            return self._product(node)
        reader = METHODS.get(operation) if isinstance(operation, str) else CALLS.get(operation)
        if reader is not None:
            inputs = self._inputs(node)
            return inputs, reader(node, self.shapes[inputs[0]])
        if operation in ("view", "reshape") or operation is torch.reshape:
            return self._inputs(node), self._reshape(node)
        raise refusal_of(operation if isinstance(operation, str) else getattr(operation, "__name__", str(operation)))

    def _inputs(self, node: torch.fx.Node) -> tuple[str, ...]:
        """The one layer that a node reads; a spiking neuron's own membrane does not count."""
        read = [source for source in node.all_input_nodes if source not in self._sizes and source not in self._scalars]
        if len(read) != 1:
            raise Unsupported("several inputs", "one input", "write it as sums of layers")
        return (self._names[read[0]],)

    def _module_step(self, node: torch.fx.Node) -> Step:
        path = str(node.target)
        module = self.root.get_submodule(path)
        if path in self._called and next(iter(module.state_dict()), None) is not None:
            raise Unsupported(
                "a layer called again",
                "every layer once per time step",
                "give each place a layer of its own; write one time step, without a loop over time",
            )
        self._called.add(path)
        return read_module(module, self.shapes[self._inputs(node)[0]])

    def _addition(self, node: torch.fx.Node) -> tuple[tuple[str, ...], list[Step]]:
        terms = list(node.args)
        if len(terms) != 2 or node.kwargs or not all(term in self._names for term in terms):
            raise Unsupported("a sum with a constant or a factor", "sums of layers", "put constants into biases")
        return tuple(self._names[term] for term in terms), [Step("add", {})]  # type: ignore[index]

    def _product(self, node: torch.fx.Node) -> tuple[tuple[str, ...], list[Step]]:
        left, right = node.args
        if node.target in _PRODUCTS and left not in self._names:
            left, right = right, left
        factor = self._scalars.get(right) if isinstance(right, torch.fx.Node) else right
        if left not in self._names or not isinstance(factor, (int, float, Tensor)):
            raise Unsupported("a product of two activities", "products with scalars", "use a sum, or a learned scalar")
        if node.target in _QUOTIENTS:
            if isinstance(factor, nn.Parameter):
                raise Unsupported("a division by a parameter", "products with scalars", "learn the inverse")
            factor = 1 / float(factor)
        learned = isinstance(factor, nn.Parameter)
        value = factor.item() if isinstance(factor, Tensor) else factor
        step = Step("scale", {"learned": learned}, Scale(value, learned))
        return (self._names[left],), [step]  # type: ignore[index]

    def _reshape(self, node: torch.fx.Node) -> list[Step]:
        given: Any = node.args[1] if len(node.args) == 2 else node.args[1:]
        sizes = tuple(given) if isinstance(given, tuple | list) else (given,)
        shape = self.shapes[self._names[node.args[0]]]  # type: ignore[index]
        features = 1
        for size in shape:
            features *= size
        keeps_batch = len(sizes) == 2 and (self._sizes.get(sizes[0]) == 0 or sizes == (-1, features))
        if not keeps_batch or sizes[1] not in (-1, features):
            raise Unsupported(f"{node.target}{sizes}", "torch.flatten(x, 1)", "use torch.flatten(x, 1)")
        return [Step("flatten", {})]

    def finish(self) -> tuple[Layer, ...]:
        """The layers, each with its residual block: the innermost module that holds both a sum and neurons."""
        neurons = {self._owners[layer.name] for layer in self.layers if layer.kind in NEURONS}
        blocks = set()
        for layer in self.layers:
            block = self._owners[layer.name] if layer.kind == "add" else ""
            while block and not any(_is_inside(owner, block) for owner in neurons):
                block = block.rpartition(".")[0]
            blocks.add(block)
        blocks.discard("")
        return tuple(
            replace(
                layer, block=max((b for b in blocks if _is_inside(self._owners[layer.name], b)), key=len, default="")
            )
            for layer in self.layers
        )


def _is_inside(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _owner(node: torch.fx.Node) -> str:
    """Path of the module whose forward calls the node's operation."""
    stack = list(node.meta.get("nn_module_stack") or ())
    innermost: str = stack[-1] if stack else ""
    return innermost.rpartition(".")[0] if node.op == "call_module" else innermost


def _path(node: torch.fx.Node) -> str:
    """Where an operation stands in the user's module."""
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{owner}.{name}" if (owner := _owner(node)) else str(name)


def _scalar(root: nn.Module, path: str) -> float | Tensor:
    """A bare parameter or buffer of one number (or, as the first state of snnTorch's neurons, of none)."""
    owner, _, name = path.rpartition(".")
    value = getattr(root.get_submodule(owner), name)
    if not isinstance(value, Tensor) or value.numel() > 1:
        raise Unsupported("a bare parameter", "parameters inside layers, or scalars", "use nn.Linear or nn.Conv2d")
    return value


# Stands for a refused layer, so that what follows is still read.
_REFUSED = "(refused)"
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
