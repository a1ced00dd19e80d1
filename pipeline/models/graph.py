"""The typed layer graph: a network as data, so that it can be converted, saved and rebuilt without user code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from hardware.errors import RuleViolations, Violation
from pipeline.models.layers import Normalize

LayerKind = Literal["normalize", "conv", "linear", "batch_norm", "relu", "spike", "avg_pool", "flatten", "dropout"]
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
}
FRACTIONS = ("eps", "momentum", "p")
OPTIONS: Mapping[LayerKind, frozenset[str]] = {
    "normalize": frozenset({"features"}),
    "conv": frozenset({"in_channels", "out_channels", "kernel_size", "stride", "padding", "bias"}),
    "linear": frozenset({"in_features", "out_features", "bias"}),
    "batch_norm": frozenset({"features", "eps", "momentum", "spatial"}),
    "avg_pool": frozenset({"kernel_size"}),
    "dropout": frozenset({"p"}),
    **dict.fromkeys(("relu", "spike", "flatten"), frozenset[str]()),
}

Options = Mapping[str, int | float | bool]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One operation of a network.

    Attributes:
        name: unique and plain; parameters are stored under it.
        kind: what it does.
        options: sizes and settings of the kind, plain numbers.
        path: where it stood in the user's module, for messages.
    """

    name: str
    kind: LayerKind
    options: Options = field(default_factory=dict)
    path: str = ""


@dataclass(frozen=True)
class LayerGraph:
    """A chain of layers in order of execution; the last one's output is the logits.

    Attributes:
        input_shape: ``(channels, height, width)`` or ``(features,)`` of one image.

    Raises:
        RuleViolations: on construction, for every layer that does not fit.
    """

    input_shape: Shape
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise RuleViolations("network", problems)

    def shapes(self) -> dict[str, Shape]:
        """Output shape of every layer, without the batch axis."""
        shapes: dict[str, Shape] = {}
        shape = self.input_shape
        for layer in self.layers:
            shape = output_shape(layer, shape)
            shapes[layer.name] = shape
        return shapes

    def with_kind(self, old: LayerKind, new: LayerKind) -> LayerGraph:
        """The same chain with one kind of layer replaced, as when ReLUs become spiking neurons."""
        layers = tuple(
            Layer(layer.name, new, layer.options, layer.path) if layer.kind == old else layer for layer in self.layers
        )
        return LayerGraph(self.input_shape, layers)

    def with_biases(self) -> LayerGraph:
        """The same chain with a bias in every weighted layer."""
        layers = tuple(
            Layer(layer.name, layer.kind, {**layer.options, "bias": True}, layer.path)
            if layer.kind in WEIGHTED
            else layer
            for layer in self.layers
        )
        return LayerGraph(self.input_shape, layers)

    def without_kind(self, kind: LayerKind) -> LayerGraph:
        """The same chain without one kind of layer."""
        return LayerGraph(self.input_shape, tuple(layer for layer in self.layers if layer.kind != kind))


def output_shape(layer: Layer, shape: Shape) -> Shape:
    """Shape after ``layer``; empty if the layer does not fit an input of ``shape``."""
    options = layer.options
    if layer.kind in ("relu", "spike", "dropout"):
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


def _problems(graph: LayerGraph) -> list[Violation]:
    """Every reason why the chain cannot be a network that converts and deploys."""
    problems: list[Violation] = []

    def refuse(layer: Layer, rule: str, actual: str, limit: str, remedy: str) -> None:
        problems.append(Violation(layer.path or layer.name, rule, actual, limit, remedy))

    shape = graph.input_shape
    if len(shape) not in (1, 3) or min(shape) < 1:
        rule = "images are (channels, height, width) or (features,)"
        return [Violation(INPUT, rule, str(shape), "1 or 3 positive sizes", "reshape the images")]
    previous = INPUT
    names: set[str] = set()
    for index, layer in enumerate(graph.layers):
        if set(layer.options) != OPTIONS[layer.kind]:
            allowed = ", ".join(sorted(OPTIONS[layer.kind])) or "none"
            refuse(layer, "has the options of its kind", ", ".join(sorted(layer.options)), allowed, "export it again")
            return problems
        impossible = _impossible_options(layer)
        if impossible:
            refuse(layer, "options are possible", *impossible, "check sizes")
            return problems
        produced = output_shape(layer, shape)
        if not produced:
            refuse(
                layer,
                "fits the shape before it",
                f"{layer.kind} after {shape}",
                "a matching shape",
                "check sizes",
            )
            return problems
        if layer.name in names | RESERVED or not layer.name.replace("_", "").isalnum():
            refuse(layer, "name is unique and plain", layer.name, "letters, digits, _", "rename it")
        if layer.kind in ("relu", "spike") and previous not in ("conv", "linear", "batch_norm"):
            refuse(
                layer,
                "neurons follow a weighted layer",
                previous,
                "conv, linear, batch_norm",
                "move it there",
            )
        if layer.kind == "batch_norm" and previous not in WEIGHTED:
            refuse(layer, "batch norm follows a weighted layer", previous, "conv, linear", "move it there")
        if layer.kind in WEIGHTED and previous in (*WEIGHTED, "batch_norm"):
            refuse(layer, "neurons stand between weighted layers", previous, "a ReLU before it", "add nn.ReLU")
        if layer.kind == "avg_pool" and previous not in ("relu", "spike"):
            refuse(layer, "pooling follows neurons", previous, "a ReLU before it", "pool after the ReLU")
        if layer.kind == "normalize" and index:
            refuse(layer, "normalisation comes first", f"layer {index}", "layer 0", "move it to the front")
        if layer.kind not in ("flatten", "dropout"):
            previous = layer.kind
        names.add(layer.name)
        shape = produced
    if previous != "linear" or len(shape) != 1:
        last = graph.layers[-1] if graph.layers else Layer("network", "flatten")
        refuse(last, "the network ends in logits", previous, "a linear layer", "end with nn.Linear and no ReLU")
    return problems


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
    return nn.Conv2d(
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
}
