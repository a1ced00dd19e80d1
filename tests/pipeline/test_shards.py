"""Work in shards: the same images whatever is killed, and however many processes share it."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from hardware.errors import SpikeguardError
from hardware.surrogates import TRIANGLE
from pipeline.attacks.ensemble import WARM, Member
from pipeline.attacks.search import join
from pipeline.attacks.targets import FloatTarget, IntegerTarget
from pipeline.config import FidelityConfig
from pipeline.fidelity import shards, workers
from pipeline.fidelity.crafting import ATTACKS, Images, Targets
from pipeline.fidelity.shards import craft_all
from pipeline.fidelity.workers import Workers
from tests.pipeline.attack_samples import assert_same, target
from tests.pipeline.samples import random_images

CODES = random_images((1, 8, 8), 9, 2)
SETTINGS = FidelityConfig(epsilon=0.05, square_queries=6)
SHORT = (Member(WARM, "APGD", 3), Member(TRIANGLE, steps=2))
SOME = tuple(
    replace(attack, own_members=SHORT)
    for attack in ATTACKS
    if attack.name in ("noise", "transfer", "adaptive", "black box")
)


def models() -> dict[str, FloatTarget | IntegerTarget]:
    reference, deployed = target("float"), target("integer")
    assert isinstance(reference, FloatTarget)
    assert isinstance(deployed, IntegerTarget)
    return {"float": reference, "integer": deployed}


IMAGES = Images(CODES, target("integer").logits(CODES).argmax(1), 5)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_IMAGES", 4)


def test_a_part_of_the_images_is_attacked_as_it_is_among_all() -> None:
    part = IMAGES.part(4, 8).part(1, 4)
    assert part.first == 5
    assert np.array_equal(part.indices, [5, 6, 7])
    assert np.array_equal(part.codes, CODES[5:8])


def test_shards_of_a_smaller_check_are_found_again_by_a_larger_one(tmp_path: Path) -> None:
    craft_all(models(), IMAGES.part(0, 8), SETTINGS, tmp_path, "models", SOME)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == 2 * len(SOME)
    larger = craft_all(models(), IMAGES, SETTINGS, tmp_path, "models", SOME)
    assert len(list(tmp_path.iterdir())) == 3 * len(SOME)
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    for attack in SOME:
        parts = [
            attack.run(models(), IMAGES.part(first, first + 4), SETTINGS, tmp_path / f"{attack.name}-{first}.npz")
            for first in (0, 4, 8)
        ]
        assert_same(larger[attack.name], join(parts, CODES))


def test_processes_give_the_images_of_one_process_even_if_one_of_them_is_killed(tmp_path: Path) -> None:
    alone = craft_all(models(), IMAGES, SETTINGS, tmp_path / "alone", "models", SOME)
    killed: list[int] = []

    def kill_one_at_work() -> None:
        while not list((tmp_path / "shared").glob("*.npz")):
            time.sleep(0.01)
        victim = mp.active_children()[0]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        killed.append(victim.pid)

    killer = threading.Thread(target=kill_one_at_work)
    with Workers(2, models()) as processes:
        killer.start()
        shared = craft_all(models(), IMAGES, SETTINGS, tmp_path / "shared", "models", SOME, processes)
        killer.join()
    assert killed
    assert not mp.active_children()
    for name, made in alone.items():
        assert_same(shared[name], made)
    # What was being written when its writer was killed is hidden, and read by nobody.
    names = [sorted(path.name for path in (tmp_path / run).glob("[!.]*")) for run in ("alone", "shared")]
    assert names[0] == names[1]


@dataclass(frozen=True)
class Refused:
    """A piece of work that ends in an error of the project."""

    def __call__(self, _targets: Targets, _advance: Callable[..., None]) -> None:
        raise SpikeguardError("this cannot be; do that")


@dataclass(frozen=True)
class Deadly:
    """A piece of work that kills whoever does it."""

    def __call__(self, _targets: Targets, _advance: Callable[..., None]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Broken:
    """A piece of work with a bug."""

    def __call__(self, _targets: Targets, _advance: Callable[..., None]) -> None:
        raise ZeroDivisionError("by nothing")


@dataclass(frozen=True)
class Nap:
    """A piece of work that takes its time."""

    seconds: float

    def __call__(self, _targets: Targets, _advance: Callable[..., None]) -> None:
        time.sleep(self.seconds)


def test_what_goes_wrong_in_a_process_is_said_and_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MOST_DEATHS", 1)
    with Workers(2, {}) as processes:
        naps = [Nap(0), Nap(1)]  # the first process has nothing to do while the second is at work
        assert list(processes.run(naps)) == naps
        wrong: list[tuple[Callable[..., None], str]] = [
            (Refused(), "do that"),
            (Broken(), "by nothing"),
            (Deadly(), "1 processes died"),
        ]
        for piece, words in wrong:
            with pytest.raises(SpikeguardError, match=words):
                list(processes.run([piece]))
        at_work = processes.run([Nap(0), Nap(600)])
        next(at_work)  # the context ends while the other naps
    assert not mp.active_children()
