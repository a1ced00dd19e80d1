"""Stages: reused while nothing they rest on has changed, redone where something has, never half-written."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import snntorch
import torch
from torch import nn

from hardware.errors import RuleViolations, SpikeguardError
from hardware.files import read_json
from hardware.formats.bundle import open_bundle
from pipeline import run as run_module
from pipeline.config import Config, validate_config
from pipeline.fidelity.attribution import attribution_rows
from pipeline.models.float_file import load_float
from pipeline.quantization_aware import FINETUNED
from pipeline.run import Run, without_lava
from pipeline.stages import STAGES, Stage, build_network, calibration_batches, start_network
from tests.pipeline.conftest import ROOT
from tests.pipeline.samples import easy_data

ORDER = ["train", "convert", "finetune", "baseline", "quantize", "export"]


def values(data: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "network": "tests.pipeline.samples:conv_net",
        "data": {"name": "npz", "path": str(data), "validation": 16, "test": 16},
        "training": {"epochs": 1, "attack_steps": 1, "batch_size": 16, "epsilon": 0.05},
        "conversion": {"calibration_steps": 5, "batches": 2, "batch_size": 16},
        "finetuning": {"steps": 3, "epochs": 1, "batch_size": 16, "epsilon": 0.05},
        "fidelity": {"runtimes": ["emulator"]},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        settings[section] = {**settings.get(section, {}), name: value}
    return settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "easy.npz"
    images = easy_data(96)
    np.savez(path, images=images.codes, labels=images.labels)
    return path


def config(data: Path, **changes: Any) -> Config:
    return validate_config(values(data, **changes), "test")


@pytest.fixture(autouse=True)
def the_code_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may be working on it while the tests run."""
    monkeypatch.setattr(run_module, "source_digest", lambda: "fixed")


Done = list[str]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Done:
    """Names of the stages that did work, in order."""
    names: Done = []

    def counting(stage: Stage) -> Callable[[Run, Path], None]:
        def work(run: Run, folder: Path) -> None:
            names.append(stage.name)
            stage.work(run, folder)

        return work

    counted = {
        name: Stage(stage.name, stage.sections, stage.inputs, counting(stage), stage.folder)
        for name, stage in STAGES.items()
    }
    monkeypatch.setattr(run_module, "STAGES", counted)
    return names


def again(done: Done, run: Run) -> Done:
    done.clear()
    run.ensure()
    return list(done)


@pytest.fixture(scope="module")
def prepared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "source_digest", lambda: "fixed")
        Run(config(data), folder, "").ensure()
    return folder


@pytest.fixture
def finished(prepared: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not {"stages", "logs"} & set(path.parts)  # these hold seconds
    }


def test_a_first_run_does_every_stage_in_order(data: Path, tmp_path: Path, done: Done) -> None:
    assert again(done, Run(config(data), tmp_path, "")) == ORDER


def test_a_second_run_does_nothing(finished: Path, data: Path, done: Done) -> None:
    before = contents(finished)
    assert again(done, Run(config(data), finished, "")) == []
    assert contents(finished) == before


def test_seconds_of_kept_stages_are_those_they_took(finished: Path, data: Path) -> None:
    first, second = (Run(config(data), finished, "").ensure() for _ in range(2))
    assert list(first) == ORDER
    assert first == second
    assert all(seconds > 0 for seconds in first.values())


def test_a_fresh_run_does_everything_and_comes_to_the_same(finished: Path, data: Path, done: Done) -> None:
    before = contents(finished)
    done.clear()
    Run(config(data), finished, "").ensure(fresh=True)
    assert done == ORDER
    assert contents(finished) == before


def test_a_run_can_stop_at_a_stage(data: Path, tmp_path: Path, done: Done) -> None:
    Run(config(data), tmp_path, "").ensure("convert")
    assert done == ["train", "convert"]


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("train", "ann.safetensors"),
        ("convert", "snn.safetensors"),
        ("finetune", "snn.safetensors"),
        ("quantize", "network.safetensors"),
        ("export", "model.onnx"),
    ],
)
@pytest.mark.parametrize("damage", ["deleted", "tampered"])
def test_a_damaged_result_is_made_again(
    finished: Path, data: Path, done: Done, stage: str, file: str, damage: str
) -> None:
    before = contents(finished)
    path = Run(config(data), finished, "").result(stage) / file
    if damage == "deleted":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
    redone = again(done, Run(config(data), finished, ""))
    assert redone[0] == stage
    assert contents(finished) == before  # the same work gives the same bytes, so nothing later had to change
    assert again(done, Run(config(data), finished, "")) == []


