from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hardware.errors import SpikeguardError
from pipeline.attacks.gradient import Crafted
from pipeline.attacks.targets import FloatTarget, GradientTarget, IntegerTarget, correct
from pipeline.config import FidelityConfig
from pipeline.fidelity import crafting
from pipeline.fidelity.crafting import ATTACKS, Images, craft_all, load_crafted, save_crafted
from pipeline.quantization import quantize
from tests.pipeline.samples import random_images, spiking_network

SETTINGS = FidelityConfig(epsilon=0.1, pgd_steps=2, square_queries=6)
CODES = random_images((1, 8, 8), 8, 2)


@pytest.fixture(scope="module")
def targets() -> dict[str, GradientTarget]:
    network = spiking_network("conv", seed=1)
    return {"float": FloatTarget(network), "integer": IntegerTarget(quantize(network, CODES, 8, {}).network)}


@pytest.fixture
def images(targets: dict[str, GradientTarget]) -> Images:
    return Images(CODES, targets["integer"].logits(CODES).argmax(1), 5)


def same(left: Crafted, right: Crafted) -> bool:
    return bool(
        np.array_equal(left.codes, right.codes)
        and np.array_equal(left.fooled, right.fooled)
        and left.zero_gradients == right.zero_gradients
        and left.queries == right.queries
    )


def test_every_attack_of_the_table_keeps_its_budget(
    targets: dict[str, GradientTarget], images: Images, tmp_path: Path
) -> None:
    crafted = craft_all(targets, images, SETTINGS, tmp_path, "models")
    assert list(crafted) == [attack.name for attack in ATTACKS]
    for made in crafted.values():
        assert np.abs(made.codes.astype(int) - CODES).max() <= 25
    assert {attack.target for attack in ATTACKS} == {"float", "integer"}
    for attack in ATTACKS:
        if attack.name != "noise":
            judged = ~correct(targets[attack.target], crafted[attack.name].codes, images.labels)
            assert np.array_equal(crafted[attack.name].fooled, judged), attack.name


def test_finished_attacks_are_not_run_again(
    targets: dict[str, GradientTarget], images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = craft_all(targets, images, SETTINGS, tmp_path, "models")

    def fail(*_: object, **__: object) -> Crafted:
        raise AssertionError("an attack ran again")

    monkeypatch.setattr(crafting, "pgd_ensemble", fail)
    monkeypatch.setattr(crafting, "square", fail)
    again = craft_all(targets, images, SETTINGS, tmp_path, "models")
    assert all(same(again[name], made) for name, made in first.items())
    more_steps, larger = (SETTINGS.model_copy(update=update) for update in ({"pgd_steps": 3}, {"epsilon": 0.2}))
    other_seed, other_labels = Images(CODES, images.labels, 6), Images(CODES, (images.labels + 1) % 4, 5)
    for shown, settings, models in (
        (images, SETTINGS, "other models"),
        (images, more_steps, "models"),
        (images, larger, "models"),
        (other_seed, SETTINGS, "models"),
        (other_labels, SETTINGS, "models"),
    ):
        with pytest.raises(AssertionError, match="ran again"):
            craft_all(targets, shown, settings, tmp_path, models)


@pytest.mark.parametrize("share", [None, 0.25])
def test_crafted_images_come_back_from_their_file(tmp_path: Path, share: float | None) -> None:
    made = Crafted(CODES, np.arange(8) % 2 == 0, share, 7)
    save_crafted(tmp_path / "x.npz", made)
    assert same(load_crafted(tmp_path / "x.npz", CODES.shape), made)


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    save_crafted(path, Crafted(CODES, np.zeros(8, bool), None, 7))
    with pytest.raises(SpikeguardError, match="delete it"):
        load_crafted(path, (9, 1, 8, 8))
    np.savez(path, codes=CODES)
    with pytest.raises(SpikeguardError, match="delete it"):
        load_crafted(path, CODES.shape)
    path.write_bytes(b"PK")
    with pytest.raises(SpikeguardError, match="not a readable"):
        load_crafted(path, CODES.shape)
