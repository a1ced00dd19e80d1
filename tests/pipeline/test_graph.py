from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hardware.errors import RuleViolations, Violation
from pipeline.models.graph import INPUT, Layer, LayerGraph, LayerKind, build_module, misfits
from pipeline.models.spiking import RateNetwork
from tests.pipeline.samples import NETWORKS, rate_network

CONV: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 2,
    "kernel_size": 3,
    "stride": 1,
    "padding": 1,
    "bias": False,
}


def layer(name: str, kind: LayerKind, *inputs: str, **options: Any) -> Layer:
    return Layer(name, kind, options, inputs=inputs)


CONV1, CONV2 = layer("conv1", "conv", **CONV), layer("conv2", "conv", **{**CONV, "in_channels": 2})
RELU1, RELU2 = layer("neurons1", "relu"), layer("neurons2", "relu")
SPIKE1 = layer("neurons1", "spike", beta=0.5, subtract=False)
NORM1 = layer("norm1", "batch_norm", features=2, eps=1e-5, momentum=0.1, spatial=True)
POOL1 = layer("pool1", "avg_pool", kernel_size=2)
ADD1 = layer("add1", "add", "neurons1", "conv2")
SCALE1 = layer("scale1", "scale", learned=True)
FLATTEN = layer("flatten1", "flatten")
HEAD = layer("head", "linear", in_features=32, out_features=3, bias=False)
RESIDUAL = (CONV1, RELU1, CONV2, ADD1, RELU2, FLATTEN, HEAD)


def problems(*layers: Layer, shape: tuple[int, ...] = (1, 4, 4)) -> tuple[Violation, ...]:
    with pytest.raises(RuleViolations) as caught:
        LayerGraph(shape, layers)
    return caught.value.violations


def told(*layers: Layer) -> set[tuple[str, str]]:
    return {(row.object, row.rule) for row in problems(*layers)}


def outputs_of(network: RateNetwork) -> dict[str, Tensor]:
    """Every layer's output for two blank images."""
    values = {INPUT: torch.zeros(2, *network.graph.input_shape)}
    for name, module in network.layers.items():
        values[name] = module(*(values[source] for source in network.graph.sources[name]))
    return values


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_are_those_torch_gives(name: str) -> None:
    network = rate_network(name)
    expected = {name: tuple(value.shape[1:]) for name, value in outputs_of(network).items() if name != INPUT}
    assert network.graph.shapes() == expected


@st.composite
def graphs(draw: st.DrawFn) -> LayerGraph:
    """Networks of convolutions, residual sums and pooling of random sizes."""
    channels, side = draw(st.integers(1, 3)), draw(st.integers(3, 9))
    shape = (channels, side, side)
    layers = [layer("normalize1", "normalize", features=channels)]
    for index in range(draw(st.integers(1, 4))):
        before, kernel, stride = layers[-1].name, draw(st.integers(1, 3)), draw(st.integers(1, 2))
        padding = draw(st.integers(0, 1))
        if side + 2 * padding < kernel:
            break
        sources, channels = channels, draw(st.integers(1, 3))
        side = (side + 2 * padding - kernel) // stride + 1
        sizes = {"in_channels": sources, "out_channels": channels}
        options = {**sizes, "kernel_size": kernel, "stride": stride, "padding": padding, "bias": draw(st.booleans())}
        layers.append(layer(f"conv{index}", "conv", **options))
        if draw(st.booleans()):
            layers.append(layer(f"shortcut{index}", "conv", before, **options))
            layers.append(layer(f"scale{index}", "scale", learned=draw(st.booleans())))
            layers.append(layer(f"add{index}", "add", f"conv{index}", f"scale{index}"))
        if draw(st.booleans()):
            layers.append(layer(f"norm{index}", "batch_norm", features=channels, eps=1e-5, momentum=0.1, spatial=True))
        pool = draw(st.sampled_from([size for size in range(1, side + 1) if side % size == 0]))
        side //= pool
        layers += [layer(f"neurons{index}", "relu"), layer(f"pool{index}", "avg_pool", kernel_size=pool)]
    features = layer("head", "linear", in_features=channels * side**2, out_features=2, bias=False)
    return LayerGraph(shape, (*layers, FLATTEN, features))


