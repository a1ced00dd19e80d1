"""Reading a user's torch module into a layer graph, or refusing it in one table."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import snntorch
import torch
import torch.fx
from torch import Tensor, nn

from hardware.errors import RuleViolations, SpikeguardError, Violation
from pipeline.models.graph import INPUT, NEURONS, Layer, LayerGraph, Shape, build_module, misfits, output_shape
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
        SpikeguardError: if the module cannot be traced at all, or computes something else than its trace.
    """
    with _left_as_it_was(module):
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
            others = misfits(tuple(input_shape), reading.layers, _REFUSED)
            raise RuleViolations(f"network {type(module).__name__}", [*reading.problems, *others])
        network = TracedNetwork(LayerGraph(tuple(input_shape), reading.finish()), reading.modules)
        _require_same_logits(module, network)
    return network


@torch.no_grad()
def _require_same_logits(module: nn.Module, network: TracedNetwork) -> None:
    """Run the module and its layers one by one (spiking ones for the first step): a trace does not show everything.

    Raises:
        SpikeguardError: if they differ.
    """
    module.eval()
    sample = next((value for value in module.parameters() if value.is_floating_point()), torch.zeros(()))
    images = torch.rand((2, *network.graph.input_shape), generator=torch.Generator().manual_seed(0)).to(sample)

    def apply(layer: Layer, read: Sequence[Tensor]) -> Tensor:
        # What torch runs in place must not change what other layers read.
        own = network.modules.get(layer.name) if layer.kind != "relu" else None
        answer = (own or build_module(layer).eval())(*read)
        return cast(Tensor, answer[0] if isinstance(answer, tuple) else answer)

    try:
        _forget(module)
        expected = module(images.clone())
    except Exception as error:  # the user's own code may raise anything
        raise SpikeguardError(f"{type(module).__name__} cannot be run on images ({error}); mend it") from error
    _forget(module)
    found = network.graph.evaluate(images, apply)
    tolerance = 1e-3 * float(expected.abs().max())
    if not torch.allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True):
        raise SpikeguardError(
            f"{type(module).__name__} gives other logits than its layers one by one; write forward without changes in "
            "place of what is read again, and without dropout that stays on in eval mode"
        )


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Take back what forward does to the module's attributes: snnTorch's neurons reset, and states are stored."""
    before = [(part, dict(vars(part)), dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for part, attributes, buffers in before:
            vars(part).clear()
            vars(part).update(attributes)
            part._buffers.clear()
            part._buffers.update(buffers)


def _forget(module: nn.Module) -> None:
    """Back to the first step of snnTorch's neurons."""
    for part in module.modules():
        if isinstance(part, snntorch.Leaky):
            part.mem = part.mem.new_zeros(0)


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
        self._tensors: dict[torch.fx.Node, Tensor] = {}
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
                self._tensors[node] = _tensor(self.root, str(node.target))
            elif not (self._is_size(node) or self._is_part_of_neuron(node)):
                self._read_operation(node)
        except Unsupported as refusal:
            row = Violation(_path(node), "can be deployed", refusal.operation, refusal.allowed, refusal.remedy)
            if row not in self.problems:  # a loop repeats it
                self.problems.append(row)
            self._names[node] = _REFUSED

    def _read_placeholder(self, node: torch.fx.Node) -> None:
        if self._names:
            remedy = "take states from init_leaky() in forward, and pass other images as channels"
            raise Unsupported("a second input", "images alone", remedy)
        self._names[node] = INPUT

    def _read_output(self, node: torch.fx.Node) -> None:
        answer = node.args[0]
        name = self._names.get(answer) if isinstance(answer, torch.fx.Node) else None
        if name is None or (self.layers and name not in (self.layers[-1].name, _REFUSED)):
            raise Unsupported("another output than the last layer's", "logits", "return the logits only")

    def _is_size(self, node: torch.fx.Node) -> bool:
        """Book the pieces of ``x.size(0)`` and ``x.shape[0]``, which only ever feed a reshape."""
        if node.op == "call_method" and node.target == "size" and node.args[0] in self._names:
            axes = (*node.args[1:], *node.kwargs.values())
            self._sizes[node] = axes[0] if axes and isinstance(axes[0], int) else None
        elif node.target is getattr and node.args[1] == "shape" and node.args[0] in self._names:
            self._sizes[node] = None
        elif node.target is operator.getitem and node.args[0] in self._sizes and isinstance(node.args[1], int):
            self._sizes[node] = node.args[1]
        return node in self._sizes

    def _is_part_of_neuron(self, node: torch.fx.Node) -> bool:
        """Book the spikes and the membrane that snnTorch's neurons return together."""
        neuron = node.args[0] if node.target is operator.getitem else None
        if not isinstance(neuron, torch.fx.Node) or neuron.op != "call_module" or not isinstance(node.args[1], int):
            return False
        module = self.root.get_submodule(str(neuron.target))
        if not isinstance(module, snntorch.SpikingNeuron) or (module.init_hidden and not module.output):
            return False
        if node.args[1] == 0:
            self._names[node] = self._names[neuron]
        elif self._names[neuron] == _REFUSED:
            self._names[node] = _REFUSED
        elif any(user.target != neuron.target for user in node.users):
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
            return self._module_step(node)
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
        """The one layer that a node reads; the pieces of a shape do not count."""
        read = [source for source in node.all_input_nodes if source not in self._sizes]
        if len(read) != 1 or read[0] not in self._names:
            raise Unsupported("several inputs", "one input", "write it as sums of layers")
        return (self._names[read[0]],)

    def _module_step(self, node: torch.fx.Node) -> tuple[tuple[str, ...], list[Step]]:
        path = str(node.target)
        module = self.root.get_submodule(path)
        if module.state_dict():
            self._call_once(path, "a layer called again")
        if type(module) is Add:
            return self._addition(node)
        is_neuron = isinstance(module, snntorch.SpikingNeuron)
        inputs = self._current_of_neuron(node) if is_neuron else self._inputs(node)
        return inputs, [read_module(module, self.shapes[inputs[0]])]

    def _current_of_neuron(self, node: torch.fx.Node) -> tuple[str, ...]:
        """What a neuron reads besides its state, which the first step finds at zero."""
        current, *states = (*node.args, *node.kwargs.values())
        if not isinstance(current, torch.fx.Node) or current not in self._names:
            raise Unsupported("neurons without input", "one current", "pass what enters the neurons")
        for state in states:
            known = self._tensors.get(state) if isinstance(state, torch.fx.Node) else None
            if state is not None and (known is None or bool(known.any())):
                raise Unsupported("a state of one's own", "states that start at zero", "pass what init_leaky() gives")
        return (self._names[current],)

    def _call_once(self, path: str, what: str) -> None:
        if path in self._called:
            raise Unsupported(
                what,
                "everything once per time step",
                "give each place a layer of its own; write one time step, without a loop over time",
            )
        self._called.add(path)

    def _addition(self, node: torch.fx.Node) -> tuple[tuple[str, ...], list[Step]]:
        terms = node.args
        if len(terms) < 2 or node.kwargs or not all(term in self._names for term in terms):
            raise Unsupported("a sum with a constant or a factor", "sums of layers", "put constants into biases")
        return tuple(self._names[term] for term in terms), [Step("add", {})]  # type: ignore[index]

    def _product(self, node: torch.fx.Node) -> tuple[tuple[str, ...], list[Step]]:
        divides = node.target in _QUOTIENTS
        left, right = node.args if len(node.args) == 2 else (None, None)
        if not divides and left not in self._names:
            left, right = right, left
        if any(term in self._sizes for term in (left, right)):
            raise Unsupported("arithmetic with sizes", "torch.flatten(x, 1)", "use torch.flatten(x, 1)")
        factor = self._tensors.get(right) if isinstance(right, torch.fx.Node) else right
        if left not in self._names or not isinstance(factor, (int, float, Tensor)) or node.kwargs:
            raise Unsupported("a product of two activities", "products with scalars", "use a sum, or a learned scalar")
        if isinstance(factor, Tensor) and factor.numel() != 1:
            raise Unsupported("a factor per feature", "products with scalars", "use batch norm, or one learned scalar")
        learned = isinstance(factor, nn.Parameter)
        if learned:
            self._call_once(str(right.target), "a learned factor used again")  # type: ignore[union-attr]
        value = factor.item() if isinstance(factor, Tensor) else float(factor)
        if divides and (learned or not value):
            raise Unsupported("a division by a parameter or zero", "products with scalars", "learn the inverse")
        step = Step("scale", {"learned": learned}, Scale(1 / value if divides else value, learned))
        return (self._names[left],), [step]  # type: ignore[index]

    def _reshape(self, node: torch.fx.Node) -> list[Step]:
        given: Any = node.args[1] if len(node.args) == 2 else node.args[1:]
        sizes = tuple(given) if isinstance(given, tuple | list) else (given,)
        shape = self.shapes[self._inputs(node)[0]]
        if not shape:  # unknown, because of a problem before it
            return [Step("flatten", {})]
        features = math.prod(shape)
        keeps_batch = len(sizes) == 2 and (self._sizes.get(sizes[0]) == 0 or sizes == (-1, features))
        if not keeps_batch or sizes[1] not in (-1, features):
            given = ", ".join(str(size) for size in sizes)
            raise Unsupported(f"a reshape to ({given})", "torch.flatten(x, 1)", "use torch.flatten(x, 1)")
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


def _tensor(root: nn.Module, path: str) -> Tensor:
    """A parameter, buffer or constant that forward names itself."""
    owner, _, name = path.rpartition(".")
    value = getattr(root.get_submodule(owner), name)
    if not isinstance(value, Tensor):
        raise Unsupported(f"a value of type {type(value).__name__}", "tensors", "write it as layers")
    return value


# Stands for a refused layer, so that what follows is still read.
_REFUSED = "(refused)"
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
