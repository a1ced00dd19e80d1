"""The float SNN as ONNX: spikes and logits as in torch but for what rounding decides, and mistakes are told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from hardware.errors import SpikeguardError
from hardware.files import write_arrays
from hardware.formats.float_golden import (
    FloatActivity,
    FloatComparison,
    FloatGolden,
    compare_float,
    pack_float_golden,
    read_float_golden,
)
from hardware.runtimes.onnxruntime import load_model, run_float
from pipeline.models.float_onnx import float_golden, float_onnx
from pipeline.models.graph import Layer, LayerGraph
from pipeline.models.spiking import SpikingNetwork, rebuild
from pipeline.models.tracing import trace_network
from pipeline.neurons import Leaky
from tests.pipeline.samples import NETWORKS, random_images, spiking_network


def run(content: bytes, codes: np.ndarray, folder: Path) -> FloatActivity:
    (folder / "model.float.onnx").write_bytes(content)
    return run_float(load_model(folder / "model.float.onnx", "float"), codes)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network_spikes_as_in_torch(name: str, tmp_path: Path) -> None:
    network, codes = spiking_network(name), random_images(NETWORKS[name][1], 24)
    golden = float_golden(network, codes)
    rates = [bits.mean() for bits in golden.activity.spikes.values()]
    assert 0 < max(rates) < 1
    found = compare_float(golden, run(float_onnx(network), codes, tmp_path))
    assert (found.unexplained_spikes, found.unexplained_logits) == (0, 0)
    assert found.flips <= 2
    assert [*golden.activity.spikes] == [name for name, _ in network.neurons()]
    assert sum(bits.mean() for bits in golden.undecided.values()) < 0.02 * len(rates)


@pytest.mark.parametrize("beta", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("reset", ["zero", "subtract"])
def test_leaks_and_resets_are_those_of_the_network(beta: float, reset: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    neurons = Leaky(0.4, beta=beta, reset_mechanism=reset, init_hidden=True)  # type: ignore[arg-type]
    module = nn.Sequential(nn.Conv2d(1, 3, 3), neurons, nn.Flatten(), nn.Linear(48, 5))
    network = rebuild(trace_network(module, (1, 6, 6)), 7)
    assert isinstance(network, SpikingNetwork)
    codes = random_images((1, 6, 6), 20)
    golden = float_golden(network.eval(), codes)
    (spikes,) = golden.activity.spikes.values()
    assert 0 < spikes.mean() < 1
    found = compare_float(golden, run(float_onnx(network), codes, tmp_path))
    assert (found.unexplained_spikes, found.unexplained_logits) == (0, 0)


@pytest.mark.parametrize("timed", [False, True])
def test_currents_that_decay_a_leaky_readout_and_inputs_over_time(timed: bool, tmp_path: Path) -> None:
    options = {"in_features": 6, "out_features": 5, "bias": True}
    layers = (
        Layer("first", "linear", options),
        Layer("synapses", "synaptic_current", {"alpha": 0.5}),
        Layer("neurons", "spike", {"beta": 0.75, "subtract": False}),
        Layer("last", "linear", {**options, "in_features": 5, "out_features": 3}),
        Layer("answer", "leaky_readout", {"beta": 0.875}),
    )
    torch.manual_seed(2)
    network = SpikingNetwork(LayerGraph((6,), layers, max_code=3), 6).eval()
    with torch.no_grad():
        next(network.neurons())[1].threshold.fill_(0.4)
    shape = (6, 6) if timed else (6,)
    codes = np.random.default_rng(0).integers(0, 4, (20, *shape)).astype(np.uint8)
    golden = float_golden(network, codes)
    assert 0 < golden.activity.spikes["neurons"].mean() < 1
    found = compare_float(golden, run(float_onnx(network, timed=timed), codes, tmp_path))
    assert (found.unexplained_spikes, found.unexplained_logits) == (0, 0)
    assert found.flips <= 2


def test_the_graph_is_legal_and_described() -> None:
    network = spiking_network("residual")
    content = float_onnx(network)
    model = onnx.load_model_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert content == float_onnx(network)
    assert [entry.version for entry in model.opset_import] == [17]
    names = [node.name for node in model.graph.node]
    assert len(names) == len(set(names))
    properties = {entry.key: entry.value for entry in model.metadata_props}
    card = json.loads(properties["spikeguard.semantics"])
    assert card["steps"] == network.steps == int(properties["spikeguard.steps"])
    assert set(card["memory"]) == set(card["thresholds"]) == {name for name, _ in network.neurons()}


@pytest.mark.parametrize("wrong", ["threshold", "weight", "last weight"])
def test_a_wrong_parameter_is_not_taken_for_rounding(wrong: str, tmp_path: Path) -> None:
    network, codes = spiking_network(), random_images((1, 8, 8), 16)
    golden = float_golden(network, codes)
    with torch.no_grad():
        if wrong == "threshold":
            next(network.neurons())[1].threshold.mul_(1.05)
        else:
            weights = [value for key, value in network.state_dict().items() if key.endswith("weight")]
            weights[-1 if wrong == "last weight" else 0][0].add_(0.3)
    found = compare_float(golden, run(float_onnx(network), codes, tmp_path))
    assert found.unexplained_logits if wrong == "last weight" else found.unexplained_spikes


def golden_of(spikes: np.ndarray, undecided: np.ndarray) -> FloatGolden:
    logits = np.array([[1.0, 0.0]] * len(spikes), np.float32)
    return FloatGolden(FloatActivity(logits, {"a": spikes, "b": spikes}), {"a": undecided, "b": undecided})


def test_a_flip_is_explained_by_its_membrane_or_by_a_flip_before_it() -> None:
    quiet = np.zeros((2, 3, 4), bool)
    undecided = quiet.copy()
    undecided[0, 1, 2] = True
    golden = golden_of(quiet, undecided)

    def flipped(*where: tuple[str, int, int, int]) -> FloatComparison:
        spikes = {name: quiet.copy() for name in ("a", "b")}
        for layer, *at in where:
            spikes[layer][tuple(at)] = True
        return compare_float(golden, FloatActivity(golden.activity.logits, spikes))

    assert flipped() == FloatComparison(2, 0, 0, 0, 0)
    assert flipped(("a", 0, 1, 2)) == FloatComparison(2, 1, 0, 0, 0)
    assert flipped(("a", 0, 1, 2), ("b", 0, 1, 0), ("a", 0, 2, 3)) == FloatComparison(2, 3, 0, 0, 0)
    assert flipped(("a", 0, 1, 2), ("a", 0, 1, 3)).unexplained_spikes == 1  # of the same layer and step
    assert flipped(("b", 0, 1, 2), ("a", 0, 1, 3)).unexplained_spikes == 1  # a comes first
    assert flipped(("a", 0, 1, 2), ("a", 1, 2, 0)).unexplained_spikes == 1  # another image


def test_logits_are_judged_where_no_spike_flipped_and_classes_everywhere() -> None:
    quiet = np.zeros((2, 3, 4), bool)
    golden = golden_of(quiet, ~quiet)
    spikes = quiet.copy()
    spikes[1, 0, 0] = True
    logits = np.array([[1 + 2.0**-14, 0.0], [0.0, 1.0]], np.float32)
    activity = FloatActivity(logits, {"a": spikes, "b": quiet})
    assert compare_float(golden, activity) == FloatComparison(2, 1, 0, 0, 1)
    assert compare_float(golden, replace(activity, logits=logits + np.float32(0.01))).unexplained_logits == 2
    assert compare_float(golden, replace(activity, logits=logits * np.float32(np.nan))).unexplained_logits == 2


def test_golden_activity_is_stored_and_read_as_it_is_or_refused(tmp_path: Path) -> None:
    golden = float_golden(spiking_network(), random_images((1, 8, 8), 5))
    arrays = pack_float_golden(golden)
    write_arrays(tmp_path / "golden.float.npz", arrays)
    read = read_float_golden(tmp_path / "golden.float.npz")
    assert np.array_equal(read.activity.logits, golden.activity.logits)
    for name, bits in golden.activity.spikes.items():
        assert np.array_equal(read.activity.spikes[name], bits)
        assert np.array_equal(read.undecided[name], golden.undecided[name])
    assert [*read.activity.spikes] == [*golden.activity.spikes]
    name = next(iter(golden.undecided))
    for key, value in (
        ("logits", arrays["logits"].astype(np.float64)),
        ("logits", arrays["logits"] * np.float32(np.nan)),
        (f"neurons.{name}", np.int64(1)),
        (f"spikes.{name}", arrays[f"spikes.{name}"][1:]),
        (f"undecided.{name}", arrays[f"undecided.{name}"][:, 1:]),
        ("more", np.zeros(1)),
    ):
        write_arrays(tmp_path / "golden.float.npz", {**arrays, key: np.asarray(value)})
        with pytest.raises(SpikeguardError, match="not well formed"):
            read_float_golden(tmp_path / "golden.float.npz")


def test_another_network_has_other_layers() -> None:
    golden = float_golden(spiking_network(), random_images((1, 8, 8), 5))
    other = FloatActivity(golden.activity.logits, {"other": np.zeros((5, 5, 3), bool)})
    with pytest.raises(SpikeguardError, match="other layers"):
        compare_float(golden, other)
