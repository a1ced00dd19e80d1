"""Gradient health of a check: every alarm on both models, as rows of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.attacks.alarms import (
    Alarm,
    answers_change,
    black_box_stronger,
    clean_image_returned,
    huge_budget_survived,
    more_steps_weaker,
    zero_gradients,
)
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import GradientTarget
from pipeline.fidelity.crafting import Images

ALARM_IMAGES = 200
"""Images for the alarms that need attacks of their own."""
SOURCES = {"float": ("transfer", "black box, float"), "integer": ("adaptive", "black box")}


def examine(
    targets: Mapping[str, GradientTarget], crafted: Mapping[str, Crafted], images: Images, budget: int
) -> list[Alarm]:
    """All alarms on both models."""
    codes, labels = images.codes[:ALARM_IMAGES], images.labels[:ALARM_IMAGES]
    alarms = []
    for key, (white, black) in SOURCES.items():
        model = targets[key]
        alarms += [
            zero_gradients(model.name, crafted[white]),
            clean_image_returned(model.name, images.codes, crafted[white]),
            black_box_stronger(model.name, crafted[white], crafted[black]),
            more_steps_weaker(model, codes, labels, budget=budget, seed=images.seed),
            huge_budget_survived(model, codes, labels, seed=images.seed),
            answers_change(model, codes),
        ]
    return alarms


def health_row(alarms: list[Alarm]) -> dict[str, Any]:
    """The alarms as ``gradient_health`` of ``report.json``."""
    return {
        "alarms": [alarm.name for alarm in alarms if alarm.raised],
        "checks": [
            {
                "name": alarm.name,
                "value": round(alarm.value, 6),
                "limit": alarm.limit,
                "passed": not alarm.raised,
                "explanation": alarm.explanation,
            }
            for alarm in alarms
        ],
    }
