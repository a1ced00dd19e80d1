"""The typed layer graph: a network as data, so that it can be converted, saved and rebuilt without user code.

Between neurons everything is linear: a current is a weighted sum of earlier spikes, through any number of residual
sums, factors and batch norms, and so it stays expressible in synapses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

from torch import nn

from hardware.errors import RuleViolations, Violation
from pipeline.models.layers import Add, Conv2d, LeakyReadout, Normalize, Scale, SynapticCurrent

LayerKind = Literal[
    "normalize", "conv", "linear", "batch_norm", "relu", "spike", "avg_pool", "flatten", "dropout", "add", "scale",
    "synaptic_current", "leaky_readout",
]  # fmt: skip
KINDS: tuple[str, ...] = get_args(LayerKind)
WEIGHTED: tuple[LayerKind, ...] = ("conv", "linear")
INPUT = "input"
# Names of the integer network's own, and what torch's container of layers cannot hold.
RESERVED = {INPUT, "readout", *dir(nn.ModuleDict())}
MAX_SIZE = 2**20
LIMITS: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("features", "in_features", "out_features", "in_channels", "out_channels"), (1, MAX_SIZE)),
    **dict.fromkeys(("kernel_size", "stride"), (1, MAX_SIZE)),
    "padding": (0, MAX_SIZE),
    "eps": (1e-12, 1.0),
    "momentum": (0.0, 1.0),
    "p": (0.0, 1.0),
    "alpha": (0.0, 1.0),
    "beta": (0.0, 1.0),
}
FRACTIONS = ("eps", "momentum", "p", "alpha", "beta")
OPTIONS: Mapping[LayerKind, frozenset[str]] = {
    "normalize": frozenset({"features"}),
    "conv": frozenset({"in_channels", "out_channels", "kernel_size", "stride", "padding", "bias"}),
    "linear": frozenset({"in_features", "out_features", "bias"}),
    "batch_norm": frozenset({"features", "eps", "momentum", "spatial"}),
    "avg_pool": frozenset({"kernel_size"}),
    "dropout": frozenset({"p"}),
    "spike": frozenset({"beta", "subtract"}),
    "scale": frozenset({"learned"}),
    "synaptic_current": frozenset({"alpha"}),
    "leaky_readout": frozenset({"beta"}),
    **dict.fromkeys(("relu", "flatten", "add"), frozenset[str]()),
}
NEURONS: tuple[LayerKind, ...] = ("relu", "spike")
WITH_MEMORY: tuple[LayerKind, ...] = ("spike", "synaptic_current", "leaky_readout")
"""What keeps a state from step to step; all else answers to each step alone."""
PIXEL_LEVELS = 255

Options = Mapping[str, int | float | bool]
Shape = tuple[int, ...]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Layer:
    """One operation of a network.

    Attributes:
        name: unique and plain; parameters are stored under it.
        kind: what it does.
        options: sizes and settings of the kind, plain numbers.
        path: where it stood in the user's module, for messages.
        inputs: names of the layers it reads, or "input"; empty for the layer before it.
        block: the residual block it belongs to, if any: neurons of one block are calibrated together.
    """

    name: str
    kind: LayerKind
    options: Options = field(default_factory=dict)
    path: str = ""
    inputs: tuple[str, ...] = ()
    block: str = ""


@dataclass(frozen=True)
class LayerGraph:
    """Layers in order of execution, each reading earlier ones; the last one's output is the logits.

    Attributes:
        input_shape: ``(channels, height, width)`` or ``(features,)`` of one image.
        max_code: the integer that stands for an input of 1: 255 for 8-bit pixels, 1 for spikes.

    Raises:
        RuleViolations: on construction, for every layer that does not fit.
    """

    input_shape: Shape
    layers: tuple[Layer, ...]
    max_code: int = PIXEL_LEVELS

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise RuleViolations("network", problems)

    @cached_property
    def sources(self) -> Mapping[str, tuple[str, ...]]:
        """What every layer reads, by name."""
        before = [INPUT, *(layer.name for layer in self.layers)]
        return {layer.name: layer.inputs or (before[i],) for i, layer in enumerate(self.layers)}

    @cached_property
    def by_name(self) -> Mapping[str, Layer]:
        """Layers by name."""
        return {layer.name: layer for layer in self.layers}

    def readers(self, name: str) -> tuple[Layer, ...]:
        """The layers that read layer ``name``."""
        return tuple(layer for layer in self.layers if name in self.sources[layer.name])

    def shapes(self) -> dict[str, Shape]:
        """Output shape of every layer, without the batch axis."""
        shapes: dict[str, Shape] = {INPUT: self.input_shape}
        for layer in self.layers:
            shapes[layer.name] = output_shape(layer, [shapes[name] for name in self.sources[layer.name]])
        del shapes[INPUT]
        return shapes

    def evaluate(self, first: Value, apply: Callable[[Layer, Sequence[Value]], Value]) -> Value:
        """The last layer's value, where ``apply`` gives a layer's value from those it reads; each is held only as
        long as something still reads it.
        """
        last_reader = {name: layer.name for layer in self.layers for name in self.sources[layer.name]}
        values = {INPUT: first}
        del first
        for layer in self.layers:
            sources = self.sources[layer.name]
            read = [values[name] for name in sources]
            for name in {name for name in sources if last_reader[name] == layer.name}:
                del values[name]
            values[layer.name] = apply(layer, read)
        return values[self.layers[-1].name]

    def before_last_spikes(self) -> frozenset[str]:
        """Names of the layers, and "input", from which a path leads to what has a memory: there it matters when
        something happens.
        """
        found: set[str] = set()
        for layer in reversed(self.layers):
            if layer.kind in (*NEURONS, *WITH_MEMORY) or layer.name in found:
                found.update(self.sources[layer.name])
        return frozenset(found)

    def spiking(self, beta: float = 1.0, subtract: bool = False) -> LayerGraph:
        """The same network with spiking neurons for ReLUs and a bias in every weighted layer that the method gives
        one: all of them, or in a network with residual sums only those after the last sum.
        """
        sums = [i for i, layer in enumerate(self.layers) if layer.kind == "add"]
        neuron: Options = {"beta": beta, "subtract": subtract}

        def changed(index: int, layer: Layer) -> Layer:
            if layer.kind == "relu":
                return replace(layer, kind="spike", options=neuron)
            if layer.kind in WEIGHTED and index > max(sums, default=-1):
                return replace(layer, options={**layer.options, "bias": True})
            return layer

        return replace(self, layers=tuple(changed(*entry) for entry in enumerate(self.layers)))


def output_shape(layer: Layer, inputs: Sequence[Shape]) -> Shape:
    """Shape after ``layer``; empty if the layer does not fit inputs of these shapes."""
    options, shape = layer.options, inputs[0]
    if layer.kind == "add":
        return shape if len(inputs) > 1 and len(set(inputs)) == 1 else ()
    if len(inputs) != 1:
        return ()
    if layer.kind in ("relu", "dropout", "scale", *WITH_MEMORY):
        return shape
    if layer.kind == "batch_norm" and bool(options["spatial"]) != (len(shape) == 3):
        return ()
    if layer.kind in ("batch_norm", "normalize"):
        return shape if shape and shape[0] == options["features"] else ()
    if layer.kind == "flatten":
        return (_product(shape),) if shape else ()
    if layer.kind == "linear":
        return (int(options["out_features"]),) if shape == (options["in_features"],) else ()
    if len(shape) != 3:
        return ()
    kernel = int(options["kernel_size"])
    if layer.kind == "avg_pool":
        fits = shape[1] % kernel == 0 and shape[2] % kernel == 0
        return (shape[0], shape[1] // kernel, shape[2] // kernel) if fits else ()
    stride, padding = int(options["stride"]), int(options["padding"])
    height, width = ((size + 2 * padding - kernel) // stride + 1 for size in shape[1:])
    fits = shape[0] == options["in_channels"] and min(height, width) >= 1
    return (int(options["out_channels"]), height, width) if fits else ()


def _product(shape: Shape) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


Signal = Literal["pixels", "spikes", "current", "synaptic", "logits"]
"""What flows between layers: pixels, spikes (perhaps pooled), a current, which is linear in the spikes of a step, one
that outlasts the step, or logits that were integrated by neurons."""


@dataclass(frozen=True)
class _Rule:
    """What a kind of layer may read, and what it gives; ``wording`` is the rule's name, ``remedy`` the way out."""

    reads: tuple[Signal, ...]
    gives: Signal | None
    wording: str
    remedy: str