@given(graphs())
def test_shapes_and_logits_of_any_network_are_those_torch_gives(graph: LayerGraph) -> None:
    network = RateNetwork(graph).eval()
    with torch.no_grad():
        outputs = outputs_of(network)
        assert torch.equal(network(outputs[INPUT]), outputs["head"])
    assert graph.shapes() == {name: tuple(value.shape[1:]) for name, value in outputs.items() if name != INPUT}


def test_a_layer_reads_the_one_before_it_unless_it_says_otherwise() -> None:
    graph = LayerGraph((1, 4, 4), RESIDUAL)
    assert graph.sources["conv1"] == (INPUT,)
    assert graph.sources["neurons2"] == ("add1",)
    assert graph.sources["add1"] == ("neurons1", "conv2")
    assert graph.readers("neurons1") == (CONV2, ADD1)
    assert graph.by_name["add1"] is ADD1
    assert graph.shapes()["head"] == (3,)


def test_values_are_held_only_as_long_as_something_reads_them() -> None:
    class Value:
        """Weakly referable."""

    alive: dict[str, weakref.ref[Value]] = {}
    seen: dict[str, set[str]] = {}

    def apply(layer: Layer, read: Sequence[Value]) -> Value:
        assert len(read) == len(graph.sources[layer.name])
        value = Value()
        alive[layer.name] = weakref.ref(value)
        seen[layer.name] = {name for name, held in alive.items() if held() is not None}
        return value

    graph = LayerGraph((1, 4, 4), RESIDUAL)
    last = graph.evaluate(Value(), apply)
    assert last is alive["head"]()
    assert seen["conv2"] == {"neurons1", "conv2"}
    assert seen["add1"] == {"neurons1", "conv2", "add1"}
    assert seen["flatten1"] == {"neurons2", "flatten1"}


def test_what_varies_after_the_last_spikes_shapes_none() -> None:
    graph = LayerGraph((1, 4, 4), RESIDUAL)
    assert graph.before_last_spikes() == {INPUT, "conv1", "neurons1", "conv2", "add1"}


def test_a_good_chain_is_taken() -> None:
    graph = LayerGraph((1, 4, 4), (CONV1, NORM1, RELU1, FLATTEN, HEAD))
    assert graph.shapes()["head"] == (3,)
    assert RateNetwork(graph)(torch.zeros(2, 1, 4, 4)).shape == (2, 3)


BETWEEN, AFTER, NORM_AFTER = (
    "neurons stand between weighted layers",
    "neurons follow a weighted layer or a sum",
    "batch norm follows a weighted layer or a sum",
)
LOGITS, NAME, SHAPE = "the network ends in logits", "name is unique and plain", "fits the shape before it"
OTHER_SIZE = layer("conv2", "conv", **{**CONV, "in_channels": 2, "stride": 2})


