from __future__ import annotations

from typing import Any

import pytest
import torch

from hardware.errors import RuleViolations, Violation
from pipeline.models.graph import INPUT, Layer, LayerGraph, LayerKind
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


def layer(name: str, kind: LayerKind, **options: Any) -> Layer:
    return Layer(name, kind, options)


CONV1 = layer("conv1", "conv", **CONV)
RELU1, RELU2 = layer("neurons1", "relu"), layer("neurons2", "relu")
NORM1 = layer("norm1", "batch_norm", features=2, eps=1e-5, momentum=0.1, spatial=True)
POOL1, POOL2 = layer("pool1", "avg_pool", kernel_size=2), layer("pool2", "avg_pool", kernel_size=2)
FLATTEN = layer("flatten1", "flatten")
HEAD = layer("head", "linear", in_features=32, out_features=3, bias=True)


def problems(*layers: Layer, shape: tuple[int, ...] = (1, 4, 4)) -> tuple[Violation, ...]:
    with pytest.raises(RuleViolations) as caught:
        LayerGraph(shape, layers)
    return caught.value.violations


def test_shapes_are_those_torch_gives() -> None:
    for name, (_, shape) in NETWORKS.items():
        network = rate_network(name)
        expected, activity = {}, torch.zeros(2, *shape)
        for layer_name, module in network.layers.items():
            activity = module(activity)
            expected[layer_name] = tuple(activity.shape[1:])
        assert network.graph.shapes() == expected


def test_a_good_chain_is_taken() -> None:
    graph = LayerGraph((1, 4, 4), (CONV1, NORM1, RELU1, FLATTEN, HEAD))
    assert graph.shapes()["head"] == (3,)
    assert RateNetwork(graph)(torch.zeros(2, 1, 4, 4)).shape == (2, 3)


@pytest.mark.parametrize(
    ("chain", "rule", "culprit"),
    [
        ((CONV1, RELU1, RELU2, FLATTEN, HEAD), "neurons follow a weighted layer", "neurons2"),
        ((CONV1, RELU1, NORM1, FLATTEN, HEAD), "batch norm follows a weighted layer", "norm1"),
        ((CONV1, FLATTEN, HEAD), "neurons stand between weighted layers", "head"),
        ((CONV1, NORM1, FLATTEN, HEAD), "neurons stand between weighted layers", "head"),
        ((POOL1, layer("conv1", "conv", **CONV), RELU1), "pooling follows neurons", "pool1"),
        ((CONV1, RELU1, layer("n", "normalize", features=2), FLATTEN, HEAD), "normalisation comes first", "n"),
        ((CONV1, RELU1, FLATTEN), "the network ends in logits", "flatten1"),
        ((CONV1, RELU1, FLATTEN, HEAD, RELU2), "the network ends in logits", "neurons2"),
        ((), "the network ends in logits", "network"),
        ((layer("a.b", "conv", **CONV), RELU1, FLATTEN, HEAD), "name is unique and plain", "a.b"),
        ((layer("head", "conv", **CONV), RELU1, FLATTEN, HEAD), "name is unique and plain", "head"),
        ((layer(INPUT, "conv", **CONV), RELU1, FLATTEN, HEAD), "name is unique and plain", INPUT),
        ((layer("readout", "conv", **CONV), RELU1, FLATTEN, HEAD), "name is unique and plain", "readout"),
        ((layer("keys", "conv", **CONV), RELU1, FLATTEN, HEAD), "name is unique and plain", "keys"),
    ],
)
def test_a_chain_that_cannot_convert_is_refused(chain: tuple[Layer, ...], rule: str, culprit: str) -> None:
    assert (culprit, rule) in {(row.object, row.rule) for row in problems(*chain)}


def test_all_problems_are_told_at_once() -> None:
    rows = problems(CONV1, RELU1, NORM1, RELU1, RELU2, FLATTEN)
    assert len(rows) >= 4


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
        ("avg_pool", {"kernel_size": 0}),
        ("avg_pool", {"kernel_size": 3}),
        ("avg_pool", {"kernel_size": -2}),
        ("linear", {"in_features": 16, "out_features": 2, "bias": True}),
        ("batch_norm", {"features": 1, "eps": 1e-5, "momentum": 0.1, "spatial": False}),
    ],
)
def test_sizes_that_fit_nothing_are_refused(kind: LayerKind, options: dict[str, Any]) -> None:
    (row,) = problems(Layer("layer", kind, options), RELU1, FLATTEN, HEAD)
    assert row.object == "layer"
    assert row.rule in ("options are possible", "fits the shape before it")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("conv", {}),
        ("conv", {**CONV, "groups": 2}),
        ("relu", {"slope": 0.1}),
        ("avg_pool", {"kernel_size": 2, "stride": 1}),
    ],
)
def test_options_are_those_of_the_kind(kind: LayerKind, options: dict[str, Any]) -> None:
    (row,) = problems(Layer("layer", kind, options), RELU1, FLATTEN, HEAD)
    assert (row.object, row.rule) == ("layer", "has the options of its kind")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dropout", {"p": 1.5}),
        ("dropout", {"p": float("nan")}),
        ("batch_norm", {"features": 1, "eps": -1.0, "momentum": 0.1, "spatial": True}),
        ("batch_norm", {"features": 1, "eps": 1e-5, "momentum": 2.0, "spatial": True}),
    ],
)
def test_shares_that_cannot_be_are_refused(kind: LayerKind, options: dict[str, Any]) -> None:
    (row,) = problems(Layer("layer", kind, options), RELU1, FLATTEN, HEAD)
    assert row.rule == "options are possible"


def test_batch_norm_must_be_of_the_layers_dimension() -> None:
    wrong = layer("norm1", "batch_norm", features=2, eps=1e-5, momentum=0.1, spatial=False)
    assert "norm1" in {row.object for row in problems(CONV1, wrong, RELU1, FLATTEN, HEAD)}
    flat = layer("norm2", "batch_norm", features=3, eps=1e-5, momentum=0.1, spatial=True)
    last = layer("last", "linear", in_features=3, out_features=2, bias=True)
    rows = problems(CONV1, RELU1, FLATTEN, HEAD, flat, RELU2, last)
    assert "norm2" in {row.object for row in rows}


@pytest.mark.parametrize("shape", [(), (4, 4), (0, 4, 4), (1, -4, 4), (1, 4, 4, 4)])
def test_an_image_shape_must_be_one(shape: tuple[int, ...]) -> None:
    assert problems(CONV1, RELU1, FLATTEN, HEAD, shape=shape)


def test_replacing_and_leaving_out_kinds() -> None:
    graph = rate_network().graph
    spiking = graph.with_kind("relu", "spike")
    assert [layer.kind for layer in spiking.layers].count("spike") == 3
    assert all(layer.options["bias"] for layer in graph.with_biases().layers if layer.kind in ("conv", "linear"))
    assert not any(layer.options["bias"] for layer in graph.layers if layer.kind in ("conv", "linear"))
    assert "batch_norm" not in {layer.kind for layer in graph.without_kind("batch_norm").layers}
