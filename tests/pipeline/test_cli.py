"""Bad input, interruptions: one clear sentence, the right exit code, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from exporters.bundle import write_bundle
from exporters.onnx import write_onnx, write_step_onnx
from hardware.bounds import prove
from hardware.files import sha256_of
from hardware.formats.bundle import NIR_FILE, ONNX_FILE, ONNX_STEP_FILE, open_bundle
from hardware.formats.counterexamples import no_counterexamples, save_counterexamples
from hardware.runtimes import lava
from hardware.targets.catalogue import TARGETS
from hardware.targets.loihi2 import LOIHI2
from hardware.targets.rules import check, placement
from tests.networks import random_codes, random_network
from tests.pipeline.conftest import ROOT, Call, SmallRun, spikeguard
from tests.pipeline.samples import easy_data

OK, ERROR, USAGE, FAIL, INTERRUPTED = 0, 1, 2, 3, 130


@pytest.fixture
def bundle(small_run: SmallRun, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(small_run.bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def sign(bundle: Path) -> None:
    """Bring the manifest in line with the files, as an attacker would."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name in manifest["files"]:
        path = bundle / name
        manifest["files"][name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def plant_another_network(bundle: Path) -> None:
    """Put ONNX files of a network with one other threshold into a bundle, and sign them."""
    network = open_bundle(bundle).network
    first, *others = network.populations
    other = replace(network, populations=(replace(first, threshold=2 * first.threshold + 1), *others))
    for name, write in ((ONNX_FILE, write_onnx), (ONNX_STEP_FILE, write_step_onnx)):
        (bundle / name).unlink()
        write(other, bundle / name)
    sign(bundle)


BUNDLE_COMMANDS = ["verify", "info", "check", "conformance", "emulate", "fidelity", "export", "sweep"]


@pytest.mark.parametrize("command", BUNDLE_COMMANDS)
def test_a_bundle_that_is_not_there(call: Call, command: str, tmp_path: Path) -> None:
    answer = call(command, tmp_path / "nowhere")
    assert answer.code == ERROR
    assert answer.says("nowhere is not a bundle folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    answer = call(command, empty)
    assert answer.code == ERROR
    assert answer.says("manifest.json does not exist")


@pytest.mark.parametrize("command", BUNDLE_COMMANDS)
@pytest.mark.parametrize("name", ["model.onnx", "network.safetensors", "snn.safetensors", "golden.npz"])
def test_a_tampered_file_is_named_and_no_other(call: Call, command: str, name: str, bundle: Path) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(bytes(content))
    answer = call(command, bundle)
    assert answer.code == ERROR
    assert answer.says(name, "SHA-256")
    assert not any(answer.says(other.name) for other in bundle.iterdir() if other.name not in name)


def test_missing_added_and_shortened_files_are_all_named(call: Call, bundle: Path) -> None:
    (bundle / "model.nir").unlink()
    (bundle / "extra.bin").write_bytes(b"x")
    (bundle / "model.net").write_bytes((bundle / "model.net").read_bytes()[:-100])
    answer = call("verify", bundle)
    assert answer.code == ERROR
    assert answer.says("model.nir", "extra.bin", "model.net", "missing", "unlisted", "size")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "spikeguard.bundle/9"}', "\x00"])
def test_a_manifest_that_is_none(call: Call, bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text)
    answer = call("info", bundle)
    assert answer.code == ERROR
    assert answer.says("manifest.json")


@pytest.mark.parametrize("name", ["model.nir", "model.cuba.nir", "model.onnx", "model.step.onnx", "golden.npz"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.97])
def test_a_truncated_file_with_a_matching_manifest(call: Call, bundle: Path, name: str, keep: float) -> None:
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[: int(keep * len(content))])
    sign(bundle)
    answer = call("verify", bundle)
    assert answer.code == ERROR
    assert answer.says(name)


