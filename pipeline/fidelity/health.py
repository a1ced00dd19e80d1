"""Gradient health: signs that an attack failed because gradients were masked, not because the model is robust."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hardware.surrogates import TRIANGLE
from pipeline.attacks.gradient import Crafted, pgd
from pipeline.attacks.targets import GradientTarget, budget_of
from pipeline.fidelity.crafting import Images
from pipeline.fidelity.statistics import mcnemar, pair

MAX_ZERO_GRADIENTS = 0.05
HUGE_EPSILON, MAX_HUGE_ACCURACY, HUGE_STEPS, HUGE_SAMPLES = 0.5, 0.01, 20, 200
MAX_MCNEMAR_P = 0.05


@dataclass(frozen=True)
class HealthCheck:
    """One sign: its value, the limit it must keep, and what a breach means."""

    name: str
    value: float
    limit: str
    passed: bool
    explanation: str


def gradients_are_not_zero(model: str, crafted: Crafted) -> HealthCheck:
    """A zero gradient leaves the image as it started; a library would call that robust."""
    share = crafted.zero_gradients or 0.0
    return HealthCheck(
        f"zero gradients, {model}",
        share,
        f"at most {MAX_ZERO_GRADIENTS:.0%}",
        share <= MAX_ZERO_GRADIENTS,
        "share of attack steps whose whole input gradient was zero",
    )


def black_box_is_not_stronger(model: str, white_box: Crafted, black_box: Crafted) -> HealthCheck:
    """An attack that only asks should not beat one that sees the gradients."""
    outcome = pair(~white_box.fooled, ~black_box.fooled)
    more = outcome.only_reference - outcome.only_deployed
    p = mcnemar(outcome)
    return HealthCheck(
        f"black box beats white box, {model}",
        more / outcome.samples,
        f"not above 0 with p < {MAX_MCNEMAR_P} (here p = {p:.3f})",
        not (more > 0 and p < MAX_MCNEMAR_P),
        "images that Square fooled beyond the PGD ensemble, net, as a share",
    )


def nothing_survives_a_huge_budget(target: GradientTarget, images: Images) -> HealthCheck:
    """At half the pixel range any image can be turned into another; a model that stays right hides its gradients."""
    part = slice(0, HUGE_SAMPLES)
    crafted = pgd(
        target,
        images.codes[part],
        images.labels[part],
        images.indices[part],
        budget=budget_of(HUGE_EPSILON),
        steps=HUGE_STEPS,
        surrogate=TRIANGLE,
        seed=images.seed,
    )
    accuracy = float(1 - crafted.fooled.mean())
    return HealthCheck(
        f"accuracy at epsilon {HUGE_EPSILON:g}, {target.name}",
        accuracy,
        f"at most {MAX_HUGE_ACCURACY:.0%}",
        accuracy <= MAX_HUGE_ACCURACY,
        f"PGD of {HUGE_STEPS} steps on {len(crafted.codes)} images",
    )


def examine(targets: Mapping[str, GradientTarget], crafted: Mapping[str, Crafted], images: Images) -> list[HealthCheck]:
    """All checks on both models."""
    sources = {"float": ("transfer", "black box, float"), "integer": ("adaptive", "black box")}
    checks = []
    for model, (white, black) in sources.items():
        checks.append(gradients_are_not_zero(model, crafted[white]))
        checks.append(black_box_is_not_stronger(model, crafted[white], crafted[black]))
        checks.append(nothing_survives_a_huge_budget(targets[model], images))
    return checks


def health_row(checks: list[HealthCheck]) -> dict[str, Any]:
    """The checks as ``gradient_health`` of ``report.json``."""
    return {
        "alarms": [check.name for check in checks if not check.passed],
        "checks": [
            {
                "name": check.name,
                "value": float(np.round(check.value, 6)),
                "limit": check.limit,
                "passed": check.passed,
                "explanation": check.explanation,
            }
            for check in checks
        ],
    }
