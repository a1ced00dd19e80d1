"""Every node that is taken in means what torch means by it, whatever becomes of its geometry; the rest is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hardware.errors import RuleViolations
from hardware.formats.nir_graph import NirFile, read_nir_graph
from pipeline.importing.conventions import Conventions
from pipeline.importing.networks import network_of
from pipeline.models.spiking import SpikingNetwork

STEPS = 5
CONVENTIONS = Conventions(STEPS, 1.0, "zero", "reached", "euler", "per-step", "decay", "spikes")
Nodes = dict[str, Any]
Edges = list[tuple[str, str]]


def input_of(*shape: int) -> Any:
    return nir.Input({"input": np.array(shape)})


def output() -> Any:
    return nir.Output({"output": np.array([3])})


def integrate(threshold: Any = 1.0, gain: Any = 1.0) -> Any:
    thresholds = np.atleast_1d(np.asarray(threshold, np.float32))
    return nir.IF(np.full_like(thresholds, gain), thresholds)


def conv(rng: np.random.Generator, out: int, into: int, kernel: Any = 3, **options: Any) -> Any:
    sides = np.broadcast_to(kernel, 2)
    weight = rng.normal(size=(out, into, *sides)).astype(np.float32)
    settings = {"stride": 1, "padding": (0, 0), "dilation": 1, "groups": 1, **options}
    return nir.Conv2d(None, weight, bias=rng.normal(size=out).astype(np.float32) / 4, **settings)


def affine(rng: np.random.Generator, out: int, into: int) -> Any:
    weight = rng.normal(size=(out, into)).astype(np.float32)
    return nir.Affine(weight, rng.normal(size=out).astype(np.float32) / 4)


def pool(kind: Any, side: int = 2, **options: Any) -> Any:
    return kind(**{"kernel_size": np.full(2, side), "stride": np.full(2, side), "padding": np.zeros(2, int), **options})


def flatten() -> Any:
    return nir.Flatten({"input": np.array([1])}, 0, -1)


def read(path: Path, nodes: Nodes, edges: Edges | None = None) -> NirFile:
    edges = list(pairwise(nodes)) if edges is None else edges
    for node in nodes.values():  # which some exporters know, and no reader here needs
        if isinstance(node, nir.Conv1d | nir.Conv2d):
            node.input_shape = 1 if isinstance(node, nir.Conv1d) else np.array([1, 1])
    nir.write(str(path / "m.nir"), nir.NIRGraph(nodes, edges, type_check=False))
    return read_nir_graph(path / "m.nir")


def plain(file: NirFile, inputs: Tensor) -> dict[str, Tensor]:
    """Every node's output ``(samples, steps, …)``, by torch's own operations in float64, a step at a time."""
    membranes: dict[str, Tensor] = {}
    history: dict[str, list[Tensor]] = {}
    for step in range(STEPS):
        values: dict[str, Tensor] = {}
        for node in file.nodes:
            entering = [values[name] for name in node.sources]
            x = sum(entering[1:], start=entering[0]) if entering else inputs[:, step].double()
            numbers = {k: torch.from_numpy(v) for k, v in node.numbers.items() if not isinstance(v, str)}
            if node.kind == "Conv2d":
                padding = node.numbers["padding"]
                padding = padding if isinstance(padding, str) else padding.tolist()
                stride, dilation = numbers["stride"].tolist(), numbers["dilation"].tolist()
                groups = int(numbers["groups"])
                x = F.conv2d(x, numbers["weight"], numbers["bias"], stride, padding, dilation, groups)
            elif node.kind == "Conv1d":
                stride, padding = int(numbers["stride"][0]), int(numbers["padding"][0])
                x = F.conv1d(x, numbers["weight"], numbers["bias"], stride, padding)
            elif node.kind in ("Affine", "Linear"):
                x = F.linear(x, numbers["weight"], numbers.get("bias"))
            elif node.kind in ("SumPool2d", "AvgPool2d"):
                side = int(numbers["kernel_size"][0])
                x = F.avg_pool2d(x, side) * (side**2 if node.kind == "SumPool2d" else 1)
            elif node.kind == "Flatten":
                x = x.flatten(1)
            elif node.kind == "Scale":
                x = x * numbers["scale"]
            elif node.kind == "IF":
                shape = x.shape[1:] if numbers["r"].numel() > 1 else ()
                v = membranes.get(node.name, torch.zeros_like(x)) + numbers["r"].reshape(shape) * x
                x = (v >= numbers["v_threshold"].reshape(shape)).double()
                membranes[node.name] = v * (1 - x)
            values[node.name] = x
            history.setdefault(node.name, []).append(x)
    return {name: torch.stack(steps, 1) for name, steps in history.items()}


def require_alike(file: NirFile, least: float = 0.02) -> SpikingNetwork:
    """The imported network against :func:`plain`, in float64, spike for spike."""
    network = network_of(file, CONVENTIONS).double()
    inputs = (torch.rand(3, STEPS, *file.input_shape, generator=torch.Generator().manual_seed(0)) < 0.4).double()
    logits, recorded = network.record(inputs.reshape(3, STEPS, *network.graph.input_shape))
    expected = plain(file, inputs)
    neurons = [node.name for node in file.nodes if node.kind == "IF"]
    assert len(recorded) == len(neurons)
    for name, found in zip(neurons, recorded.values(), strict=True):
        spikes = expected[name].flatten(2)
        assert least < float(spikes.mean()) < 1 - least
        assert torch.equal(found.spikes, spikes.bool())
    torch.testing.assert_close(logits, expected[file.nodes[-1].name].mean(1).flatten(1))
    return network


CONVOLUTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "padded and strided": ({"kernel": 3, "stride": 2, "padding": (1, 1)}, "conv"),
    "dilated": ({"kernel": 2, "dilation": 2, "padding": (1, 1)}, "conv"),
    "grouped": ({"kernel": 3, "groups": 2}, "conv"),
    "flat kernel, made square": ({"kernel": (1, 3), "padding": (0, 1)}, "conv"),
    "same": ({"kernel": 3, "padding": "same"}, "conv"),
    "same, even kernel": ({"kernel": 2, "padding": "same"}, "conv"),
    "valid": ({"kernel": 3, "padding": "valid"}, "conv"),
    "unequal kernel": ({"kernel": (2, 3)}, "linear"),
    "unequal stride": ({"kernel": 3, "stride": (1, 2)}, "linear"),
    "unequal padding": ({"kernel": 3, "padding": (2, 0)}, "linear"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_any_geometry(name: str, tmp_path: Path) -> None:
    options, kind = CONVOLUTIONS[name]
    rng = np.random.default_rng(0)
    channels = 2 // options.get("groups", 1)
    first = conv(rng, 4, channels, **options)
    nodes: Nodes = {"input": input_of(2, 7, 6), "c": first, "n": integrate(2.0), "f": flatten()}
    flat = plain(read(tmp_path, nodes | {"output": output()}), torch.ones(1, STEPS, 2, 7, 6))["f"]
    size = flat.shape[2]
    nodes |= {"a": affine(rng, 5, size), "m": integrate(3.0), "output": output()}
    network = require_alike(read(tmp_path, nodes))
    assert network.graph.layers[0].kind == ("conv" if kind == "conv" else "flatten")


@pytest.mark.parametrize("kind", [nir.SumPool2d, nir.AvgPool2d])
def test_pooling_after_neurons_before_them_and_twice(kind: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    nodes = {
        "input": input_of(1, 12, 12), "c1": conv(rng, 3, 1, padding=(1, 1)), "p0": pool(kind), "n1": integrate(1.0),
        "p1": pool(kind), "c2": conv(rng, 4, 3, padding=(1, 1)), "n2": integrate(1.0),
        "p2": pool(kind, 3), "f": flatten(), "a": affine(rng, 5, 4), "n3": integrate(0.5), "output": output(),
    }  # fmt: skip
    require_alike(read(tmp_path, nodes), least=0.0)


def test_pooling_that_leaves_a_rest_goes_before_neurons_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    before = {"input": input_of(1, 7, 7), "c": conv(rng, 3, 1), "p": pool(nir.AvgPool2d), "n": integrate(0.5)}
    require_alike(read(tmp_path, before | {"output": output()}))
    after = {"input": input_of(1, 7, 7), "c": conv(rng, 3, 1), "n": integrate(0.5), "p": pool(nir.AvgPool2d)}
    found = refused(read(tmp_path, after | {"f": flatten(), "output": output()}))
    assert found == {("p (AvgPool2d)", "windows cover the input")}


def test_scales_and_thresholds_per_channel_on_currents_and_spikes(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    per_channel = np.broadcast_to(np.array([1.5, 0.5, 2.0], np.float32)[:, None, None], (3, 6, 6))
    nodes = {
        "input": input_of(1, 6, 6), "s0": nir.Scale(np.array([2.0], np.float32)),
        "c1": conv(rng, 3, 1, padding=(1, 1)), "s1": nir.Scale(per_channel.copy()),
        "n1": integrate(2 * per_channel, 0.9), "s2": nir.Scale(per_channel.copy()), "c2": conv(rng, 4, 3),
        "n2": integrate(3.0), "f": flatten(), "a": affine(rng, 6, 64),
        "s3": nir.Scale(rng.random(6).astype(np.float32)),
        "n3": integrate(rng.random(6) + 0.5, 0.8), "output": output(),
    }  # fmt: skip
    require_alike(read(tmp_path, nodes))


def test_what_enters_a_node_adds_up_over_branches_of_any_length(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    nodes = {
        "input": input_of(2, 6, 6), "c1": conv(rng, 3, 2, padding=(1, 1)), "n1": integrate(2.0),
        "c2": conv(rng, 3, 3, padding=(1, 1)), "n2": integrate(2.0), "c3": conv(rng, 3, 2, 1), "n3": integrate(1.0),
        "p": pool(nir.AvgPool2d), "f": flatten(), "a": affine(rng, 4, 27), "output": output(),
    }  # fmt: skip
    edges = [
        ("input", "c1"), ("c1", "n1"), ("n1", "c2"), ("c2", "n2"), ("n1", "n2"), ("input", "c3"),
        ("n2", "n3"), ("c3", "n3"), ("n1", "n3"), ("n3", "p"), ("n2", "p"), ("p", "f"), ("f", "a"), ("a", "output"),
    ]  # fmt: skip
    # A sum of spikes that is pooled is a current; it needs neurons before the next weights.
    assert refused(read(tmp_path, nodes, edges)) == {("a (Affine)", "neurons stand between weighted nodes")}
    edges.remove(("n2", "p"))
    require_alike(read(tmp_path, nodes, edges))


@pytest.mark.parametrize("stride", [1, 2])
def test_one_dimensional_convolutions(stride: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)

    def conv1d(out: int, into: int) -> Any:
        weight = rng.normal(size=(out, into, 3)).astype(np.float32)
        return nir.Conv1d(None, weight, stride, 1, 1, 1, rng.normal(size=out).astype(np.float32) / 4)

    length = {1: 12, 2: 3}[stride]
    nodes = {
        "input": input_of(2, 12), "c1": conv1d(3, 2), "n1": integrate(1.5), "c2": conv1d(4, 3), "n2": integrate(1.5),
        "f": flatten(), "a": nir.Linear(rng.normal(size=(5, 4 * length)).astype(np.float32)), "output": output(),
    }  # fmt: skip
    require_alike(read(tmp_path, nodes))


def test_names_of_any_kind_become_plain_and_stay_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    nodes = {
        "input": input_of(4), "a.1": affine(rng, 5, 4), "läyer-1": integrate(0.5), "b": affine(rng, 5, 5),
        "l_yer_1": integrate(0.5), "c": affine(rng, 5, 5), "readout": integrate(0.5), "keys": affine(rng, 3, 5),
        "output": output(),
    }  # fmt: skip
    network = require_alike(read(tmp_path, nodes))
    assert [name for name, _ in network.neurons()] == ["l_yer_1", "l_yer_1_", "readout_"]


def test_small_thresholds_are_enlarged_with_their_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    small = affine(rng, 5, 4)
    small.weight, small.bias = small.weight / 1024, small.bias / 1024
    nodes = {"input": input_of(4), "a": small, "n": integrate(1 / 1024), "b": affine(rng, 3, 5), "output": output()}
    ((_, neuron),) = require_alike(read(tmp_path, nodes)).neurons()
    assert float(neuron.threshold) == 2**6 / 1024


def refused(file: NirFile, conventions: Conventions = CONVENTIONS) -> set[tuple[str, str]]:
    with pytest.raises(RuleViolations) as caught:
        network_of(file, conventions)
    assert all(row.remedy and row.limit for row in caught.value.violations)
    return {(row.object, row.rule) for row in caught.value.violations}


def lif(**changed: Any) -> Any:
    values: dict[str, Any] = {"tau": 2.0, "r": 1.0, "v_leak": 0.0, "v_threshold": 1.0, "v_reset": 0.0, **changed}
    size = max(np.size(value) for value in values.values())
    return nir.LIF(**{key: np.broadcast_to(value, size).astype(np.float32) for key, value in values.items()})


WRONG_NEURONS: dict[str, tuple[Any, str]] = {
    "several taus": (lif(tau=np.array([2, 2, 2, 2, 3])), "tau is one per population"),
    "a tau below dt": (lif(tau=0.5), "tau is a step or more"),
    "a negative tau": (lif(tau=-1.0), "tau is a step or more"),
    "another rest": (lif(v_leak=0.1), "membranes rest where they are reset"),
    "another reset": (lif(v_reset=-1.0), "membranes rest where they are reset"),
    "no threshold": (lif(v_threshold=0.0), "threshold is above the potential at rest"),
    "too many values": (lif(v_threshold=np.ones(7)), "tau fits what enters"),
}


@pytest.mark.parametrize("name", WRONG_NEURONS)
def test_neurons_that_no_population_can_hold_are_refused(name: str, tmp_path: Path) -> None:
    neurons, rule = WRONG_NEURONS[name]
    rng = np.random.default_rng(0)
    nodes = {"input": input_of(4), "a": affine(rng, 5, 4), "n": neurons, "b": affine(rng, 3, 5), "output": output()}
    assert refused(read(tmp_path, nodes)) == {("n (LIF)", rule)}


def test_nodes_that_do_not_fit_are_named_at_once_and_none_blamed_for_another(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    nodes = {
        "input": input_of(2, 6, 6), "wide": conv(rng, 3, 5), "n1": integrate(), "f": flatten(), "a": affine(rng, 5, 3),
        "far": conv(rng, 3, 2, 9), "strided": conv(rng, 3, 2, 3, stride=2, padding="valid"),
        "p": pool(nir.SumPool2d, stride=np.array([1, 1])), "q": pool(nir.AvgPool2d, padding=np.array([1, 1])),
        "output": output(),
    }  # fmt: skip
    nodes["strided"].padding = "same"
    edges = [
        ("input", "wide"), ("wide", "n1"), ("n1", "f"), ("f", "a"), ("a", "output"),
        *(pair for name in ("far", "strided", "p", "q") for pair in (("input", name), (name, "output"))),
    ]  # fmt: skip
    assert refused(read(tmp_path, nodes, edges)) == {
        ("wide (Conv2d)", "shape fits the node before it"),
        ("far (Conv2d)", "kernel fits the padded input"),
        ("strided (Conv2d)", "padding 'same' goes with stride 1"),
        ("p (SumPool2d)", "windows are square and lie side by side"),
        ("q (AvgPool2d)", "pooling does not pad"),
    }


def test_a_leaky_integrator_is_the_readout_and_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ones = np.ones(5, np.float32)
    nodes = {
        "input": input_of(4), "a": affine(rng, 5, 4), "li": nir.LI(2 * ones, ones, 0 * ones),
        "b": affine(rng, 3, 5), "output": output(),
    }  # fmt: skip
    assert refused(read(tmp_path, nodes)) == {("b (Affine)", "a leaky integrator is the readout")}


def test_a_matrix_too_large_to_write_out_is_refused_before_it_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    nodes = {"input": input_of(2, 512, 512), "c": conv(rng, 8, 2, (2, 3)), "n": integrate(), "output": output()}
    assert refused(read(tmp_path, nodes)) == {("c (Conv2d)", "matrix that is written out is small")}
