"""Training goes on from a checkpoint as if it had never stopped, and from no other file."""

from __future__ import annotations

import copy
import csv
import json
import math
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
import safetensors.torch
import torch
from torch import Tensor, nn

from hardware.errors import SpikeguardError
from pipeline import run as run_module
from pipeline import stages
from pipeline.checkpoints import Epoch, TrainingState, restore_checkpoint, save_checkpoint
from pipeline.config import load_config
from pipeline.data.augmentation import Augmentation
from pipeline.models.spiking import RateNetwork
from pipeline.objectives import Objective, pgd_adversarial_training
from pipeline.run import Run
from pipeline.training import Records, Schedule, fit
from tests.pipeline.conftest import ROOT
from tests.pipeline.samples import easy_data, rate_network

TRAIN, VALIDATION = easy_data(48, (1, 6, 6), 3, seed=1), easy_data(32, (1, 6, 6), 3, seed=2)
Contents = dict[str, bytes]


class Stopped(Exception):
    """Stands for whatever ends a process."""


def records(folder: Path, key: str = "key") -> Records:
    return Records(folder / "checkpoints" / "a.safetensors", folder / "logs" / "a.csv", key)


def stopping_at(call: int) -> Objective:
    """Adversarial training that ends with an exception at a call counted from 0."""
    objective, calls = pgd_adversarial_training(0.05, 2), iter(range(call + 1))

    def loss(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        if next(calls) == call:
            raise Stopped
        return objective(model, images, labels, generator)

    return loss


def trained(objective: Objective, kept: Records | None, *, averaging: float = 0.9) -> tuple[RateNetwork, list[Epoch]]:
    """Five epochs of three steps, with dropout, augmentation, momentum and averaging."""
    network = rate_network("plain conv")
    history = fit(
        network,
        objective,
        TRAIN,
        VALIDATION,
        Schedule(5, 16, 0.1, 5e-4, averaging),
        epsilon=0.05,
        seed=4,
        label="test",
        parameter_groups=[{"params": list(network.parameters())}],
        augment=Augmentation(crop_padding=1, flip=True, cutout=2),
        records=kept,
    )
    return network, history


def weights(network: nn.Module) -> dict[str, list[int]]:
    """Every bit of them."""
    return {key: value.view(torch.int32).flatten().tolist() for key, value in network.state_dict().items()}


@pytest.mark.parametrize("averaging", [0.0, 0.9])
@pytest.mark.parametrize("stops", [(4,), (3, 11), (1, 7), (14,)], ids=str)
def test_training_that_was_stopped_comes_to_the_same(tmp_path: Path, stops: tuple[int, ...], averaging: float) -> None:
    expected, history = trained(pgd_adversarial_training(0.05, 2), None, averaging=averaging)
    done = 0
    for stop in stops:
        with pytest.raises(Stopped):
            trained(stopping_at(stop - 3 * done), records(tmp_path), averaging=averaging)
        done = stop // 3
    calls = 0

    def counted(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        return pgd_adversarial_training(0.05, 2)(model, images, labels, generator)

    network, history_again = trained(counted, records(tmp_path), averaging=averaging)
    assert calls == 15 - 3 * done
    assert weights(network) == weights(expected)
    assert history_again == history
    assert len(records(tmp_path).log.read_text().splitlines()) == 6


def test_finished_training_is_only_read_back(tmp_path: Path) -> None:
    network, history = trained(pgd_adversarial_training(0.05, 2), records(tmp_path))
    records(tmp_path).log.unlink()
    again, history_again = trained(stopping_at(0), records(tmp_path))
    assert weights(again) == weights(network)
    assert history_again == history
    assert [epoch.seconds for epoch in history_again] == [epoch.seconds for epoch in history]
    assert len(records(tmp_path).log.read_text().splitlines()) == 6


def halfway(folder: Path) -> Path:
    with pytest.raises(Stopped):
        trained(stopping_at(7), records(folder))
    return records(folder).checkpoint


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """The file with changed contents and, unless the change sets another, the old checksum."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata: dict[str, Any] = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def raise_a_weight(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors["best/layers.conv1.weight"][0] += 1


def lose_a_tensor(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    del tensors["best/layers.conv1.weight"]


def with_facts(**facts: Any) -> Callable[[Path], None]:
    def change(_: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        metadata["facts"] = json.dumps({**json.loads(metadata["facts"]), **facts})

    return lambda path: rewritten(path, change)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (flip_last_bit, "damaged"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "text": (lambda path: path.write_text("epoch 3"), "damaged"),
    "weights of something": (
        lambda path: safetensors.torch.save_file({"w": torch.zeros(2)}, path),
        "not a spikeguard.checkpoint/1",
    ),
    "another format": (with_facts(format="spikeguard.checkpoint/0"), "not a spikeguard.checkpoint/1"),
    "no history": (with_facts(history="none"), "not a spikeguard.checkpoint/1"),
    "another key": (with_facts(key="other"), "other settings"),
    "a changed tensor": (lambda path: rewritten(path, raise_a_weight), "checksum"),
    "a missing tensor": (lambda path: rewritten(path, lose_a_tensor), "checksum"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_cannot_be_used_is_named_and_training_starts_over(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, history = trained(pgd_adversarial_training(0.05, 2), None)
    path = halfway(tmp_path)
    damage, told = DAMAGES[name]
    damage(path)
    capsys.readouterr()
    network, history_again = trained(pgd_adversarial_training(0.05, 2), records(tmp_path))
    said = " ".join(capsys.readouterr().err.split())
    assert "test starts over:" in said
    assert told in said
    assert "goes on" not in said
    assert weights(network) == weights(expected)
    assert history_again == history


def test_a_usable_checkpoint_is_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    halfway(tmp_path)
    capsys.readouterr()
    trained(pgd_adversarial_training(0.05, 2), records(tmp_path))
    assert "test goes on after epoch 2" in capsys.readouterr().err


def state_of(name: str, averaged: bool = False) -> TrainingState:
    model = rate_network(name)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = TrainingState(model, optimiser, copy.deepcopy(model) if averaged else None)
    state.note(Epoch(1.0, 0.5, 0.25, 0.1, 3.0))
    return state


@pytest.mark.parametrize(
    ("saved", "into"),
    [
        (state_of("conv"), state_of("plain conv")),
        (state_of("plain conv"), state_of("conv")),
        (state_of("conv"), state_of("conv", averaged=True)),
        (state_of("conv", averaged=True), state_of("conv")),
    ],
    ids=["another network", "the reverse", "no average", "a needless average"],
)
def test_tensors_of_another_training_are_refused_and_change_nothing(
    tmp_path: Path, saved: TrainingState, into: TrainingState
) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, "key", saved)
    before = copy.deepcopy(into.model.state_dict())
    with pytest.raises(SpikeguardError, match="another network"):
        restore_checkpoint(path, "key", into)
    assert all(torch.equal(value, before[key]) for key, value in into.model.state_dict().items())
    assert len(into.history) == 1


def test_a_loss_that_left_the_numbers_survives_a_checkpoint(tmp_path: Path) -> None:
    saved, into = state_of("conv"), state_of("conv")
    saved.note(Epoch(math.nan, 0.1, 0.0, 0.05, 1.0))
    saved.note(Epoch(math.inf, 0.1, 0.0, 0.05, 1.0))
    save_checkpoint(tmp_path / "a.safetensors", "key", saved)
    restore_checkpoint(tmp_path / "a.safetensors", "key", into)
    assert math.isnan(into.history[1].loss)
    assert into.history[2] == saved.history[2]
    assert into.best_score == saved.best_score == 0.75


def test_a_missing_file_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(SpikeguardError, match="does not exist"):
        restore_checkpoint(tmp_path / "no.safetensors", "key", state_of("conv"))


# A whole run, killed.

KILLED = """
import sys, time
from pathlib import Path
from pipeline import run, stages
from pipeline.config import load_config

stage, stall = sys.argv[1], int(sys.argv[2])
calls = 0

def stalling(objective):
    def loss(*arguments):
        global calls
        calls += 1
        if calls == stall:
            Path("halfway").touch()
            time.sleep(120)
        return objective(*arguments)
    return loss

def wrap(make):
    return lambda *settings: stalling(make(*settings))

run.source_digest = lambda: "fixed"
for name in ("training_objective", "finetuning_objective", "natural"):
    setattr(stages, name, wrap(getattr(stages, name)))
run.Run(load_config("run.yaml"), Path("run"), "").ensure(stage)
"""


def values(folder: Path) -> dict[str, Any]:
    return {
        "network": "tests.pipeline.samples:conv_net",
        "data": {"name": "npz", "path": str(folder / "easy.npz"), "validation": 16, "test": 16},
        "training": {"objective": "trades", "epochs": 4, "attack_steps": 1, "batch_size": 16, "averaging": 0.5},
        "conversion": {"calibration_steps": 5, "batches": 2, "batch_size": 16},
        "finetuning": {
            "steps": 3,
            "epochs": 4,
            "batch_size": 16,
            "surrogates": "ensemble",
            "attack_steps": 2,
            "crop_padding": 1,
            "flip": True,
        },
        "fidelity": {"runtimes": ["emulator"]},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the configuration, the data and an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    images = easy_data(96)
    np.savez(folder / "easy.npz", images=images.codes, labels=images.labels)
    (folder / "run.yaml").write_text(repr(values(folder)))
    resumed(folder, "baseline")
    return folder


def resumed(folder: Path, stage: str, fresh: bool = False) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "source_digest", lambda: "fixed")
        Run(load_config(str(folder / "run.yaml")), folder / "run", "").ensure(stage, fresh=fresh)


def results(folder: Path) -> Contents:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for stage in ("train", "convert", "finetune", "baseline")
        for path in sorted((folder / "run" / stage).iterdir())
    }


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def killed(whole: Path, folder: Path, stage: str, stall: int) -> None:
    """The run again with a stage to be done anew, killed in the middle of an epoch of it."""
    shutil.copytree(whole / "run", folder / "run")
    shutil.copy(whole / "run.yaml", folder)
    (folder / "run" / "stages" / f"{stage}.json").unlink()
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, stage, str(stall)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while not (folder / "halfway").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("stage", "stall", "said"),
    [
        ("train", 11, ["train ANN (trades) goes on after epoch 2"]),
        ("finetune", 15, ["fine-tune SNN goes on after epoch 3"]),
        ("baseline", 11, ["natural ANN goes on after epoch 1", "natural SNN goes on after epoch 1"]),
    ],
)
def test_a_run_killed_within_an_epoch_comes_to_the_same(
    whole: Path, tmp_path: Path, stage: str, stall: int, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """64 training images are 4 batches an epoch; the baseline's ANN has one epoch."""
    killed(whole, tmp_path, stage, stall)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert len(list(checkpoints.glob(f"{stage}*.safetensors"))) == len(said)
    capsys.readouterr()
    resumed(tmp_path, "baseline")
    heard = capsys.readouterr().err
    assert all(words in heard for words in said)
    assert results(tmp_path) == results(whole)
    assert list(checkpoints.iterdir()) == []
    for log in ("train", "finetune", "baseline-snn"):
        assert [row["epoch"] for row in rows(tmp_path / "run" / "logs" / f"{log}.csv")] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("change", ["none", "settings", "fresh"])
def test_a_run_goes_on_only_if_it_is_the_same_and_nobody_wants_it_fresh(
    whole: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(whole / "run.yaml", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "training_objective", lambda _: stopping_at(9))
        with pytest.raises(Stopped):
            resumed(tmp_path, "train")
    left = tmp_path / "run" / "checkpoints" / ".train.safetensors.1.partial"
    left.touch()
    if change == "settings":
        text = (tmp_path / "run.yaml").read_text()
        (tmp_path / "run.yaml").write_text(text.replace("'averaging': 0.5", "'averaging': 0.6"))
    capsys.readouterr()
    resumed(tmp_path, "train", fresh=change == "fresh")
    heard = capsys.readouterr().err
    assert ("goes on after epoch 2" in heard) == (change == "none")
    assert ("made with other settings" in " ".join(heard.split())) == (change == "settings")
    assert list(left.parent.iterdir()) == []


def test_the_history_in_a_result_has_no_clock_in_it(whole: Path) -> None:
    history = rows(whole / "run" / "train" / "history.csv")
    log = rows(whole / "run" / "logs" / "train.csv")
    assert list(history[0]) == ["epoch", "loss", "clean", "robust"]
    assert [{key: row[key] for key in history[0]} for row in log] == history
    assert all(float(row["seconds"]) > 0 for row in log)
