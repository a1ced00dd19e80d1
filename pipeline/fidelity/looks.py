"""Attacks image after image until the deciding arms are decided, or all images were attacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.attacks.search import Crafted, join
from pipeline.attacks.targets import Target
from pipeline.config import FidelityConfig
from pipeline.fidelity.arms import Hits, arm_rows, hits_on, overall
from pipeline.fidelity.crafting import Images
from pipeline.sequential import confidences, look_sizes


@dataclass(frozen=True)
class Look:
    """The images that a check came to its conclusion on.

    Attributes:
        images: the first of those it was given.
        crafted: what the attacks made of them.
        hits: which of them each target gets right, as they are and by attack.
        arms: rows of the report; bounds are of the confidence that this look may use.
        row: ``sequential`` of ``report.json``: images at each planned look, the number of the look that decided, and
            the confidence of its bounds; None if one look was planned.
    """

    images: Images
    crafted: dict[str, Crafted]
    hits: dict[str, dict[str, Hits]]
    arms: list[dict[str, Any]]
    row: dict[str, Any] | None


def look_until_decided(
    targets: Mapping[str, Target],
    images: Images,
    settings: FidelityConfig,
    craft: Callable[[Images], dict[str, Crafted]],
    compared_with: str,
) -> Look:
    """Craft and judge block after block; stop where both deciding arms pass or one fails.

    Args:
        targets: "float" and "integer".
        images: in random order.
        settings: how often is looked, and the confidence of all looks together.
        craft: every attack, on a block of images.
        compared_with: what labels of arms call the reference.
    """
    sizes = look_sizes(len(images.labels), settings.looks)
    levels, first, seen = confidences(sizes, settings.confidence), 0, images.part(0, 0)
    crafted: dict[str, Crafted] = {}
    hits: dict[str, dict[str, Hits]] = {}
    for number, (size, level) in enumerate(zip(sizes, levels, strict=True), 1):
        made = craft(images.part(first, size))
        crafted = {name: join([crafted[name], new], new.codes) if crafted else new for name, new in made.items()}
        first, seen = size, images.part(0, size)
        hits = {name: hits_on(target, seen, crafted) for name, target in targets.items()}
        used = settings.model_copy(update={"confidence": level})
        arms = arm_rows(hits["float"], hits["integer"], used, compared_with=compared_with)
        row = {"planned": sizes, "looks": number, "confidence": level}
        if overall([arm["verdict"] for arm in arms if arm["deciding"]]) != "inconclusive":
            break
    return Look(seen, crafted, hits, arms, row if len(sizes) > 1 else None)
