"""ONNX writer: both graphs are exact, legal, and refuse what float32 cannot do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporters.onnx import write_onnx, write_step_onnx
from hardware.emulator import count_saturations
from hardware.errors import RuleViolations
from hardware.network import InputSpec, IntegerNetwork, Population, Synapse
from hardware.reference import run_reference
from hardware.runtimes.onnxruntime import OnnxRuntime, load_model
from hardware.trace import Trace, compare_traces
from tests.networks import networks, random_codes, random_network


def _run(network: IntegerNetwork, codes: np.ndarray, folder: Path) -> tuple[Trace, Trace]:
    write_onnx(network, folder / "model.onnx")
    write_step_onnx(network, folder / "model.step.onnx")
    runtime = OnnxRuntime(folder / "model.onnx", folder / "model.step.onnx")
    return runtime.run(codes, "readouts"), runtime.run(codes, "traces")


@given(network=networks(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_graphs_equal_the_reference(network: IntegerNetwork, seed: int, tmp_path: Path) -> None:
    codes = random_codes(np.random.default_rng(seed), network)
    expected = run_reference(network, codes)
    readouts, traces = _run(network, codes, tmp_path)
    assert np.array_equal(readouts.readouts, expected.readouts)
    assert compare_traces(expected, traces).equal
    assert set(traces.populations) == set(expected.populations)


@pytest.mark.parametrize("bias", [0, 1, -1, 131_000, -131_000])
@pytest.mark.parametrize("reset", ["zero", "subtract"])
def test_saturation_is_exact_on_and_off_the_weight_grid(bias: int, reset: str, tmp_path: Path) -> None:
    weight = np.array([[513, -514], [-514, 513], [514, 0], [0, -514]], np.int32)
    hidden = Population("hidden", (4,), 130_000, np.full(4, bias, np.int64), 1.0, reset=reset)  # type: ignore[arg-type]
    readout = Population("readout", (1,), 0, np.zeros(1, np.int64), 1.0, spiking=False)
    output = Synapse("hidden", "readout", "dense", np.ones((1, 4), np.int32), 8)
    network = IntegerNetwork(
        InputSpec((2,)), (hidden, readout), (Synapse("input", "hidden", "dense", weight, 16), output), 12
    )
    codes = np.array([[255, 255], [255, 0], [0, 255], [1, 254], [0, 0]], np.uint8)
    expected = run_reference(network, codes)
    assert count_saturations(network, codes)["hidden"]
    readouts, traces = _run(network, codes, tmp_path)
    assert np.array_equal(readouts.readouts, expected.readouts)
    assert compare_traces(expected, traces).equal


def test_an_image_shaped_readout_is_exact(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kernel = rng.integers(-8, 8, (2, 1, 3, 3)).astype(np.int32)
    hidden = Population("hidden", (2, 4, 4), 300, np.zeros((2, 4, 4), np.int64), 1.0)
    readout = Population("out", (1, 2, 2), 0, rng.integers(-9, 9, (1, 2, 2)), 2.0, spiking=False)
    network = IntegerNetwork(
        InputSpec((1, 4, 4)),
        (hidden, readout),
        (
            Synapse("input", "hidden", "conv", kernel, 8, padding=1),
            Synapse("hidden", "out", "conv", kernel.reshape(1, 2, 3, 3), 8),
        ),
        3,
    )
    codes = random_codes(rng, network)
    readouts, traces = _run(network, codes, tmp_path)
    assert np.array_equal(readouts.readouts, run_reference(network, codes).readouts)
    assert compare_traces(run_reference(network, codes), traces).equal


def test_logits_are_readouts_in_real_units(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    network = random_network(rng)
    codes = random_codes(rng, network)
    write_onnx(network, tmp_path / "model.onnx")
    (logits,) = load_model(tmp_path / "model.onnx", "unrolled")(["logits"], {"image": codes})
    readouts = run_reference(network, codes).readouts.astype(np.float32)
    assert logits.dtype == np.float32
    assert np.array_equal(logits, readouts / np.float32(network.steps * network.readout.scale))


def test_the_graphs_are_portable_and_described(tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(5), dag=True, constant_channels=2, reset="subtract")
    write_onnx(network, tmp_path / "model.onnx")
    write_step_onnx(network, tmp_path / "model.step.onnx")
    portable = {"Cast", "Shape", "Concat", "Expand", "Conv", "Gemm", "Flatten", "Add", "Sub", "Mul", "Div"}
    portable |= {"Clip", "Greater", "Where"}
    for name in ("model.onnx", "model.step.onnx"):
        model = onnx.load(tmp_path / name)
        onnx.checker.check_model(model, full_check=True)
        assert {node.op_type for node in model.graph.node} <= portable
        names = [node.name for node in model.graph.node]
        assert len(names) == len(set(names))
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
        properties = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(properties["spikeguard.semantics"]) == json.loads(json.dumps(network.semantics_card()))


def test_what_the_first_synapse_sees_is_computed_once(tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(6), hidden=2, steps=5)
    write_onnx(network, tmp_path / "model.onnx")
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    weighted = operators.count("Conv") + operators.count("Gemm")
    assert weighted == 1 + 5 + 1  # input once, the middle each step, the readout on spike counts


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(6))
    for name in ("a.onnx", "b.onnx"):
        write_onnx(network, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_what_float32_cannot_hold_is_refused_all_at_once(tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(0), hidden=2, leaky=True)
    first, second, readout = network.populations
    heavy = replace(readout, bias=readout.bias + 2**24, current_decay=4096, voltage_decay=0)
    keeping = replace(second, current_decay=0)
    changed = replace(network, populations=(first, keeping, heavy), steps=60_000)
    with pytest.raises(RuleViolations) as caught:
        write_onnx(changed, tmp_path / "model.onnx")
    rows = {(row.object, row.rule.split(";")[0]) for row in caught.value.violations}
    assert rows == {
        (second.name, "accumulated current stays within 24 bits"),
        (readout.name, "sums of one step are exact in float32"),
        (readout.name, "sums over all steps are exact in float32"),
    }
    assert not list(tmp_path.iterdir())