@pytest.mark.lava
@pytest.mark.parametrize(("name", "runtime"), [("model.net", "netx"), ("model.nir", "lava")])
def test_a_truncated_hdf5_on_the_runtime_that_reads_it(call: Call, bundle: Path, name: str, runtime: str) -> None:
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[: len(content) // 2])
    sign(bundle)
    answer = call("emulate", bundle, "--runtime", runtime)
    assert answer.code == ERROR
    assert answer.says(name)


def test_a_file_of_another_network_fails_verification(call: Call, bundle: Path) -> None:
    plant_another_network(bundle)
    answer = call("verify", bundle)
    assert answer.code == FAIL
    assert answer.says("does not mean what the bundle says")


def test_nothing_is_grown_over_what_is_there(call: Call, bundle: Path, tmp_path: Path) -> None:
    answer = call("fidelity", bundle, "--grow", bundle, "--out", tmp_path / "out")
    assert answer.code == USAGE
    assert answer.says("exists already", "never edited")
    assert not (tmp_path / "out").exists()


def test_an_earlier_build_that_is_not_there(call: Call, bundle: Path, tmp_path: Path) -> None:
    answer = call("fidelity", bundle, "--against", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert answer.code == ERROR
    assert answer.says("nowhere is not a bundle folder")


def test_counterexamples_of_other_images_are_refused(
    call: Call, small_run: SmallRun, bundle: Path, tmp_path: Path
) -> None:
    save_counterexamples(tmp_path / "out" / "counterexamples.npz", no_counterexamples((3, 2, 2)))
    answer = call("fidelity", bundle, "--runtime", "emulator", "--set", small_run.data, "--out", tmp_path / "out")
    assert answer.code == ERROR
    assert answer.says("counterexamples.npz", "images are the network's", "move the file away")


def test_a_selftest_on_more_images_than_there_are(call: Call, tmp_path: Path) -> None:
    answer = call("selftest", "--images", 900, "--out", tmp_path)
    assert answer.code == ERROR
    assert answer.says("900 images are more than the 800", "take fewer")


def test_nan_weights_are_named(call: Call, small_run: SmallRun, bundle: Path) -> None:
    parameters = safetensors.torch.load_file(bundle / "snn.safetensors")
    parameters["layers.linear1.weight"][0, 0] = torch.nan
    safetensors.torch.save_file(parameters, bundle / "snn.safetensors")
    sign(bundle)
    out = bundle.parent / "out"
    answer = call("fidelity", bundle, "--runtime", "emulator", "--set", small_run.data, "--out", out)
    assert answer.code == ERROR
    assert answer.says("layers.linear1.weight", "NaN")
    assert not (out / "report.json").exists()


def images(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "images.npz", **arrays)
    return folder / "images.npz"


GOOD = np.zeros((3, 1, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"images": np.zeros((3, 1, 9, 9), np.uint8)}, "(3, 1, 9, 9)"),
        ({"images": np.zeros((3, 8, 8), np.uint8)}, "(3, 8, 8)"),
        ({"images": np.zeros((3, 3, 8, 8), np.uint8)}, "(samples, [4,] 1, 8, 8)"),
        ({"images": GOOD.astype(np.float32)}, "float32"),
        ({"images": GOOD.astype(np.int64) - 1}, "-1..-1"),
        ({"images": GOOD.astype(np.int64) + 256}, "256..256"),
        ({"images": np.uint8(3)}, "no images"),
        ({"images": GOOD[:0]}, "no images"),
        ({"pictures": GOOD}, "no array 'images'"),
        ({"images": GOOD, "labels": np.zeros(4, np.int64)}, "one label per image"),
        ({"images": np.array([object()])}, "not a readable .npz"),
    ],
)
def test_wrong_images(call: Call, small_run: SmallRun, tmp_path: Path, arrays: dict[str, Any], told: str) -> None:
    for runtime in ("emulator", "onnxruntime"):
        answer = call("emulate", small_run.bundle, "--images", images(tmp_path, **arrays), "--runtime", runtime)
        assert answer.code == ERROR
        assert answer.says(told), answer.err


def test_images_that_are_no_archive(call: Call, small_run: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "images.npz").write_text("text")
    answer = call("emulate", small_run.bundle, "--images", tmp_path / "images.npz")
    assert (answer.code, answer.says("images.npz", "not a readable")) == (ERROR, True)
    answer = call("emulate", small_run.bundle, "--images", tmp_path / "nowhere.npz")
    assert (answer.code, answer.says("nowhere.npz does not exist")) == (ERROR, True)


