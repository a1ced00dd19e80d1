"""Triton's own schema takes the configuration, and the self-check tells what a machine computes wrongly."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import numpy_helper

from exporters import selfcheck
from exporters.bundle import write_bundle
from exporters.triton import CONFIG_FILE, MAX_BATCH, triton_config, write_triton
from hardware.errors import SpikeguardError
from hardware.files import read_arrays, write_arrays
from hardware.formats.bundle import NIR_FILE, ONNX_FILE, ONNX_STEP_FILE, Bundle, open_bundle
from tests.networks import random_codes, random_network

EQUAL, FAILED, DIFFERS = 0, 1, 3


def tritons_schema() -> Any:
    """The module of Triton's own messages, without the client around it and what that needs."""
    package = importlib.util.find_spec("tritonclient")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).with_name("grpc") / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("tritons_model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


model_config_pb2 = tritons_schema()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("triton") / "bundle"
    network = random_network(np.random.default_rng(3), hidden=2, steps=4, constant_channels=1)
    codes = random_codes(np.random.default_rng(1), network, 5)
    write_bundle(folder, network, golden_codes=codes, float_model_files={}, provenance={}, models=(ONNX_FILE,))
    return open_bundle(folder)


@pytest.fixture
def model(bundle: Bundle, tmp_path: Path) -> Path:
    return write_triton(bundle, tmp_path / "repository", "digits")


def check(model: Path, *arguments: object) -> tuple[int, str, str]:
    """The self-check in a process that finds nothing of ours."""
    command = [sys.executable, "-I", model / "selfcheck.py", *arguments]
    done = subprocess.run([*map(str, command)], cwd=model.parent, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_tritons_schema_takes_the_configuration(bundle: Bundle, model: Path) -> None:
    config = text_format.Parse((model / CONFIG_FILE).read_text(), model_config_pb2.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("digits", "onnxruntime", MAX_BATCH)
    assert config.HasField("dynamic_batching")
    ports = {port.name: (port.data_type, [*port.dims]) for port in (*config.input, *config.output)}
    assert ports == {
        "image": (model_config_pb2.TYPE_UINT8, [*bundle.network.input.shape]),
        "readout": (model_config_pb2.TYPE_INT32, [bundle.network.classes]),
        "logits": (model_config_pb2.TYPE_FP32, [bundle.network.classes]),
    }
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "cuda"
    assert dict(accelerator.parameters) == {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}
    assert config.parameters["cudnn_conv_algo_search"].string_value == "2"


def test_the_configuration_describes_the_graph(bundle: Bundle, model: Path) -> None:
    """What Triton compares when it loads a model: names, types, and shapes without the batch axis."""
    config = text_format.Parse((model / CONFIG_FILE).read_text(), model_config_pb2.ModelConfig())
    graph = onnx.load(model / "1" / "model.onnx").graph
    types = {
        onnx.TensorProto.UINT8: model_config_pb2.TYPE_UINT8,
        onnx.TensorProto.INT32: model_config_pb2.TYPE_INT32,
        onnx.TensorProto.FLOAT: model_config_pb2.TYPE_FP32,
    }
    for told, found in ((config.input, graph.input), (config.output, graph.output)):
        assert {port.name: (port.data_type, [*port.dims]) for port in told} == {
            port.name: (
                types[port.type.tensor_type.elem_type],
                [dim.dim_value for dim in port.type.tensor_type.shape.dim][1:],
            )
            for port in found
        }
    assert (model / "1" / "model.onnx").read_bytes() == bundle.file(ONNX_FILE).read_bytes()


def test_it_warms_up_with_a_golden_image_alone_and_in_a_full_batch(bundle: Bundle, model: Path) -> None:
    config = text_format.Parse((model / CONFIG_FILE).read_text(), model_config_pb2.ModelConfig())
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, MAX_BATCH]
    for warmup in config.model_warmup:
        image = warmup.inputs["image"]
        assert image.data_type == model_config_pb2.TYPE_UINT8
        raw = np.frombuffer((model / "warmup" / image.input_data_file).read_bytes(), np.uint8)
        assert np.array_equal(raw.reshape(*image.dims), bundle.golden.codes[0])


def test_images_of_any_rank_make_a_configuration() -> None:
    for kind in ("conv", "dense"):
        network = random_network(np.random.default_rng(0), kind=kind)
        config = text_format.Parse(triton_config(network, "m"), model_config_pb2.ModelConfig())
        assert [*config.input[0].dims] == [*network.input.shape]


def test_neighbours_in_a_repository_stay_and_an_older_model_is_replaced(bundle: Bundle, tmp_path: Path) -> None:
    other = tmp_path / "repository" / "other"
    other.mkdir(parents=True)
    (other / CONFIG_FILE).write_text("name: 'other'")
    first = write_triton(bundle, tmp_path / "repository", "model")
    (first / "left").touch()
    assert write_triton(bundle, tmp_path / "repository", "model") == first
    assert not (first / "left").exists()
    assert {entry.name for entry in (tmp_path / "repository").iterdir()} == {"model", "other"}
    with pytest.raises(SpikeguardError, match="no model of this project"):
        write_triton(bundle, tmp_path / "repository", "other")
    assert (other / CONFIG_FILE).read_text() == "name: 'other'"


@pytest.mark.parametrize("name", ["", "a/b", "..", 'a"', ".hidden"])
def test_names_that_are_no_folder_or_no_text_are_refused(bundle: Bundle, tmp_path: Path, name: str) -> None:
    with pytest.raises(SpikeguardError, match="cannot name a model"):
        write_triton(bundle, tmp_path / "repository", name)


def test_what_cannot_be_served_is_refused_and_nothing_is_written(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(SpikeguardError, match="lies in the bundle"):
        write_triton(bundle, bundle.path / "triton", "model")
    network = bundle.network
    for models, timed, told in (((NIR_FILE,), False, "has no model.onnx"), ((ONNX_STEP_FILE,), True, "has no model")):
        codes = random_codes(np.random.default_rng(1), network, 2, timed=timed)
        folder = tmp_path / f"bundle{timed}"
        write_bundle(folder, network, golden_codes=codes, float_model_files={}, provenance={}, models=models)
        with pytest.raises(SpikeguardError, match=told):
            write_triton(open_bundle(folder), tmp_path / "repository", "model")
    assert not (tmp_path / "repository").exists()


def test_the_self_check_runs_alone_and_finds_the_golden_readouts(model: Path) -> None:
    code, out, err = check(model)
    assert (code, err) == (EQUAL, "")
    assert out.count("0 of") == 2  # images alone, and all together
    assert "OK: exact" in out
    moved = shutil.copytree(model, model.parent / "moved")
    assert check(moved, "--provider", "CPUExecutionProvider")[0] == EQUAL


def test_the_self_check_tells_other_readouts(model: Path) -> None:
    graph = onnx.load(model / "1" / "model.onnx")
    (threshold,) = (one for one in graph.graph.initializer if one.name == "threshold/pop0")
    threshold.CopyFrom(numpy_helper.from_array(np.array(2**23, np.float32), threshold.name))
    onnx.save(graph, str(model / "1" / "model.onnx"))
    code, out, _ = check(model)
    assert code == DIFFERS
    assert "FAIL" in out


def test_the_self_check_says_why_it_cannot_be_made(model: Path, tmp_path: Path) -> None:
    code, out, err = check(model, "--provider", "CUDAExecutionProvider")
    assert (code, out) == (FAILED, "")
    assert "has no CUDAExecutionProvider; it has" in err
    (tmp_path / "cut.onnx").write_bytes((model / "1" / "model.onnx").read_bytes()[:500])
    for arguments, told in (
        (("--model", tmp_path / "none.onnx"), "does not exist"),
        (("--model", tmp_path / "cut.onnx"), "cannot be opened"),
        (("--golden", model / CONFIG_FILE), "no file of golden images"),
    ):
        code, _, err = check(model, *arguments)
        assert code == FAILED
        assert told in err
        assert "Traceback" not in err
    assert check(model, "--option", "novalue")[0] == 2


Spoil = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda golden: {"images": golden["images"]}, "no file of golden images"),
        (lambda golden: {**golden, "readouts": golden["readouts"][1:]}, "and"),
        (lambda golden: {**golden, "images": golden["images"].astype(np.float32)}, "not integers"),
        (lambda golden: {**golden, "readouts": golden["readouts"].astype(np.float64)}, "not integers"),
    ],
)
def test_golden_files_are_checked_before_they_are_used(model: Path, tmp_path: Path, spoil: Spoil, told: str) -> None:
    write_arrays(tmp_path / "golden.npz", spoil(read_arrays(model / "golden.npz")))
    with pytest.raises(selfcheck.CheckError, match=told):
        selfcheck.read_golden(tmp_path / "golden.npz")


def test_pickles_and_overlarge_golden_files_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "pickle.npz", images=np.array([object()]), readouts=np.zeros((1, 1), np.int64))
    with pytest.raises(selfcheck.CheckError, match="pickle"):
        selfcheck.read_golden(tmp_path / "pickle.npz")
    bomb = tmp_path / "bomb.npz"
    np.savez_compressed(bomb, images=np.zeros((64, 2**12), np.uint8), readouts=np.zeros((64, 1), np.int64))
    monkeypatch.setattr(selfcheck, "MAX_GOLDEN_BYTES", 2**17)
    assert bomb.stat().st_size < selfcheck.MAX_GOLDEN_BYTES
    with pytest.raises(selfcheck.CheckError, match="unpacks to"):
        selfcheck.read_golden(bomb)
    monkeypatch.setattr(selfcheck, "MAX_GOLDEN_BYTES", 10)
    with pytest.raises(selfcheck.CheckError, match="more than 10 bytes"):
        selfcheck.read_golden(model / "golden.npz")