_RULES: Mapping[LayerKind, _Rule] = {
    "normalize": _Rule(("pixels",), None, "normalisation comes first", "move it to the front"),
    "conv": _Rule(
        ("pixels", "spikes"), "current", "neurons stand between weighted layers", "add nn.ReLU before this layer"
    ),
    "linear": _Rule(
        ("pixels", "spikes"), "current", "neurons stand between weighted layers", "add nn.ReLU before this layer"
    ),
    "batch_norm": _Rule(("current",), None, "batch norm follows a weighted layer or a sum", "move it there"),
    "relu": _Rule(("current",), "spikes", "neurons follow a weighted layer or a sum", "move it there"),
    "spike": _Rule(("current", "synaptic"), "spikes", "neurons follow a weighted layer or a sum", "move it there"),
    "synaptic_current": _Rule(
        ("current",), "synaptic", "synapses with a memory follow a weighted layer or a sum", "move it there"
    ),
    "leaky_readout": _Rule(
        ("current", "synaptic"), "logits", "a readout follows a weighted layer or a sum", "move it there"
    ),
    "avg_pool": _Rule(("spikes",), None, "pooling follows neurons", "pool after the ReLU"),
    "flatten": _Rule(("pixels", "spikes"), None, "flattening follows neurons", "flatten after the ReLU"),
    "dropout": _Rule(("pixels", "spikes", "current"), None, "", ""),
    "add": _Rule(("spikes", "current"), "current", "sums are of spikes and currents", "put a 1x1 conv on the image"),
    "scale": _Rule(("spikes", "current"), "current", "factors scale spikes and currents", "fold it into Normalize"),
}