@pytest.mark.parametrize(
    ("chain", "rule", "culprit"),
    [
        ((CONV1, RELU1, RELU2, FLATTEN, HEAD), AFTER, "neurons2"),
        ((RELU1, FLATTEN, HEAD), AFTER, "neurons1"),
        ((CONV1, RELU1, NORM1, FLATTEN, HEAD), NORM_AFTER, "norm1"),
        ((CONV1, CONV2, RELU1, FLATTEN, HEAD), BETWEEN, "conv2"),
        ((CONV1, NORM1, CONV2, RELU1, FLATTEN, HEAD), BETWEEN, "conv2"),
        ((CONV1, RELU1, CONV2, ADD1, layer("conv3", "conv", **CONV)), BETWEEN, "conv3"),
        ((CONV1, RELU1, SCALE1, FLATTEN, HEAD), "flattening follows neurons", "flatten1"),
        ((CONV1, FLATTEN, HEAD), "flattening follows neurons", "flatten1"),
        ((POOL1, CONV1, RELU1), "pooling follows neurons", "pool1"),
        ((CONV1, POOL1, RELU1), "pooling follows neurons", "pool1"),
        ((CONV1, RELU1, CONV2, ADD1, POOL1, RELU2), "pooling follows neurons", "pool1"),
        ((CONV1, RELU1, layer("n", "normalize", features=2), FLATTEN, HEAD), "normalisation comes first", "n"),
        ((SCALE1, CONV1, RELU1, FLATTEN, HEAD), "factors scale spikes and currents", "scale1"),
        ((layer("add1", "add", INPUT, INPUT), RELU1, FLATTEN, HEAD), "sums are of spikes and currents", "add1"),
        ((CONV1, RELU1, layer("add1", "add"), RELU2, FLATTEN, HEAD), SHAPE, "add1"),
        ((CONV1, RELU1, OTHER_SIZE, ADD1, RELU2, FLATTEN, HEAD), SHAPE, "add1"),
        ((CONV1, RELU1, layer("conv2", "conv", "neurons1", "conv1", **CONV)), SHAPE, "conv2"),
        ((CONV1, RELU1, ADD1, CONV2, RELU2, FLATTEN, HEAD), "reads earlier layers", "add1"),
        ((CONV1, RELU1, layer("conv2", "conv", "elsewhere", **CONV), RELU2), "reads earlier layers", "conv2"),
        ((CONV1, RELU1, CONV2, layer("neurons2", "relu", "conv1"), FLATTEN, HEAD), "leads to the logits", "conv2"),
        ((CONV1, SPIKE1, CONV2, RELU2, FLATTEN, HEAD), "neurons are of one kind", "neurons2"),
        ((CONV1, RELU1, FLATTEN), LOGITS, "flatten1"),
        ((CONV1, RELU1, CONV2), LOGITS, "conv2"),
        ((CONV1, RELU1, FLATTEN, HEAD, RELU2), LOGITS, "neurons2"),
        ((), "has layers", "network"),
        ((layer("a.b", "conv", **CONV), RELU1, FLATTEN, HEAD), NAME, "a.b"),
        ((layer("head", "conv", **CONV), RELU1, FLATTEN, HEAD), NAME, "head"),
        ((layer(INPUT, "conv", **CONV), RELU1, FLATTEN, HEAD), NAME, INPUT),
        ((layer("readout", "conv", **CONV), RELU1, FLATTEN, HEAD), NAME, "readout"),
        ((layer("keys", "conv", **CONV), RELU1, FLATTEN, HEAD), NAME, "keys"),
    ],
)
def test_a_network_that_cannot_convert_is_refused(chain: tuple[Layer, ...], rule: str, culprit: str) -> None:
    assert (culprit, rule) in told(*chain)


def test_all_problems_are_told_at_once_and_nobody_is_blamed_for_another() -> None:
    rows = problems(CONV1, POOL1, RELU1, RELU2, NORM1, layer("conv2", "conv", **CONV), FLATTEN)
    assert [row.object for row in rows] == ["pool1", "neurons2", "norm1", "conv2", "flatten1"]
    assert all(row.remedy for row in rows)
    assert told(CONV1, FLATTEN, HEAD) == {("flatten1", "flattening follows neurons")}


def test_spiking_output_neurons_are_answered_with_the_average_of_their_current() -> None:
    (row,) = problems(CONV1, SPIKE1, FLATTEN, HEAD, layer("neurons2", "spike", beta=1.0, subtract=False))
    assert (row.object, row.rule) == ("neurons2", LOGITS)
    assert "average" in row.remedy


def test_layers_after_one_left_out_are_judged_by_what_is_known() -> None:
    after = Layer("conv2", "conv", CONV, inputs=("(gone)",))
    assert not misfits((1, 4, 4), (CONV1, after, RELU1, FLATTEN, HEAD), "(gone)")
    (row,) = misfits((1, 4, 4), (CONV1, after, layer("conv3", "conv", **CONV), RELU1), "(gone)")
    assert (row.object, row.rule) == ("conv3", BETWEEN)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("conv", {**CONV, "kernel_size": 0}),
        ("conv", {**CONV, "stride": 0}),
        ("conv", {**CONV, "padding": -1}),
        ("conv", {**CONV, "out_channels": 0}),
        ("conv", {**CONV, "out_channels": -2}),
        ("conv", {**CONV, "out_channels": 2**40}),
        ("conv", {**CONV, "kernel_size": 2.5}),
        ("conv", {**CONV, "kernel_size": 7}),
        ("conv", {**CONV, "in_channels": 3}),
        ("linear", {"in_features": 16, "out_features": 2, "bias": True}),
    ],
)
def test_sizes_that_fit_nothing_are_refused(kind: LayerKind, options: dict[str, Any]) -> None:
    (row,) = problems(Layer("layer", kind, options), RELU1, FLATTEN, HEAD)
    assert row.object == "layer"
    assert row.rule in ("options are possible", SHAPE)


@pytest.mark.parametrize("kernel_size", [0, 3, -2])
def test_pooling_that_fits_nothing_is_refused(kernel_size: int) -> None:
    (row,) = problems(CONV1, RELU1, layer("pool1", "avg_pool", kernel_size=kernel_size), FLATTEN, HEAD)
    assert row.object == "pool1"
    assert row.rule in ("options are possible", SHAPE)


