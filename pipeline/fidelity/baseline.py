"""What robust training bought: a naturally trained SNN beside the robust one, under the same PGD crafted on each."""

from __future__ import annotations

from typing import Any

import numpy as np

from hardware.surrogates import TRIANGLE
from pipeline.attacks.ensemble import Member, run_member
from pipeline.attacks.targets import FloatTarget, budget_of, correct
from pipeline.fidelity.crafting import Images
from pipeline.models.spiking import SpikingNetwork
from pipeline.progress import track
from pipeline.statistics import wilson_interval

ATTACK = Member(TRIANGLE, "PGD", 50)


def compare_with_natural(
    natural: SpikingNetwork, robust: SpikingNetwork, images: Images, epsilon: float
) -> dict[str, Any]:
    """Accuracies of both, clean and under ``ATTACK``, as ``baseline`` of ``report.json``."""
    row: dict[str, Any] = {
        "description": f"Attack: {ATTACK.name}, crafted on each network.",
        "samples": len(images.labels),
    }
    with track("natural and robust", 2 * len(images.labels)) as advance:
        for prefix, network in (("", natural), ("robust_", robust)):
            target = FloatTarget(network)
            right = correct(target, images.codes, images.labels)
            found = run_member(
                target,
                ATTACK,
                images.codes,
                images.labels,
                images.indices,
                budget=budget_of(epsilon),
                seed=images.seed,
                advance=advance,
            )
            counts = {"clean": int(right.sum()), "attacked": int(np.sum(right & ~found.fooled))}
            for kind, count in counts.items():
                row[f"{prefix}{kind}_accuracy"] = count / len(images.labels)
                row[f"{prefix}{kind}_interval"] = list(wilson_interval(count, len(images.labels)))
    return row