def test_what_rests_on_a_changed_result_is_made_again(finished: Path, data: Path, done: Done) -> None:
    changed = config(data, finetuning__learning_rate=0.02)
    before = contents(finished / "convert")
    redone = again(done, Run(changed, finished, ""))
    assert "finetune" in redone
    assert redone[-2:] == ["quantize", "export"]
    assert "train" not in redone
    assert contents(finished / "convert") == before


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"training__epochs": 2}, ["train", "convert", "finetune", "baseline", "quantize", "export"]),
        ({"conversion__scale": 0.5}, ["convert", "finetune", "baseline", "quantize", "export"]),
        ({"quantization__bits": 6}, ["quantize", "export"]),
        ({"fidelity__margin": 0.05}, ["export"]),
        ({"data__validation": 20}, ORDER),
    ],
)
def test_a_changed_setting_redoes_what_depends_on_it_alone(
    finished: Path, data: Path, done: Done, change: dict[str, Any], redone: list[str]
) -> None:
    assert again(done, Run(config(data, **change), finished, "")) == redone


def test_without_a_baseline_none_is_trained(data: Path, tmp_path: Path, done: Done) -> None:
    Run(config(data, fidelity__baseline=False), tmp_path, "").ensure()
    assert "baseline" not in done


def test_other_code_redoes_everything(finished: Path, data: Path, done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "source_digest", lambda: "other")
    assert again(done, Run(config(data), finished, "")) == ORDER


@pytest.mark.parametrize("part", ["images", "labels"])
def test_changed_data_redo_everything(tmp_path: Path, done: Done, part: str) -> None:
    own = tmp_path / "own.npz"
    images = easy_data(96)
    np.savez(own, images=images.codes, labels=images.labels)
    run = Run(config(own), tmp_path / "run", "")
    run.ensure()
    codes, labels = images.codes.copy(), images.labels.copy()
    if part == "images":
        codes ^= 1
    else:
        labels = (labels + 1) % 4
    np.savez(own, images=codes, labels=labels)
    assert again(done, Run(config(own), tmp_path / "run", "")) == ORDER


def test_moved_data_change_nothing(
    finished: Path, data: Path, done: Done, tmp_path_factory: pytest.TempPathFactory
) -> None:
    moved = shutil.copy(data, tmp_path_factory.mktemp("moved") / "other.npz")
    assert again(done, Run(config(Path(moved)), finished, "")) == []


def test_where_the_data_lie_is_in_no_result(prepared: Path, data: Path) -> None:
    provenance = open_bundle(prepared / "bundle").manifest.provenance
    assert provenance["config"]["data"] == {"name": "npz", "train": None, "validation": 16, "test": 16}  # type: ignore[index,call-overload]
    places = {bytes(part) for part in (data, data.parent.parent)}
    for name, content in contents(prepared).items():
        assert not any(place in content for place in places), name


OWN_NETWORK = """
from torch import nn

def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, {hidden}), nn.ReLU(), nn.Linear({hidden}, 4))
"""


