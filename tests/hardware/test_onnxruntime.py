"""ONNX Runtime: what it exposes, what it refuses, and that its errors become clear ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.external_data_helper import convert_model_to_external_data

from exporters.onnx import write_onnx, write_step_onnx
from hardware.errors import RuleViolations, SpikeguardError
from hardware.network import IntegerNetwork
from hardware.reference import run_reference
from hardware.runtimes import onnxruntime as module
from hardware.runtimes.onnxruntime import OnnxRuntime
from hardware.trace import compare_traces
from tests.networks import random_codes, random_network


@dataclass(frozen=True)
class Exported:
    network: IntegerNetwork
    codes: NDArray[np.uint8]
    path: Path
    step: Path


@pytest.fixture
def exported(tmp_path: Path) -> Exported:
    rng = np.random.default_rng(12)
    network = random_network(rng, hidden=2, steps=4, constant_channels=1)
    write_onnx(network, tmp_path / "model.onnx")
    write_step_onnx(network, tmp_path / "model.step.onnx")
    return Exported(network, random_codes(rng, network, 5), tmp_path / "model.onnx", tmp_path / "model.step.onnx")


def test_without_the_step_graph_only_readouts_are_exposed(exported: Exported) -> None:
    runtime = OnnxRuntime(exported.path)
    trace = runtime.run(exported.codes, "traces")
    assert trace.populations == {}
    assert np.array_equal(trace.readouts, run_reference(exported.network, exported.codes).readouts)
    assert (runtime.name, runtime.version.count(".")) == ("onnxruntime", 2)


def test_readouts_come_from_the_unrolled_graph_even_with_traces(exported: Exported) -> None:
    other = random_network(np.random.default_rng(12), hidden=2, steps=4, constant_channels=1)
    other.readout.bias[:] += 1
    write_onnx(other, exported.path)
    trace = OnnxRuntime(exported.path, exported.step).run(exported.codes, "traces")
    difference = compare_traces(run_reference(exported.network, exported.codes), trace)
    assert (difference.spikes, difference.membranes) == (0, 0)
    assert difference.readouts == trace.readouts.size


def test_batches_join_to_the_same_trace(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_SAMPLES", 2)
    trace = OnnxRuntime(exported.path, exported.step).run(exported.codes, "traces")
    assert compare_traces(run_reference(exported.network, exported.codes), trace).equal


def test_inputs_that_change_over_time_run_on_the_step_graph(exported: Exported) -> None:
    codes = random_codes(np.random.default_rng(1), exported.network, 3, timed=True)
    trace = OnnxRuntime(exported.path, exported.step).run(codes, "traces")
    assert compare_traces(run_reference(exported.network, codes), trace).equal
    with pytest.raises(SpikeguardError, match="single-step graph"):
        OnnxRuntime(exported.path).run(codes)


def test_inputs_that_do_not_fit_are_refused(exported: Exported) -> None:
    runtime = OnnxRuntime(exported.path, exported.step)
    with pytest.raises(RuleViolations, match="shape is the model's"):
        runtime.run(exported.codes[:, :, 1:])
    with pytest.raises(RuleViolations, match="shape is the model's"):
        runtime.run(random_codes(np.random.default_rng(0), exported.network, timed=True)[:, 1:])
    with pytest.raises(RuleViolations, match="8-bit integers"):
        runtime.run(exported.codes.astype(np.int64) + 255)
    with pytest.raises(RuleViolations, match="8-bit integers"):
        runtime.run(exported.codes.astype(np.float32))


def test_external_data_is_refused_however_it_is_encoded(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported.path)
    convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    onnx.save(model, str(tmp_path / "external.onnx"))
    with pytest.raises(SpikeguardError, match="other files"):
        OnnxRuntime(tmp_path / "external.onnx")
    padded = (tmp_path / "external.onnx").read_bytes().replace(b"\x08location", b"\x88\x80\x00location")
    (tmp_path / "external.onnx").write_bytes(padded)
    with pytest.raises(SpikeguardError, match="other files"):
        OnnxRuntime(tmp_path / "external.onnx")


def test_damaged_and_foreign_models_are_refused(exported: Exported, tmp_path: Path) -> None:
    content = exported.path.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(SpikeguardError, match=r"cut\.onnx"):
        OnnxRuntime(tmp_path / "cut.onnx")
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "g", [image], [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "abs.onnx"))
    with pytest.raises(SpikeguardError, match="not the unrolled graph"):
        OnnxRuntime(tmp_path / "abs.onnx")
    with pytest.raises(SpikeguardError, match="not the unrolled graph"):
        OnnxRuntime(exported.step)
    helper.set_model_props(model, {"spikeguard.graph": "unrolled", "spikeguard.steps": "3"})
    onnx.save(model, str(tmp_path / "abs.onnx"))
    with pytest.raises(RuleViolations) as caught:
        OnnxRuntime(tmp_path / "abs.onnx")
    assert {row.object for row in caught.value.violations} == {"image", "readout", "logits", "x", "y"}


def test_metadata_that_is_no_text_is_a_clear_error(exported: Exported, capfd: pytest.CaptureFixture[str]) -> None:
    content = exported.path.read_bytes()
    exported.path.write_bytes(content.replace(b"spikeguard.steps", b"spikeguard\xff\xfe\xfd\xfc\xfb\xfa"))
    with pytest.raises(SpikeguardError, match="not a usable ONNX model"):
        OnnxRuntime(exported.path)
    assert capfd.readouterr() == ("", "")


def test_size_is_checked_before_parsing(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MODEL_BYTES", 10)
    with pytest.raises(SpikeguardError, match="more than the 10 allowed"):
        OnnxRuntime(exported.path)
