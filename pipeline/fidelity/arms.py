"""The arms of a check: the same images judged by both models, as rows of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