def _problems(graph: LayerGraph) -> Iterator[Violation]:
    """Every reason why the graph cannot be a network that converts and deploys."""
    shape = graph.input_shape
    if not 1 <= graph.max_code <= PIXEL_LEVELS:
        yield Violation(INPUT, "codes have at most 8 bits", str(graph.max_code), "1..255", "choose within the range")
    if len(shape) not in (1, 3) or min(shape) < 1:
        wording = "images are (channels, height, width) or (features,)"
        yield Violation(INPUT, wording, str(shape), "1 or 3 positive sizes", "reshape the images")
        return
    if not graph.layers:
        yield Violation("network", "has layers", "none", "1 or more", "add nn.Flatten and nn.Linear")
        return
    flow = _Flow(shape)
    yield from flow.problems(graph.layers)
    last = graph.layers[-1]
    shape, signal = flow.shapes[last.name], flow.signals[last.name]
    if signal is not None and shape and (signal not in ("current", "logits") or len(shape) != 1):
        spikes = flow.kinds[last.name] == "spike"
        yield Violation(
            last.path or last.name,
            "the network ends in logits",
            f"{flow.kinds[last.name]} of shape {shape}",
            "a linear layer",
            "leave out the last neurons: logits are the average of what enters them"
            if spikes
            else "end with nn.Linear and no ReLU",
        )
    for layer in graph.layers[:-1]:
        if not graph.readers(layer.name):
            subject = layer.path or layer.name
            yield Violation(subject, "leads to the logits", "is not read", "a reader", "remove it, or use its result")


def misfits(input_shape: Shape, layers: Sequence[Layer], unknown: str) -> tuple[Violation, ...]:
    """What is wrong with layers some of which read a layer that is left out.

    Args:
        input_shape: of one image.
        layers: in order of execution, not a whole network.
        unknown: name for the layers left out; nothing is said of what reads them.
    """
    flow = _Flow(input_shape)
    flow.shapes[unknown], flow.signals[unknown], flow.kinds[unknown] = (), None, ""
    return tuple(flow.problems(layers))


