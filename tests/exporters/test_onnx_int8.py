"""ONNX int8 writer: exact on every network it takes, and on CPUs whose byte products saturate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from exporters import onnx_int8
from exporters.onnx import write_onnx
from exporters.onnx_int8 import int8_violations, narrow_parts, write_int8_onnx
from hardware.emulator import count_saturations
from hardware.errors import RuleViolations
from hardware.network import InputSpec, IntegerNetwork, Population, Synapse
from hardware.reference import run_reference
from hardware.runtimes.onnxruntime import OnnxRuntime
from tests.hardware.strategies import cases
from tests.networks import networks, random_codes, random_network


def _readouts(network: IntegerNetwork, codes: NDArray[np.uint8], folder: Path) -> NDArray[np.int64]:
    write_int8_onnx(network, folder / "model.int8.onnx")
    return OnnxRuntime(folder / "model.int8.onnx", kind="int8").run(codes).readouts


def _weights(path: Path) -> dict[str, NDArray[np.int8]]:
    """By name, the operands of all byte products of a graph."""
    graph = onnx.load(path).graph
    used = {node.input[1] for node in graph.node if node.op_type in ("ConvInteger", "MatMulInteger")}
    return {one.name: numpy_helper.to_array(one) for one in graph.initializer if one.name in used}


def pairwise_saturating(codes: NDArray[np.uint8], weights: NDArray[np.int8]) -> NDArray[np.int64]:
    """``codes @ weights`` as AVX2 computes it: sums of adjacent pairs of products saturate at 16 bits."""
    even = len(weights) + len(weights) % 2
    products = codes.astype(np.int64)[:, :, np.newaxis] * weights.astype(np.int64)
    padded = np.pad(products, ((0, 0), (0, even - len(weights)), (0, 0)))
    pairs = padded[:, 0::2] + padded[:, 1::2]
    total: NDArray[np.int64] = np.clip(pairs, -(2**15), 2**15 - 1).sum(1)
    return total


class MatMulInteger(OpRun):
    """The operator of that name, on such a CPU."""

    op_domain = ""

    def _run(self, codes: NDArray[np.uint8], weights: NDArray[np.int8]) -> tuple[NDArray[np.int32]]:
        return (pairwise_saturating(codes, weights).astype(np.int32),)


class ConvInteger(OpRun):
    """The same: ONNX Runtime lays the windows out as rows of a matrix."""

    op_domain = ""

    def _run(
        self, codes: NDArray[np.uint8], weights: NDArray[np.int8], pads: Any, strides: Any, **_: Any
    ) -> tuple[NDArray[np.int32]]:
        padded = np.pad(codes, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
        windows = np.lib.stride_tricks.sliding_window_view(padded, weights.shape[2:], axis=(2, 3))
        windows = windows[:, :, :: strides[0], :: strides[1]].transpose(0, 2, 3, 1, 4, 5)
        rows = windows.reshape(-1, weights[0].size)
        sums = pairwise_saturating(rows, weights.reshape(len(weights), -1).T)
        return (sums.reshape(*windows.shape[:3], -1).transpose(0, 3, 1, 2).astype(np.int32),)


@given(network=networks(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_readouts_are_the_same_where_byte_products_saturate(network: IntegerNetwork, seed: int, tmp_path: Path) -> None:
    """The whole graph in ONNX's own interpreter, on the arithmetic of AVX2 without VNNI."""
    codes = random_codes(np.random.default_rng(seed), network)
    assert np.array_equal(_without_vnni(network, codes, tmp_path), run_reference(network, codes, "readouts").readouts)


def test_without_parts_they_would_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readout = Population("out", (1,), 0, np.zeros(1, np.int64), 1.0, spiking=False)
    synapse = Synapse("input", "out", "dense", np.full((1, 4), 127, np.int32), 8)
    network, codes = IntegerNetwork(InputSpec((4,)), (readout,), (synapse,), 1), np.full((1, 4), 255, np.uint8)
    assert _without_vnni(network, codes, tmp_path) == 4 * 127 * 255
    monkeypatch.setattr(onnx_int8, "MAX_CODE", 1)
    assert _without_vnni(network, codes, tmp_path) == 2 * (2**15 - 1)


