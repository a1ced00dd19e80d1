"""Robustness over the budget: both models at several epsilons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.attacks.ensemble import WARM, Member
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import GradientTarget, correct
from pipeline.config import FidelityConfig
from pipeline.fidelity.arms import CLEAN, Hits, arm_row, make_arm
from pipeline.fidelity.crafting import ATTACKS, Attack, Images, craft_ensemble
from pipeline.fidelity.shards import craft_all
from pipeline.fidelity.workers import Workers

LIGHT = (Member(WARM, "APGD", 20),)
"""A fraction of the deciding attack's effort, for it is run at every point."""
CURVE_ATTACKS: tuple[Attack, ...] = tuple(
    Attack(
        f"curve, {target}",
        (target,),
        LIGHT[0].name,
        "one light attack",
        partial(craft_ensemble, target=target),
        is_ensemble=True,
        own_members=LIGHT,
    )
    for target in ("float", "integer")
)


def curve_rows(
    targets: Mapping[str, GradientTarget],
    hits: Mapping[str, Mapping[str, Hits]],
    images: Images,
    settings: FidelityConfig,
    folder: Path,
    identity: str,
    workers: Workers | None = None,
) -> list[dict[str, Any]]:
    """Points of ``curve`` in ``report.json``, from no budget to the largest.

    A point is the accuracy on every image crafted within its budget, on either model: its own light attack's and those
    of all points before, the deciding attacks' among them where their budget is not larger. So a curve never rises.

    Args:
        targets: "float" and "integer".
        hits: by target, on the deciding arms' images.
        images: what is attacked.
        settings: ``curve`` says where, beside the deciding budget.
        folder, identity, workers: as for :func:`~pipeline.fidelity.shards.craft_all`.
    """
    counted = [attack.name for attack in ATTACKS if attack.in_worst_case]
    right = {name: hits[name][CLEAN] for name in ("float", "integer")}
    rows = [_point(0.0, "none", False, right, settings)]
    for epsilon in sorted({*settings.curve, settings.epsilon}):
        deciding = epsilon == settings.epsilon
        if deciding:
            added = {name: [hits[name][arm] for arm in counted] for name in right}
        else:
            made = _light_attack(targets, images, settings, epsilon, folder, identity, workers)
            added = {
                name: [correct(targets[name], crafted.codes, images.labels) for crafted in made.values()]
                for name in right
            }
        right = {name: np.logical_and.reduce([right[name], *added[name]]) for name in right}
        attack = "the deciding attacks" if deciding else f"{LIGHT[0].name}, on each model"
        rows.append(_point(epsilon, attack, deciding, right, settings))
    return rows


def _light_attack(
    targets: Mapping[str, GradientTarget],
    images: Images,
    settings: FidelityConfig,
    epsilon: float,
    folder: Path,
    identity: str,
    workers: Workers | None,
) -> Mapping[str, Crafted]:
    at = settings.model_copy(update={"epsilon": epsilon})
    return craft_all(targets, images, at, folder, identity, CURVE_ATTACKS, workers)


def _point(
    epsilon: float, attack: str, deciding: bool, right: Mapping[str, Hits], settings: FidelityConfig
) -> dict[str, Any]:
    arm = make_arm("curve", attack, "", epsilon, deciding, (right["float"], right["integer"]))
    row = arm_row(arm, settings.margin, settings.confidence)
    kept: Sequence[str] = (
        "epsilon", "attack", "deciding", "samples", "reference_accuracy", "reference_interval", "deployed_accuracy",
        "deployed_interval", "difference", "lower_bound", "interval", "discordant",
    )  # fmt: skip
    return {name: row[name] for name in kept}