class _Flow:
    """What flows out of every layer; an empty shape and no signal where a problem has made them unknown."""

    def __init__(self, input_shape: Shape) -> None:
        self.shapes: dict[str, Shape] = {INPUT: input_shape}
        self.signals: dict[str, Signal | None] = {INPUT: "pixels"}
        self.kinds: dict[str, str] = {INPUT: "the image"}

    def problems(self, layers: Sequence[Layer]) -> Iterator[Violation]:
        """What is wrong with each layer where it stands, none blamed for another."""
        previous = INPUT
        spikes = any(layer.kind in WITH_MEMORY for layer in layers)
        for index, layer in enumerate(layers):
            subject = layer.path or layer.name
            sources = layer.inputs or (previous,)
            if layer.name in self.shapes or layer.name in RESERVED or not layer.name.replace("_", "").isalnum():
                yield Violation(subject, "name is unique and plain", layer.name, "letters, digits, _", "rename it")
            if missing := [name for name in sources if name not in self.shapes]:
                yield Violation(subject, "reads earlier layers", ", ".join(missing), "layers before it", "reorder them")
            known = [name for name in sources if name in self.shapes]
            signal = self.signals[known[0]] if known else None
            rule = _RULES[layer.kind]
            if wrong := [self.kinds[name] for name in known if self.signals[name] not in (None, *rule.reads)]:
                allowed = " or ".join(rule.reads)
                yield Violation(subject, rule.wording, f"after {', '.join(wrong)}", allowed, rule.remedy)
                signal = None
            elif layer.kind == "normalize" and index:
                yield Violation(subject, rule.wording, f"layer {index}", "layer 0", rule.remedy)
            elif layer.kind == "relu" and spikes:
                yield Violation(
                    subject, "neurons are of one kind", "relu among spikes", "spikes only", "use snntorch.Leaky"
                )
            shape: Shape = ()
            if problem := _misfit_of_options(layer):
                yield problem
            elif not missing and all(self.shapes[name] for name in sources):
                shape = output_shape(layer, [self.shapes[name] for name in sources])
                if not shape:
                    read = " and ".join(str(self.shapes[name]) for name in sources)
                    actual = f"{layer.kind} after {read}"
                    yield Violation(subject, "fits the shape before it", actual, "a matching shape", "check sizes")
            self.shapes[layer.name] = shape
            self.signals[layer.name] = rule.gives or signal
            passes = layer.kind in ("flatten", "dropout") and known
            self.kinds[layer.name] = self.kinds[known[0]] if passes else layer.kind
            previous = layer.name


def _misfit_of_options(layer: Layer) -> Violation | None:
    subject = layer.path or layer.name
    if set(layer.options) != OPTIONS[layer.kind]:
        allowed = ", ".join(sorted(OPTIONS[layer.kind])) or "none"
        has = ", ".join(sorted(layer.options)) or "none"
        return Violation(subject, "has the options of its kind", has, allowed, "export it again")
    impossible = _impossible_options(layer)
    return Violation(subject, "options are possible", *impossible, "check sizes") if impossible else None


def _impossible_options(layer: Layer) -> tuple[str, str] | None:
    """The options that no layer can have and what is allowed for them, as text."""
    wrong = {
        name: value
        for name, value in layer.options.items()
        if name in LIMITS
        and not (LIMITS[name][0] <= value <= LIMITS[name][1] and (name in FRACTIONS or type(value) is int))
    }
    if not wrong:
        return None
    return (
        ", ".join(f"{name} {value}" for name, value in wrong.items()),
        ", ".join("{} {:g}..{:g}".format(name, *LIMITS[name]) for name in wrong),
    )


def build_module(layer: Layer) -> nn.Module:
    """A fresh torch module for a layer (not for "spike", whose neurons belong to the spiking network)."""
    return _BUILDERS[layer.kind](layer.options)


def _build_normalize(options: Options) -> nn.Module:
    channels = int(options["features"])
    return Normalize([0.0] * channels, [1.0] * channels)


def _build_conv(options: Options) -> nn.Module:
    sizes = {key: int(options[key]) for key in ("in_channels", "out_channels", "kernel_size", "stride", "padding")}
    return Conv2d(
        sizes["in_channels"],
        sizes["out_channels"],
        sizes["kernel_size"],
        sizes["stride"],
        sizes["padding"],
        bias=bool(options["bias"]),
    )


def _build_linear(options: Options) -> nn.Module:
    return nn.Linear(int(options["in_features"]), int(options["out_features"]), bias=bool(options["bias"]))


def _build_batch_norm(options: Options) -> nn.Module:
    settings: dict[str, Any] = {"eps": float(options["eps"]), "momentum": float(options["momentum"])}
    kind = nn.BatchNorm2d if options["spatial"] else nn.BatchNorm1d
    return kind(int(options["features"]), **settings)


_BUILDERS: Mapping[str, Callable[[Options], nn.Module]] = {
    "normalize": _build_normalize,
    "conv": _build_conv,
    "linear": _build_linear,
    "batch_norm": _build_batch_norm,
    "relu": lambda _: nn.ReLU(),
    "avg_pool": lambda options: nn.AvgPool2d(int(options["kernel_size"])),
    "flatten": lambda _: nn.Flatten(),
    "dropout": lambda options: nn.Dropout(float(options["p"])),
    "add": lambda _: Add(),
    "scale": lambda options: Scale(1.0, learned=bool(options["learned"])),
    "synaptic_current": lambda options: SynapticCurrent(float(options["alpha"])),
    "leaky_readout": lambda options: LeakyReadout(float(options["beta"])),
}