def _without_vnni(network: IntegerNetwork, codes: NDArray[np.uint8], folder: Path) -> NDArray[np.int32]:
    write_int8_onnx(network, folder / "model.int8.onnx")
    model = ReferenceEvaluator(onnx.load(folder / "model.int8.onnx"), new_ops=[MatMulInteger, ConvInteger])
    readouts: NDArray[np.int32] = model.run(["readout"], {"image": codes})[0]
    return readouts


@given(network=networks(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_readouts_equal_the_reference(network: IntegerNetwork, seed: int, tmp_path: Path) -> None:
    codes = random_codes(np.random.default_rng(seed), network)
    assert np.array_equal(_readouts(network, codes, tmp_path), run_reference(network, codes, "readouts").readouts)


@given(case=cases(samples=3), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_networks_at_the_edge_are_exact_or_refused(
    case: tuple[IntegerNetwork, NDArray[np.uint8]], seed: int, tmp_path: Path
) -> None:
    network, _ = case
    codes = random_codes(np.random.default_rng(seed), network, 3)
    if int8_violations(network):
        with pytest.raises(RuleViolations):
            _readouts(network, codes, tmp_path)
    else:
        assert np.array_equal(_readouts(network, codes, tmp_path), run_reference(network, codes, "readouts").readouts)


@pytest.mark.parametrize("bias", [0, 1, -1, 131_000, -131_000])
@pytest.mark.parametrize("reset", ["zero", "subtract"])
@pytest.mark.parametrize("decays", [(4096, 0), (3000, 100)], ids=["IF", "leaky"])
def test_saturation_and_decay_are_exact(bias: int, reset: str, decays: tuple[int, int], tmp_path: Path) -> None:
    is_leaky = decays != (4096, 0)
    weight = np.array([[513, -514], [-514, 513], [514, 0], [0, -514]], np.int32) // (3 if is_leaky else 1)
    hidden = Population(
        "hidden",
        (4,),
        130_000,
        np.full(4, bias, np.int64),
        1.0,
        current_decay=decays[0],
        voltage_decay=decays[1],
        reset=reset,  # type: ignore[arg-type]
    )
    readout = Population("readout", (1,), 0, np.zeros(1, np.int64), 1.0, spiking=False)
    output = Synapse("hidden", "readout", "dense", np.ones((1, 4), np.int32), 8)
    network = IntegerNetwork(
        InputSpec((2,)), (hidden, readout), (Synapse("input", "hidden", "dense", weight, 16), output), 12
    )
    codes = np.array([[255, 255], [255, 0], [0, 255], [1, 254], [0, 0]], np.uint8)
    assert count_saturations(network, codes)["hidden"]
    assert np.array_equal(_readouts(network, codes, tmp_path), run_reference(network, codes, "readouts").readouts)


@given(
    bits=st.integers(2, 17),
    exponent=st.integers(0, 6),
    largest=st.sampled_from([1, 2, 15, 127, 128, 255]),
    seed=st.integers(0, 2**32 - 1),
)
def test_parts_of_a_weight_are_narrow_and_add_up(bits: int, exponent: int, largest: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 7)) << exponent).astype(np.int32)
    parts = narrow_parts(weight, largest)
    assert np.array_equal(sum(factor * part.astype(np.int64) for part, factor in parts), weight)
    assert (
        sum(factor * np.abs(part.astype(np.int64)) for part, factor in parts) <= 4 * np.abs(weight.astype(np.int64))
    ).all()
    codes = np.array([[largest] * 7, *rng.integers(0, largest + 1, (4, 7))], np.uint8)
    for part, _ in parts:
        assert np.array_equal(pairwise_saturating(codes, part.T), codes.astype(np.int64) @ part.T.astype(np.int64))


def test_whole_weights_and_pixels_would_saturate() -> None:
    weight, codes = np.full((2, 1), 127, np.int8), np.full((1, 2), 255, np.uint8)
    assert pairwise_saturating(codes, weight) == 2**15 - 1
    assert len(narrow_parts(weight.T.astype(np.int32), 255)) == 2
    assert len(narrow_parts(weight.T.astype(np.int32), 1)) == 1


@pytest.mark.parametrize("seed", range(4))
def test_no_two_products_in_a_graph_can_leave_16_bits(seed: int, tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(seed), kind="dense" if seed % 2 else "conv", dag=True)
    write_int8_onnx(network, tmp_path / "model.int8.onnx")
    weights = _weights(tmp_path / "model.int8.onnx")
    assert weights
    for name, weight in weights.items():
        source, _, target = name.split("/")[2].partition("_to_")
        largest = 255 if source == "input" else network.steps if target == network.readout.name else 1
        assert weight.dtype == np.int8
        assert 2 * largest * np.abs(weight.astype(np.int64)).max() < 2**15


def test_the_graph_is_portable_described_and_smaller(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    network = random_network(rng, dag=True, constant_channels=2, reset="subtract")
    write_int8_onnx(network, tmp_path / "model.int8.onnx")
    model = onnx.load(tmp_path / "model.int8.onnx")
    onnx.checker.check_model(model, full_check=True)
    portable = {"Cast", "Shape", "Concat", "Expand", "ConvInteger", "MatMulInteger", "Flatten", "Add", "Sub", "Mul"}
    assert {node.op_type for node in model.graph.node} <= portable | {"Div", "Clip", "Greater", "Where"}
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(properties["spikeguard.semantics"]) == json.loads(json.dumps(network.semantics_card()))
    wide = Synapse("input", "out", "dense", rng.integers(-128, 128, (256, 256)).astype(np.int32), 8)
    readout = Population("out", (256,), 0, np.zeros(256, np.int64), 1.0, spiking=False)
    large = IntegerNetwork(InputSpec((256,)), (readout,), (wide,), 1)
    write_int8_onnx(large, tmp_path / "large.int8.onnx")
    write_onnx(large, tmp_path / "large.onnx")
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes["large.int8.onnx"] < 0.6 * sizes["large.onnx"]  # pixels need two bytes a weight, not four


def test_clips_and_factors_stand_only_where_they_are_needed(tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(6), kind="dense", hidden=2, steps=2)
    write_int8_onnx(network, tmp_path / "model.int8.onnx")
    assert "Clip" not in {node.op_type for node in onnx.load(tmp_path / "model.int8.onnx").graph.node}
    first = replace(network.populations[0], bias=network.populations[0].bias - 2**16)
    heavy = replace(network, populations=(first, *network.populations[1:]))
    write_int8_onnx(heavy, tmp_path / "model.int8.onnx")
    names = [node.name for node in onnx.load(tmp_path / "model.int8.onnx").graph.node if node.op_type == "Clip"]
    assert names == [f"t{step}/{first.name}/membrane" for step in range(2)]


def test_what_int32_cannot_hold_is_refused_all_at_once(tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(0), hidden=1, leaky=True, steps=256)
    first, readout = network.populations
    heavy = replace(readout, bias=readout.bias + 2**24)
    heavy = replace(heavy, current_decay=4096, voltage_decay=0)
    changed = replace(network, populations=(replace(first, current_decay=0), heavy))
    weights = tuple(replace(s, weight=s.weight << 8, bits=17) for s in changed.synapses)
    with pytest.raises(RuleViolations) as caught:
        write_int8_onnx(replace(changed, synapses=weights), tmp_path / "model.int8.onnx")
    rules = {(row.object, row.rule.split(",")[0]) for row in caught.value.violations}
    assert {
        ("network", "spikes of all steps are counted in a byte"),
        (first.name, "accumulated current stays within 24 bits"),
        (readout.name, "sums of one step"),
        (readout.name, "sums over all steps fit int32"),
    } <= rules
    assert not list(tmp_path.iterdir())