@pytest.mark.parametrize(
    "wrong",
    [
        layer("conv1", "conv"),
        layer("conv1", "conv", **CONV, groups=2),
        layer("neurons1", "relu", slope=0.1),
        layer("neurons1", "spike", beta=1.0),
        layer("pool1", "avg_pool", kernel_size=2, stride=1),
        layer("scale1", "scale", value=0.5),
    ],
)
def test_options_are_those_of_the_kind(wrong: Layer) -> None:
    assert (wrong.name, "has the options of its kind") in told(wrong, FLATTEN, HEAD)


@pytest.mark.parametrize(
    "wrong",
    [
        layer("drop1", "dropout", p=1.5),
        layer("drop1", "dropout", p=float("nan")),
        layer("norm1", "batch_norm", features=1, eps=-1.0, momentum=0.1, spatial=True),
        layer("norm1", "batch_norm", features=1, eps=1e-5, momentum=2.0, spatial=True),
        layer("neurons1", "spike", beta=1.1, subtract=False),
        layer("neurons1", "spike", beta=-0.1, subtract=False),
    ],
)
def test_shares_that_cannot_be_are_refused(wrong: Layer) -> None:
    assert (wrong.name, "options are possible") in told(wrong, FLATTEN, HEAD)


def test_batch_norm_must_be_of_the_layers_dimension() -> None:
    wrong = layer("norm1", "batch_norm", features=2, eps=1e-5, momentum=0.1, spatial=False)
    assert told(CONV1, wrong, RELU1, FLATTEN, HEAD) == {("norm1", SHAPE)}
    flat = layer("norm2", "batch_norm", features=3, eps=1e-5, momentum=0.1, spatial=True)
    last = layer("last", "linear", in_features=3, out_features=2, bias=True)
    assert told(CONV1, RELU1, FLATTEN, HEAD, flat, RELU2, last) == {("norm2", SHAPE)}


@pytest.mark.parametrize("shape", [(), (4, 4), (0, 4, 4), (1, -4, 4), (1, 4, 4, 4)])
def test_an_image_shape_must_be_one(shape: tuple[int, ...]) -> None:
    (row,) = problems(CONV1, shape=shape)
    assert row.object == INPUT


def test_spiking_networks_gain_neurons_and_biases() -> None:
    graph = rate_network().graph
    assert not any(layer.options["bias"] for layer in graph.layers if layer.kind in ("conv", "linear"))
    spiking = graph.spiking(0.75, subtract=True)
    neurons = [layer.options for layer in spiking.layers if layer.kind == "spike"]
    assert neurons == [{"beta": 0.75, "subtract": True}] * 3
    assert all(layer.options["bias"] for layer in spiking.layers if layer.kind in ("conv", "linear"))
    assert [layer.name for layer in spiking.layers] == [layer.name for layer in graph.layers]


def test_biases_in_residual_networks_come_after_the_last_sum() -> None:
    spiking = LayerGraph((1, 4, 4), RESIDUAL).spiking()
    biases = {layer.name: layer.options["bias"] for layer in spiking.layers if "bias" in layer.options}
    assert biases == {"conv1": False, "conv2": False, "head": True}


@pytest.mark.parametrize("channels", [(3, 6), (1, 7), (4, 8), (16, 32)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_convolutions_of_single_pixels_equal_torchs(channels: tuple[int, int], stride: int) -> None:
    """Often enough to find memory that is written past its end."""
    sizes = {"in_channels": channels[0], "out_channels": channels[1]}
    options = {**CONV, **sizes, "kernel_size": 1, "stride": stride, "padding": 0, "bias": True}
    ours = build_module(layer("conv1", "conv", **options)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    theirs = nn.Conv2d(*channels, 1, stride).double()
    theirs.load_state_dict(ours.state_dict())
    for _ in range(20):
        x = torch.randn(18, channels[0], 8, 7).to(memory_format=torch.channels_last).requires_grad_()
        y = x.detach().double().requires_grad_()
        answer, expected = ours(x), theirs(y)
        torch.testing.assert_close(answer.double(), expected, rtol=1e-5, atol=1e-5)
        slope = torch.randn_like(answer)
        found = torch.autograd.grad(answer, [x, *ours.parameters()], slope)
        wanted = torch.autograd.grad(expected, [y, *theirs.parameters()], slope.double())
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