def test_a_changed_network_of_ones_own_is_trained_again(
    data: Path, tmp_path: Path, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    settings = {**values(data), "network": "own_network:network"}
    for hidden, expected in ((5, ["train"]), (5, []), (6, ["train"])):
        Path("own_network.py").write_text(OWN_NETWORK.format(hidden=hidden))
        sys.modules.pop("own_network", None)  # as a new process would find it
        done.clear()
        Run(validate_config(settings, "test"), tmp_path / "run", "").ensure("train")
        assert done == expected
    sys.modules.pop("own_network", None)


INTERRUPTED = """
import sys, time
from pathlib import Path
from pipeline import run
from pipeline.config import load_config

def slow(work, folder, stage=run.STAGES["finetune"]):
    stage.work(work, folder)
    Path("halfway").touch()
    time.sleep(60)

stage = run.STAGES["finetune"]
run.source_digest = lambda: "fixed"
run.STAGES = {**run.STAGES, "finetune": run.Stage(stage.name, stage.sections, stage.inputs, slow, stage.folder)}
run.Run(load_config("run.yaml"), Path("run"), "").ensure()
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_killed_run_goes_on_where_it_was(
    data: Path, prepared: Path, tmp_path: Path, done: Done, kind: signal.Signals
) -> None:
    run = tmp_path / "run"
    shutil.copytree(prepared, run)
    shutil.rmtree(run / "finetune")
    (tmp_path / "run.yaml").write_text(repr(values(data)))
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while not (tmp_path / "halfway").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(kind)
    process.communicate(timeout=30)
    assert process.returncode != 0

    assert not (run / "finetune").exists()
    assert again(done, Run(config(data), run, "")) == ["finetune"]
    assert contents(run) == contents(prepared)
    assert [path.name for path in run.iterdir() if "partial" in path.name] == []


def test_a_stage_that_fails_leaves_what_was_there(finished: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(finished)

    def broken(_: Run, folder: Path) -> None:
        (folder / "half").write_text("half")
        raise SpikeguardError("disk full")

    stage = run_module.STAGES["quantize"]
    replaced = Stage(stage.name, stage.sections, stage.inputs, broken, stage.folder)
    monkeypatch.setattr(run_module, "STAGES", {**run_module.STAGES, "quantize": replaced})
    with pytest.raises(SpikeguardError, match="disk full"):
        Run(config(data, quantization__bits=6), finished, "").ensure()
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("digits-rnn", "unknown; choose among digits-cnn"),
        ("no.such.module:net", "cannot be loaded"),
        ("tests.pipeline.samples:no_such_function", "cannot be loaded"),
        ("tests.pipeline.samples:NETWORKS", "network"),
        ("tests.pipeline.samples:random_images", "network"),
        ("json:dumps", "network"),
        (":", "network"),
        ("tests..x:y", "network"),
    ],
)
def test_a_network_that_cannot_be_built_is_one_sentence(name: str, told: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(SpikeguardError, match="network") as caught:
        build_network(name, Run(config(data), tmp_path, ""))
    assert told in str(caught.value)


def test_a_network_for_other_classes_or_images_is_refused(data: Path, tmp_path: Path) -> None:
    settings = values(data, data__path=str(tmp_path / "three.npz"))
    images = easy_data(96)
    np.savez(tmp_path / "three.npz", images=images.codes, labels=images.labels % 3)
    with pytest.raises(SpikeguardError, match=r"\(4,\) outputs for 3 classes"):
        start_network(Run(validate_config(settings, "test"), tmp_path, ""))
    images = easy_data(96, (1, 12, 12))
    np.savez(tmp_path / "large.npz", images=images.codes, labels=images.labels)
    with pytest.raises(RuleViolations, match="fits the shape before it"):
        start_network(Run(config(tmp_path / "large.npz"), tmp_path, ""))


def test_calibration_takes_as_many_batches_as_there_are(data: Path, tmp_path: Path) -> None:
    run = Run(config(data), tmp_path, "")
    assert [len(batch) for batch in calibration_batches(run, 2)] == [16, 16]
    assert [len(batch) for batch in calibration_batches(run, 9)] == [16, 16, 16, 16]


def snn_of_ones_own() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        snntorch.Leaky(beta=0.9, reset_mechanism="zero", init_hidden=True),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


def test_a_ready_made_snn_enters_after_conversion(data: Path, tmp_path: Path) -> None:
    settings = values(data, finetuning__epochs=0)
    settings["network"] = "tests.pipeline.test_run:snn_of_ones_own"
    run = Run(validate_config(settings, "test"), tmp_path, "")
    run.ensure("finetune")
    network = load_float(run.result("finetune"))
    module = snn_of_ones_own()
    assert torch.equal(network.layers["conv1"].weight, module[0].weight)
    assert [neurons.beta.item() for _, neurons in network.neurons()] == pytest.approx([0.9])


def test_options_of_conversion_reach_the_neurons(data: Path, tmp_path: Path) -> None:
    run = Run(config(data, conversion__beta=0.75, conversion__reset="subtract"), tmp_path, "")
    run.ensure("convert")
    options = [layer.options for layer in load_float(run.result("convert")).graph.layers if layer.kind == "spike"]
    assert options == [{"beta": 0.75, "subtract": True}] * 3


def test_width_goes_with_networks_of_the_zoo(data: Path, tmp_path: Path) -> None:
    settings = {**values(data), "width": 0.5, "network": "digits-cnn"}
    narrow = start_network(Run(validate_config(settings, "test"), tmp_path, ""))
    assert narrow.layers["conv1"].weight.shape[0] == 8
    with pytest.raises(SpikeguardError, match="width is for networks of the zoo"):
        start_network(Run(validate_config({**values(data), "width": 0.5}, "test"), tmp_path, ""))


def test_without_lava_the_rest_goes_on_and_what_is_missing_is_named(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(data, fidelity__runtimes=["emulator", "lava", "onnxruntime", "netx"])

    def missing() -> Path:
        raise SpikeguardError("no Python 3.10 here")

    monkeypatch.setattr(run_module, "locate_lava_python", missing)
    reduced, rows = without_lava(wanted)
    assert reduced.fidelity.runtimes == ("emulator", "onnxruntime")
    assert [row["name"] for row in rows] == ["lava", "netx"]
    assert all("3.10" in row["reason"] for row in rows)
    with pytest.raises(SpikeguardError, match=r"3\.10"):
        run_module.require_runtimes(wanted)
    assert without_lava(reduced) == (reduced, [])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"network": "resnet-20", "width": 0.25},
            "netx: its layers do not .*=.emulator, lava, onnxruntime",
        ),
        ({"conversion__reset": "subtract"}, "lava: its neurons subtract.*netx: its neurons.*=.emulator, onnxruntime"),
    ],
    ids=["residual", "subtractive reset"],
)
def test_runtimes_that_cannot_take_the_network_are_refused_before_it_is_trained(
    data: Path, tmp_path: Path, change: dict[str, object], told: str
) -> None:
    def run(*runtimes: str) -> Run:
        settings = {"network": "digits-cnn", **change}
        own = {name: settings.pop(name) for name in ("network", "width") if name in settings}
        made = {**values(data, fidelity__runtimes=list(runtimes), **settings), **own}
        return Run(validate_config(made, "test"), tmp_path, "")

    with pytest.raises(SpikeguardError, match=rf"cannot run on {told}\]"):
        run_module.require_deployable(run("emulator", "lava", "netx", "onnxruntime"))
    run_module.require_deployable(run("emulator"))


def test_a_format_that_a_runtime_needs_is_not_left_out(data: Path, tmp_path: Path) -> None:
    subtracting = values(data, conversion__reset="subtract", fidelity__runtimes=["emulator"])
    Run(validate_config(subtracting, "test"), tmp_path, "").ensure()
    held = {path.name for path in (tmp_path / "bundle").iterdir()}
    assert {"network.json", "model.onnx", "model.step.onnx", "model.int8.onnx", "model.float.onnx"} <= held
    assert not {"model.nir", "model.net"} & held
    subtracting["fidelity"] = {"runtimes": ["emulator", "netx"]}
    with pytest.raises(RuleViolations) as caught:
        Run(validate_config(subtracting, "test"), tmp_path, "").ensure()
    assert {row.rule for row in caught.value.violations} == {"membranes reset to zero"}


def test_a_second_run_in_the_same_folder_is_turned_away(tmp_path: Path) -> None:
    with (
        run_module.sole_user(tmp_path),
        pytest.raises(SpikeguardError, match="another run is at work"),
        run_module.sole_user(tmp_path),
    ):
        pass
    with run_module.sole_user(tmp_path):
        pass


def test_integers_may_learn_on_their_grid(finished: Path, data: Path, done: Done) -> None:
    settings = values(data, finetuning__averaging=0.5)
    run = Run(validate_config(settings, "test"), finished, "")
    run.ensure()
    rounded = open_bundle(run.result("export")).network
    settings["quantization"] = {"bits": 3, "epochs": 2, "learning_rate": 0.05}
    run = Run(validate_config(settings, "test"), finished, "")
    assert again(done, run) == ["quantize", "export"]
    learned = open_bundle(run.result("export")).network
    assert {synapse.bits for synapse in learned.synapses} == {3}
    assert not np.array_equal(learned.synapses[0].weight, rounded.synapses[0].weight)
    assert len((run.result("quantize") / "history.csv").read_text().splitlines()) == 3
    rows = read_json(run.result("quantize") / "attribution.json")
    assert rows[-1]["rounded"] == FINETUNED
    assert attribution_rows(open_bundle(run.result("export"))) == rows
    assert again(done, run) == []