def test_an_unknown_runtime(call: Call, small_run: SmallRun, tmp_path: Path) -> None:
    answer = call("emulate", small_run.bundle, "--runtime", "loihi")
    assert answer.code == ERROR
    assert answer.says("no runtime 'loihi'", "emulator, lava")
    answer = call("fidelity", small_run.bundle, "--runtime", "loihi", "--out", tmp_path)
    assert answer.code == USAGE
    assert answer.says("fidelity.runtimes", "loihi")


@pytest.mark.parametrize(
    "arguments",
    [
        ["explode"],
        ["run"],
        ["run", "digits", "--colour", "red"],
        ["run", "digits", "--threads", "0"],
        ["run", "digits", "--threads", "many"],
        ["run", "digit"],
        ["run", "digits", "--set", "finetuning.epoch=3"],
        ["run", "digits", "--set", "finetuning.epochs"],
        ["run", "digits", "--set", "finetuning.epochs=[1"],
        ["run", "digits", "--set", "quantization.bits=9"],
        ["demo", "--set", "fidelity.epsilon=1.5"],
        ["export", "nowhere", "--target", "loihi3"],
        ["sweep"],
        ["sweep", "nowhere", "--bits", "1"],
        ["sweep", "nowhere", "--steps", "65"],
        ["sweep", "nowhere", "--samples", "0"],
    ],
)
def test_usage_errors(call: Call, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = call(*arguments)
    assert answer.code == USAGE
    assert answer.err.strip()
    assert list(tmp_path.iterdir()) == []


def test_every_problem_of_a_configuration_is_listed(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("sead: 1\ntraining: {epochs: -1}\nfidelity: {epsilon: -0.1}\nquantization: {bits: 1}\n")
    answer = call("run", path, "--out", tmp_path / "run")
    assert answer.code == USAGE
    assert answer.says("4 problem(s)", "sead", "training.epochs", "fidelity.epsilon", "quantization.bits")
    assert not (tmp_path / "run").exists()


def test_a_missing_configuration(call: Call, tmp_path: Path) -> None:
    answer = call("run", tmp_path / "nowhere.yaml")
    assert answer.code == ERROR
    assert answer.says("nowhere.yaml does not exist")


def test_brackets_in_names_are_told_as_they_are(call: Call, tmp_path: Path) -> None:
    """The terminal library takes [words] for colours and [/words] for an error of its own."""
    for name in ("[red]", "[/red]", "[bold", "a]"):
        answer = call("verify", tmp_path.parent / name)
        assert answer.code == ERROR
        assert answer.says(f"{name} is not a bundle folder")


TWO_POOLS = """
from torch import nn

def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16, 4),
    )

def good():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))

def broken():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a network and data of one's own, and a configuration without the network."""
    name = f"own_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(TWO_POOLS)
    data = easy_data(96)
    np.savez(tmp_path / "data.npz", images=data.codes, labels=data.labels)
    settings = {
        "network": f"{name}:network",
        "data": {"name": "npz", "path": str(tmp_path / "data.npz"), "validation": 16, "test": 16},
        "training": {"epochs": 1, "attack_steps": 1, "batch_size": 16},
        "finetuning": {"epochs": 1, "batch_size": 16},
        "fidelity": {"runtimes": ["emulator"]},
    }
    (tmp_path / "own.yaml").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "own.yaml"


def network_of(own: Path) -> str:
    module, _ = json.loads(own.read_text())["network"].split(":")
    return str(module)


def test_max_pooling_in_a_network_of_ones_own_is_a_table(call: Call, own: Path) -> None:
    answer = call("run", own, "--out", "run")
    assert answer.code == ERROR
    assert answer.err.count("MaxPool2d") == 2
    assert answer.says("remedy", "use nn.AvgPool2d")


def test_a_network_of_ones_own_that_raises(call: Call, own: Path) -> None:
    answer = call("run", own, "--out", "run", "--set", f"network={network_of(own)}:broken")
    assert answer.code == ERROR
    assert answer.says("cannot be loaded (no weights here)")


def test_training_that_diverges_is_one_sentence(call: Call, own: Path) -> None:
    answer = call(
        "run", own, "--out", "run", "--set", f"network={network_of(own)}:good", "--set", "training.learning_rate=1e30"
    )
    assert answer.code == ERROR
    assert answer.says("NaN or infinite values", "lower learning rate")


def test_data_of_ones_own_that_is_wrong(call: Call, own: Path) -> None:
    np.savez("data.npz", images=np.zeros((9, 8, 8)), labels=np.zeros(9))
    answer = call("run", own, "--out", "run")
    assert answer.code == ERROR
    assert answer.says("float64 (9, 8, 8)", "one integer per image")


def test_a_bundle_does_not_say_where_its_images_lie(call: Call, small_run: SmallRun, tmp_path: Path) -> None:
    answer = call("fidelity", small_run.bundle, "--out", tmp_path / "out")
    assert answer.code == USAGE
    assert answer.says("path is given exactly when name is npz", "--set data.path=")
    assert not (tmp_path / "out").exists()


def test_a_data_set_of_standard_files_needs_its_folder(call: Call, own: Path, tmp_path: Path) -> None:
    settings = json.loads(own.read_text())
    settings["data"] = {"name": "mnist", "validation": 16, "test": 16}
    own.write_text(json.dumps(settings))
    answer = call("run", own, "--out", "run")
    assert answer.code == USAGE
    assert answer.says("the files of mnist are not told of", "--data-dir DIR", "yann.lecun.com")
    assert not Path("run").exists()
    (tmp_path / "a: [b] #").mkdir()  # words with a meaning in YAML
    answer = call("run", own, "--out", "run", "--data-dir", tmp_path / "a: [b] #")
    assert answer.code == ERROR
    assert answer.says("mnist is not complete in", "a: [b] #", "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def test_a_folder_is_refused_where_there_is_none(call: Call, own: Path, tmp_path: Path) -> None:
    for config in (own, "digits"):
        answer = call("run", config, "--out", "run", "--data-dir", tmp_path)
        assert answer.code == USAGE
        assert answer.says("dir (--data-dir) is given for a folder of standard files only")


def test_a_place_that_cannot_be_written(call: Call, own: Path, small_run: SmallRun) -> None:
    blocked = own.parent / "file"
    blocked.write_text("")
    good = ["--set", f"network={network_of(own)}:good"]
    for arguments in (
        ["run", own, *good, "--out", blocked / "run"],
        ["export", small_run.folder, "--out", blocked / "bundle"],
        ["emulate", small_run.bundle, "--trace", blocked / "trace.npz"],
    ):
        answer = call(*arguments)
        assert answer.code == ERROR
        assert answer.says(str(blocked))


def test_a_runtime_that_cannot_be_had_is_refused_before_any_work(
    call: Call, own: Path, small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(lava.PYTHON_VARIABLE, "/nowhere/python")
    good = ["--set", f"network={network_of(own)}:good", "--set", "fidelity.runtimes=[lava]"]
    answer = call("run", own, *good, "--out", "run")
    assert answer.code == ERROR
    assert answer.says("/nowhere/python")
    assert not Path("run").exists()
    answer = call("fidelity", small_run.bundle, "--runtime", "netx", "--set", small_run.data, "--out", "fidelity")
    assert answer.code == ERROR
    assert not Path("fidelity").exists()


def test_a_planted_fault_in_a_bundle_fails_with_3(
    call: Call, small_run: SmallRun, bundle: Path, tmp_path: Path
) -> None:
    """The ONNX file of another network, signed as if it belonged: certification must tell."""
    plant_another_network(bundle)
    answer = call(
        "fidelity",
        bundle,
        "--runtime",
        "onnxruntime",
        "--out",
        tmp_path / "out",
        "--set",
        "fidelity.square_queries=2",
        "--set",
        small_run.data,
    )
    assert answer.code == FAIL
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["verdict"], report["outcome"]) == ("fail", "TRACE_MISMATCH")
    assert report["certified_runtimes"] == ["emulator"]
    assert "onnxruntime" in report["summary"]


def test_a_bundle_without_a_configuration_cannot_be_checked(call: Call, bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["provenance"] = {}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    answer = call("fidelity", bundle, "--out", tmp_path / "out")
    assert answer.code == USAGE
    assert answer.says("holds no configuration")


def test_impossible_figures_of_rounding_are_refused_before_any_attack(
    call: Call, small_run: SmallRun, bundle: Path, tmp_path: Path
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["provenance"]["attribution"][1] |= {"samples": 0, "logit_error": "[red]small[/red]"}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    answer = call("fidelity", bundle, "--out", tmp_path / "out", "--set", small_run.data)
    assert answer.code == ERROR
    assert answer.says("attribution in", "attribution.1.samples", "attribution.1.logit_error", "[red]small[/red]")
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_tells_nothing_of_rounding_is_checked_all_the_same(
    call: Call, small_run: SmallRun, bundle: Path, tmp_path: Path
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["provenance"]["attribution"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(small_run.folder / "crafted", tmp_path / "out" / "crafted")
    answer = call("fidelity", bundle, "--runtime", "emulator", "--out", tmp_path / "out", "--set", small_run.data)
    assert answer.code == small_run.finished.returncode
    assert "each kind of rounding" in small_run.finished.stdout
    assert "each kind of rounding" not in answer.out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["attribution"], report["arms"]) == ([], small_run.report["arms"])
    assert 'id="rounding"' not in (tmp_path / "out" / "report.html").read_text()


def test_verifying_needs_no_torch(small_run: SmallRun) -> None:
    script = "import sys; sys.modules['torch'] = None; from pipeline.cli import main; main(sys.argv[1:])"
    for arguments in (["verify"], ["info"], ["emulate"], ["emulate", "--runtime", "onnxruntime"]):
        finished = subprocess.run(
            [sys.executable, "-c", script, arguments[0], str(small_run.bundle), *arguments[1:]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert finished.returncode == OK, finished.stderr


def test_without_arguments_there_is_help() -> None:
    finished = spikeguard()
    assert "Usage" in finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr
    helped = spikeguard("--help")
    assert helped.returncode == OK
    for command in ("demo", "run", *BUNDLE_COMMANDS):
        assert command in helped.stdout


def marked_processes(mark: str) -> list[int]:
    """Processes that carry a mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes() and (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def interrupt(arguments: list[object], ready: Callable[[str], bool], kind: signal.Signals) -> tuple[int, str]:
    """Start the command line, send it a signal once ``ready`` says so, and require that nothing is left of it."""
    mark = f"SPIKEGUARD_TEST_MARK={uuid.uuid4().hex}"
    name, value = mark.split("=")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, name: value, "COLUMNS": "200"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while not ready(mark):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(kind)
    said = process.communicate(timeout=40)[1]
    deadline = time.monotonic() + 10
    while marked_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert marked_processes(mark) == []
    return process.returncode, said


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_run_exits_with_130_and_leaves_nothing_half_written(
    tmp_path: Path, kind: signal.Signals
) -> None:
    folder = tmp_path / "run"
    code, said = interrupt(
        ["run", "digits", "--out", folder, "--set", "fidelity.runtimes=[emulator]"],
        lambda _: any(folder.glob(".train.*.partial")),
        kind,
    )
    # CPython ends by SIGINT itself if the signal fell into a string it was executing; a shell sees 130 for both.
    assert code in (INTERRUPTED, -signal.SIGINT), said
    assert "interrupted" in said
    assert "Traceback" not in said
    assert [path.name for path in folder.rglob("*") if path.is_file() or "partial" in path.name] == [".lock"]


@pytest.mark.lava
def test_ctrl_c_while_lava_runs_leaves_no_orphan(small_run: SmallRun, tmp_path: Path) -> None:
    many = images(tmp_path, images=np.zeros((2000, 1, 8, 8), np.uint8))
    code, said = interrupt(
        ["emulate", small_run.bundle, "--runtime", "lava", "--images", many],
        lambda mark: len(marked_processes(mark)) > 3,
        signal.SIGINT,
    )
    assert code == INTERRUPTED
    assert "Traceback" not in said


def hand_made_bundle(folder: Path, seed: int, *, fits: bool, models: Collection[str] = (NIR_FILE,)) -> Path:
    """A bundle of a random network with several synapses per population; Loihi takes it if ``fits``."""
    rng = np.random.default_rng(seed)
    network = random_network(rng, dag=True, hidden=3)
    if fits:
        synapses = tuple(
            replace(s, weight=2 * (s.weight >> 4).clip(-64, 63), bits=8, exponent=1) for s in network.synapses
        )
        network = replace(network, synapses=synapses)
    write_bundle(
        folder,
        network,
        golden_codes=random_codes(rng, network, 3),
        float_model_files={"snn.json": b"{}"},
        provenance={},
        models=models,
    )
    return folder


def cells(printed: str) -> list[list[str]]:
    """The rows of all tables."""
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in printed.splitlines()]


def test_a_network_that_fits_is_placed_proven_and_priced(call: Call, tmp_path: Path) -> None:
    path = hand_made_bundle(tmp_path / "bundle", 2, fits=True)
    network = open_bundle(path).network
    assert any(len(network.incoming(p.name)) > 1 for p in network.populations)
    answer = call("check", path)
    assert (answer.code, answer.err) == (OK, "")
    assert "the network fits loihi2" in answer.out
    assert "broken rules" not in answer.out
    placed = placement(network, LOIHI2)
    assert f"{placed.memory_bytes:,} bytes, at least {placed.minimum_cores} core(s), 1 chip(s)" in answer.out
    shown = cells(answer.out)
    for row, proof in zip(placed.populations, prove(network), strict=True):
        neurons = [row.neurons, row.connections, row.fan_in, row.fan_out]
        assert [row.population, *(f"{count:,}" for count in neurons)] in shown
        taken = [row.weight_bytes, row.state_bytes, row.axons_in, row.axons_out, row.minimum_cores]
        assert [row.population, *(f"{count:,}" for count in taken)] in shown
        sums, membrane = ("{:,} .. {:,}".format(*pair) for pair in (proof.sum_range, proof.membrane_range))
        assert [proof.population, sums, "never", membrane, "never", "exact"] in shown
    assert "estimates from operations counted on 3 golden inputs, not measurements" in answer.out
    assert "Davies et al." in answer.out


def test_every_broken_rule_is_told_with_its_remedy_and_another_target_may_do(call: Call, tmp_path: Path) -> None:
    path = hand_made_bundle(tmp_path / "bundle", 2, fits=False)
    network = open_bundle(path).network
    for name in ("loihi2", "generic-int8", "lava", "netx"):
        answer = call("check", path, "--target", name)
        violations = check(network, TARGETS[name])
        assert violations
        assert answer.code == FAIL
        assert answer.says(f"breaks {len(violations)} rule(s) of {name}")
        for row in violations:
            assert any(
                row.object in line and row.rule in line and row.remedy in line for line in answer.out.splitlines()
            )
    assert call("check", hand_made_bundle(tmp_path / "even", 2, fits=True), "--target", "generic-int8").code == OK


def test_memory_is_all_there_is_to_share_without_cores(call: Call, tmp_path: Path) -> None:
    answer = call("check", hand_made_bundle(tmp_path / "bundle", 2, fits=True), "--target", "generic-int8")
    assert "placement on generic-int8" in answer.out
    assert "cores" not in answer.out
    assert "axons" not in answer.out


def test_an_unknown_target_is_wrong_usage_before_any_file_is_read(call: Call, tmp_path: Path) -> None:
    answer = call("check", tmp_path / "nowhere", "--target", "loihi3")
    assert answer.code == USAGE
    assert answer.says("no target 'loihi3'", "loihi2, generic-int8, lava, netx")
    answer = call("check", tmp_path / "nowhere")
    assert (answer.code, answer.says("not a bundle folder")) == (ERROR, True)


def test_checking_needs_no_training_packages(tmp_path: Path) -> None:
    path = hand_made_bundle(tmp_path / "bundle", 2, fits=True)
    blocked = ("torch", "snntorch", "onnx", "sklearn", "scipy", "jinja2", "matplotlib")
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}));from pipeline.cli import main; main(sys.argv[1:])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script, "check", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == OK, finished.stderr


def test_what_the_pipeline_quantises_fits_every_target(call: Call, small_run: SmallRun) -> None:
    for name in TARGETS:
        answer = call("check", small_run.bundle, "--target", name)
        assert answer.code == OK, answer.out


def test_the_report_prices_the_operations_it_counted(small_run: SmallRun) -> None:
    energy, placed = small_run.report["energy"], small_run.report["placement"]
    network = open_bundle(small_run.bundle).network
    assert energy["neuron_updates_per_image"] == network.steps * sum(p.size for p in network.populations)
    loihi, *others = energy["estimates"]
    operations = energy["synaptic_operations_per_image"] + energy["input_operations_per_image"]
    assert loihi["least_nj"] == pytest.approx((23.6 * operations + 52 * energy["neuron_updates_per_image"]) / 1000)
    assert loihi["most_nj"] == pytest.approx((23.6 * operations + 81 * energy["neuron_updates_per_image"]) / 1000)
    assert all(row["least_nj"] > 0 and row["source"] for row in others)
    assert "not measurements" in energy["note"]
    assert placed["minimum_chips"] == 1
    assert placed["minimum_cores"] == sum(row["minimum_cores"] for row in placed["populations"])
    page = (small_run.folder / "report.html").read_text()
    assert "Energy of one image, estimated and not measured" in page
    assert loihi["source"] in page


def test_conformance_tells_what_differs_and_why_others_are_not_there(call: Call, tmp_path: Path) -> None:
    path = hand_made_bundle(tmp_path / "bundle", 5, fits=False, models=(ONNX_FILE, ONNX_STEP_FILE))
    answer = call("conformance", path, "--samples", 2)
    assert (answer.code, answer.says("conformance")) == (OK, True)  # its progress
    assert "2 readings equal the reference, 11 could not be made" in answer.out
    table = {(row[0], row[1]): row[2:] for row in cells(answer.out) if row[0].startswith("model.")}
    assert len(table) == 13
    assert table[ONNX_FILE, "onnxruntime"][1:5] == ["2 x 1", "–", "–", "0"]
    assert table[ONNX_STEP_FILE, "onnxruntime"][1:5] == ["2 x 1", "0", "0", "0"]
    assert table[NIR_FILE, "norse"][1:5] == ["2 x 5", "–", "–", "–"]
    assert table[NIR_FILE, "norse"][-1] == "missing: the bundle has no model.nir; export it again with --target all"
    assert table["model.net", "netx"][-1].startswith("refused: netx export: network: populations form a chain")

    plant_another_network(path)
    answer = call("conformance", path)
    assert (answer.code, answer.says("FAIL")) == (FAIL, True)
    table = {(row[0], row[1]): row[2:] for row in cells(answer.out) if row[0].startswith("model.")}
    assert table[ONNX_STEP_FILE, "onnxruntime"][-1] == "differs"
    assert int(table[ONNX_STEP_FILE, "onnxruntime"][2]) > 0


def test_conformance_without_anything_to_show_is_no_success(call: Call, tmp_path: Path) -> None:
    path = hand_made_bundle(tmp_path / "bundle", 5, fits=False, models=())
    answer = call("conformance", path)
    assert (answer.code, answer.says("nothing could be compared")) == (ERROR, True)
    answer = call("conformance", path, "--samples", 4)
    assert (answer.code, answer.says("--samples 4 is more than the 3 golden inputs")) == (USAGE, True)
    path = hand_made_bundle(tmp_path / "other", 2, fits=False, models=(ONNX_FILE, ONNX_STEP_FILE))
    (path / ONNX_FILE).write_bytes(b"no graph")
    sign(path)
    answer = call("conformance", path)
    assert (answer.code, answer.says("a reader failed")) == (ERROR, True)
    assert "is not a usable ONNX model" in answer.out
