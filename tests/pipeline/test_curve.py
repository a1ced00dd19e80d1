"""Robustness over the budget, and who is fooled by whose images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.attacks.ensemble import WARM, Member
from pipeline.attacks.targets import FloatTarget, GradientTarget, budget_of
from pipeline.config import ConfigError, FidelityConfig, load_config
from pipeline.fidelity import crafting
from pipeline.fidelity.arms import arm_rows, hits_on
from pipeline.fidelity.crafting import Images
from pipeline.fidelity.curve import curve_rows
from pipeline.fidelity.shards import craft_all
from pipeline.fidelity.transfer import at_bits, transfer_row
from tests.pipeline.attack_samples import target
from tests.pipeline.samples import random_images

SETTINGS = FidelityConfig(epsilon=0.1, square_queries=6, curve=(0.3, 0.02))
TARGETS: dict[str, GradientTarget] = {"float": target("float"), "integer": target("integer")}
CODES = random_images((1, 8, 8), 16, 2)
IMAGES = Images(CODES, TARGETS["integer"].logits(CODES).argmax(1), 5)


@pytest.fixture(autouse=True)
def _short_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crafting, "PRESETS", {"quick": (Member(WARM, "APGD", 3),)})
    monkeypatch.setattr(crafting, "DISAGREEMENT_STEPS", 2)


def test_the_curve_starts_at_clean_images_passes_the_verdict_and_never_rises(tmp_path: Path) -> None:
    crafted = craft_all(TARGETS, IMAGES, SETTINGS, tmp_path, "models")
    hits = {name: hits_on(model, IMAGES, crafted) for name, model in TARGETS.items()}
    rows = curve_rows(TARGETS, hits, IMAGES, SETTINGS, tmp_path, "models")
    assert [row["epsilon"] for row in rows] == [0.0, 0.02, 0.1, 0.3]
    assert [row["deciding"] for row in rows] == [False, False, True, False]
    for model in ("reference", "deployed"):
        accuracies = [row[f"{model}_accuracy"] for row in rows]
        assert accuracies == sorted(accuracies, reverse=True)
        assert accuracies[0] > accuracies[-1]
        clean, worst = arm_rows(hits["float"], hits["integer"], SETTINGS)[:2]
        assert accuracies[0] == clean[f"{model}_accuracy"]
        assert accuracies[2] <= worst[f"{model}_accuracy"]
    light = [row["attack"] for row in rows if not row["deciding"] and row["epsilon"]]
    assert all("APGD 20" in attack for attack in light)
    files = {path.name for path in tmp_path.iterdir()}
    curve_rows(TARGETS, hits, IMAGES, SETTINGS, tmp_path, "models")
    assert {path.name for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("wrong", ["curve=[0.1, 0.1]", "curve=[0]", "curve=[2]", "transfer_bits=[9]"])
def test_impossible_points_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="fidelity"):
        load_config("digits", (f"fidelity.{wrong}",))


def test_each_models_images_are_judged_on_every_model(tmp_path: Path) -> None:
    reference = target("float")
    assert isinstance(reference, FloatTarget)
    settings = SETTINGS.model_copy(update={"transfer_bits": (3, 2)})
    everyone = {**TARGETS, **at_bits(reference.network, CODES, settings.transfer_bits)}
    crafted = craft_all(TARGETS, IMAGES, settings, tmp_path, "models")
    matrix = transfer_row(everyone, crafted, IMAGES, settings, tmp_path, "models")
    assert matrix["models"] == ["float", "integer", "3 bits", "2 bits"]
    assert [row["crafted_on"] for row in matrix["rows"]] == ["clean images", *matrix["models"]]
    judged = {row["crafted_on"]: row["accuracies"] for row in matrix["rows"]}
    assert judged["clean images"]["integer"] == 1.0
    for model in matrix["models"]:
        assert judged[model][model] <= judged["clean images"][model]
    right = TARGETS["float"].logits(crafted["adaptive"].codes).argmax(1) == IMAGES.labels
    assert judged["integer"]["float"] == right.mean()
    assert np.abs(crafted["adaptive"].codes.astype(int) - CODES).max() <= budget_of(settings.epsilon)
