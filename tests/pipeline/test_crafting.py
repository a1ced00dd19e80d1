from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hardware.errors import SpikeguardError
from hardware.surrogates import TRIANGLE
from pipeline.attacks.ensemble import Member, SquareMember
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import GradientTarget, correct
from pipeline.config import FidelityConfig
from pipeline.fidelity import crafting, shards
from pipeline.fidelity.crafting import ATTACKS, Images
from pipeline.fidelity.shards import craft_all, load_crafted, save_crafted
from tests.pipeline.attack_samples import assert_same, assert_within, target
from tests.pipeline.samples import random_images

SETTINGS = FidelityConfig(epsilon=0.1, square_queries=6)
CODES = random_images((1, 8, 8), 8, 2)
TARGETS: dict[str, GradientTarget] = {"float": target("float"), "integer": target("integer")}
IMAGES = Images(CODES, TARGETS["integer"].logits(CODES).argmax(1), 5)


@pytest.fixture(autouse=True)
def _short_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    members = (Member(TRIANGLE, steps=2), Member(TRIANGLE, "APGD", 2))
    monkeypatch.setattr(crafting, "PRESETS", {"quick": members, "paper": (*members, SquareMember(2))})
    monkeypatch.setattr(crafting, "DISAGREEMENT_STEPS", 3)


def test_every_attack_of_the_table_keeps_its_budget_and_is_judged_on_its_own_target(tmp_path: Path) -> None:
    crafted = craft_all(TARGETS, IMAGES, SETTINGS, tmp_path, "models")
    assert list(crafted) == [attack.name for attack in ATTACKS]
    right = {
        name: {model: correct(TARGETS[model], made.codes, IMAGES.labels) for model in TARGETS}
        for name, made in crafted.items()
    }
    for attack in ATTACKS:
        made = crafted[attack.name]
        assert_within(made.codes, CODES, 25)
        if len(attack.targets) == 1:
            assert np.array_equal(made.fooled, ~right[attack.name][attack.targets[0]]), attack.name
    deployed, reference = right["only deployed wrong"], right["only reference wrong"]
    assert np.array_equal(crafted["only deployed wrong"].fooled, deployed["float"] & ~deployed["integer"])
    assert np.array_equal(crafted["only reference wrong"].fooled, reference["integer"] & ~reference["float"])
    assert not crafted["noise"].fooled.any()


def test_images_that_favour_one_model_stay_out_of_the_worst_case() -> None:
    assert [attack.name for attack in ATTACKS if not attack.in_worst_case] == [
        "only deployed wrong",
        "only reference wrong",
    ]
    counted = [attack.targets for attack in ATTACKS if attack.in_worst_case]
    assert counted.count(("float",)) == counted.count(("integer",)) == 2


def test_progress_adds_up_to_the_work_announced(tmp_path: Path) -> None:
    for attack in ATTACKS:
        told: list[int] = []

        def advance(*_: str, units: int, told: list[int] = told) -> None:
            told.append(units)

        attack.craft(crafting.Work(TARGETS, IMAGES, SETTINGS, advance, tmp_path / f"{attack.name}.npz"))
        assert sum(told) == attack.work_units(len(CODES), SETTINGS), attack.name


def test_finished_attacks_are_not_run_again_unless_something_that_determines_them_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = craft_all(TARGETS, IMAGES, SETTINGS, tmp_path, "models")

    def fail(*_: object, **__: object) -> Crafted:
        raise AssertionError("an attack ran again")

    for maker in ("random_noise", "run_ensemble", "square", "disagree"):
        monkeypatch.setattr(crafting, maker, fail)
    again = craft_all(TARGETS, IMAGES, SETTINGS, tmp_path, "models")
    for name, made in first.items():
        assert_same(again[name], made)
    stronger, larger, longer = (
        SETTINGS.model_copy(update=update) for update in ({"attacks": "paper"}, {"epsilon": 0.2}, {"square_queries": 7})
    )
    other_seed, other_labels = Images(CODES, IMAGES.labels, 6), Images(CODES, (IMAGES.labels + 1) % 4, 5)
    for shown, settings, models in (
        (IMAGES, SETTINGS, "other models"),
        (IMAGES, stronger, "models"),
        (IMAGES, larger, "models"),
        (IMAGES, longer, "models"),
        (other_seed, SETTINGS, "models"),
        (other_labels, SETTINGS, "models"),
    ):
        with pytest.raises(AssertionError, match="ran again"):
            craft_all(TARGETS, shown, settings, tmp_path, models)
    monkeypatch.setattr(shards, "source_digest", lambda: "other code")
    with pytest.raises(AssertionError, match="ran again"):
        craft_all(TARGETS, IMAGES, SETTINGS, tmp_path, "models")


def test_a_killed_check_goes_on_with_the_members_that_were_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = craft_all(TARGETS, IMAGES, SETTINGS, tmp_path / "whole", "models")
    run_ensemble = crafting.run_ensemble
    kept: list[Path] = []

    def killed(target: GradientTarget, members: tuple[Member, ...], *arguments: object, **options: object) -> object:
        run_ensemble(target, members[:1], *arguments, **options)  # type: ignore[arg-type]
        kept.append(options["store"])  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(crafting, "run_ensemble", killed)
    with pytest.raises(KeyboardInterrupt):
        craft_all(TARGETS, IMAGES, SETTINGS, tmp_path / "killed", "models")
    assert kept[0].is_file()
    monkeypatch.setattr(crafting, "run_ensemble", run_ensemble)
    resumed = craft_all(TARGETS, IMAGES, SETTINGS, tmp_path / "killed", "models")
    for name, made in whole.items():
        assert_same(resumed[name], made)
    assert not list((tmp_path / "killed").glob("*.half.npz"))


@pytest.mark.parametrize("share", [None, 0.25])
def test_crafted_images_come_back_from_their_file(tmp_path: Path, share: float | None) -> None:
    made = Crafted(CODES, np.arange(8) % 2 == 0, np.array([-np.inf, *range(7)]), share, 7)
    save_crafted(tmp_path / "x.npz", made)
    assert_same(load_crafted(tmp_path / "x.npz", CODES, 0), made)


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    save_crafted(path, Crafted(CODES, np.zeros(8, bool), np.zeros(8), None, 7))
    with pytest.raises(SpikeguardError, match="delete it"):
        load_crafted(path, np.concatenate([CODES, CODES[:1]]), 0)
    with pytest.raises(SpikeguardError, match="beyond the budget of 3 codes"):
        load_crafted(path, CODES ^ np.uint8(4), 3)
    np.savez(path, codes=CODES)
    with pytest.raises(SpikeguardError, match="delete it"):
        load_crafted(path, CODES, 0)
    path.write_bytes(b"PK")
    with pytest.raises(SpikeguardError, match="not a readable"):
        load_crafted(path, CODES, 0)
