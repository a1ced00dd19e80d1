"""The arms of a check: the same images judged by both models, as rows of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import Target, correct
from pipeline.config import FidelityConfig
from pipeline.fidelity.crafting import ATTACKS, Attack, Images
from pipeline.statistics import (
    PairedOutcome,
    Verdict,
    judge,
    mcnemar,
    pair,
    samples_to_decide,
    tango_bound,
    wilson_interval,
)

Hits = NDArray[np.bool_]
CLEAN, WORST_CASE = "clean", "worst case"


@dataclass(frozen=True)
class Arm:
    """One kind of images.

    Attributes:
        attack: what made the images.
        epsilon: l-infinity radius in pixel units; 0 for clean images.
        deciding: whether the verdict hangs on it.
    """

    name: str
    attack: str
    description: str
    epsilon: float
    deciding: bool
    outcome: PairedOutcome


def worst_case(hits: Sequence[Hits]) -> Hits:
    """Images a model gets right in every one of the arms."""
    right: Hits = np.logical_and.reduce(hits)
    return right


def hits_on(target: Target, images: Images, crafted: Mapping[str, Crafted]) -> dict[str, Hits]:
    """Which images one model gets right: "clean", and by attack the crafted ones."""
    return {
        CLEAN: correct(target, images.codes, images.labels),
        **{name: correct(target, made.codes, images.labels) for name, made in crafted.items()},
    }


def arm_rows(
    reference: Mapping[str, Hits],
    deployed: Mapping[str, Hits],
    settings: FidelityConfig,
    attacks: Sequence[Attack] = ATTACKS,
    compared_with: str = "the float SNN",
) -> list[dict[str, Any]]:
    """The deciding arms, clean and worst case, then one arm per attack.

    Args:
        reference, deployed: what each model gets right, see :func:`hits_on`.
        settings: margin, confidence, and what the attacks were made with.
        attacks: whose images both were judged on.
        compared_with: what labels call the reference.
    """
    counted = [CLEAN, *(attack.name for attack in attacks if attack.in_worst_case)]
    arms = [
        make_arm(CLEAN, "none", "images as they are", 0.0, True, (reference[CLEAN], deployed[CLEAN])),
        make_arm(
            WORST_CASE,
            "union of the arms",
            "right on the clean image and on every image crafted on either model",
            settings.epsilon,
            True,
            (worst_case([reference[name] for name in counted]), worst_case([deployed[name] for name in counted])),
        ),
        *(
            make_arm(
                attack.name,
                attack.label.format(**settings.model_dump(), reference=compared_with),
                attack.description,
                settings.epsilon,
                False,
                (reference[attack.name], deployed[attack.name]),
            )
            for attack in attacks
        ),
    ]
    return [arm_row(arm, settings.margin, settings.confidence) for arm in arms]


def arm_row(arm: Arm, margin: float, confidence: float) -> dict[str, Any]:
    """An arm as a row of ``report.json``; differences are deployed minus reference accuracy, as fractions."""
    outcome = arm.outcome
    row: dict[str, Any] = {
        "name": arm.name,
        "attack": arm.attack,
        "description": arm.description,
        "epsilon": arm.epsilon,
        "deciding": arm.deciding,
        "samples": outcome.samples,
        "reference_accuracy": outcome.reference_right / outcome.samples,
        "reference_interval": list(wilson_interval(outcome.reference_right, outcome.samples)),
        "deployed_accuracy": outcome.deployed_right / outcome.samples,
        "deployed_interval": list(wilson_interval(outcome.deployed_right, outcome.samples)),
        "difference": outcome.difference,
        "lower_bound": tango_bound(outcome, confidence, "lower"),
        "interval": [
            tango_bound(outcome, (1 + confidence) / 2, "lower"),
            tango_bound(outcome, (1 + confidence) / 2, "upper"),
        ],
        "discordant": [outcome.only_reference, outcome.only_deployed],
        "mcnemar_p": mcnemar(outcome),
        "verdict": judge(outcome, margin, confidence) if arm.deciding else None,
        "samples_to_decide": None,
    }
    if row["verdict"] == "inconclusive":
        row["samples_to_decide"] = samples_to_decide(outcome, margin, confidence)
    return row


def overall(verdicts: list[Verdict]) -> Verdict:
    """Pass if every deciding arm passes, fail if any fails."""
    if "fail" in verdicts:
        return "fail"
    return "pass" if all(verdict == "pass" for verdict in verdicts) else "inconclusive"


def make_arm(name: str, attack: str, description: str, epsilon: float, deciding: bool, hits: tuple[Hits, Hits]) -> Arm:
    """An arm from which images the reference and the deployed model got right."""
    return Arm(name, attack, description, epsilon, deciding, pair(*hits))
