"""The points of a sweep: the float SNN at a number of time steps, and integer networks made of it.

Both are attacked alike, and judged on the same images: a point's worst case, of either model, is over the clean
images, those crafted on the float SNN and those crafted on the integer network. What is crafted on the float SNN
depends on T alone, so all points of one T share it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hardware.emulator import run_emulator
from hardware.errors import RuleViolations
from hardware.network import IntegerNetwork
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import FloatTarget, IntegerTarget
from pipeline.config import FidelityConfig
from pipeline.fidelity.arms import CLEAN, WORST_CASE, arm_rows, hits_on, overall, worst_case
from pipeline.fidelity.crafting import ATTACKS, Images
from pipeline.fidelity.resources import energy_row, placement_row
from pipeline.models.spiking import SpikingNetwork
from pipeline.statistics import wilson_interval

ON_FLOAT, ON_INTEGER = (attack for attack in ATTACKS if attack.is_ensemble)
"""The configured ensemble, crafted on either model."""
ACTIVITY_IMAGES = 100
"""Clean images on which spikes and operations are counted."""


@dataclass(frozen=True)
class Share:
    """An accuracy.

    Attributes:
        right, samples: images classified correctly, and all.
        accuracy: as a fraction.
        interval: two-sided, 95 %.
    """

    right: int
    samples: int
    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Reference:
    """The float SNN at one number of time steps.

    Attributes:
        steps: T.
        finetuned: whether its weights were trained for this T.
        clean: accuracy on images as they are.
        worst_case: accuracy on those and the images crafted on itself; no deployed model has a say in it.
        seconds: that it took; 0 until it is finished.
    """

    steps: int
    finetuned: bool
    clean: Share
    worst_case: Share
    seconds: float = 0.0


@dataclass(frozen=True)
class Point:
    """An integer network beside the float SNN of the same number of time steps.

    Attributes:
        bits: of every weight.
        steps: T.
        finetuned: whether the weights were trained for this T.
        arms: rows of :func:`~pipeline.fidelity.arms.arm_row`, the clean one and the worst case first; the reference
            is the float SNN. Empty if there is no such network.
        placement, energy: rows of :mod:`pipeline.fidelity.resources`, or None.
        violations: the rules of the target that refuse it; empty if it was judged.
        seconds: that it took; 0 until it is finished.
    """

    bits: int
    steps: int
    finetuned: bool
    arms: tuple[dict[str, Any], ...]
    placement: dict[str, Any] | None
    energy: dict[str, Any] | None
    violations: tuple[dict[str, str], ...]
    seconds: float = 0.0

    @property
    def clean(self) -> Mapping[str, Any]:
        """The row of clean images."""
        return self._arm(CLEAN)

    @property
    def worst_case(self) -> Mapping[str, Any]:
        """The row of the worst case."""
        return self._arm(WORST_CASE)

    @property
    def verdict(self) -> str:
        """Whether it is non-inferior to the float SNN, clean and in the worst case; "refused" if there is none."""
        return overall([arm["verdict"] for arm in self.arms if arm["deciding"]]) if self.arms else "refused"

    def _arm(self, name: str) -> Mapping[str, Any]:
        return next(arm for arm in self.arms if arm["name"] == name)


def at_steps(network: SpikingNetwork, steps: int) -> SpikingNetwork:
    """A copy that runs for ``steps``, with the same weights and thresholds."""
    changed = copy.deepcopy(network)
    changed.steps = steps
    return changed


def measure_reference(target: FloatTarget, finetuned: bool, images: Images, on_float: Crafted) -> Reference:
    """Judge the float SNN on the images, and on what was crafted on it."""
    hits = hits_on(target, images, {ON_FLOAT.name: on_float})
    clean, worst = (_share(int(right.sum()), len(right)) for right in (hits[CLEAN], worst_case(list(hits.values()))))
    return Reference(target.network.steps, finetuned, clean, worst)


def _share(right: int, samples: int) -> Share:
    return Share(right, samples, right / samples, wilson_interval(right, samples))


def measure_point(
    reference: FloatTarget,
    network: IntegerNetwork,
    finetuned: bool,
    images: Images,
    crafted: tuple[Crafted, Crafted],
    settings: FidelityConfig,
    bits: int,
) -> Point:
    """Judge both models on the images and on what was crafted on either, and count what the integer network does.

    Args:
        reference: the float SNN of the same T.
        network: the integer network.
        finetuned: whether for this T.
        images: of the test split.
        crafted: on the float SNN, and on the integer network.
        settings: margin, confidence, and what the attacks were made with.
        bits: of every weight.
    """
    by_attack = dict(zip((ON_FLOAT.name, ON_INTEGER.name), crafted, strict=True))
    target = IntegerTarget(network)
    of_float, of_integer = (hits_on(model, images, by_attack) for model in (reference, target))
    arms = arm_rows(of_float, of_integer, settings, (ON_FLOAT, ON_INTEGER))
    sample = images.codes[:ACTIVITY_IMAGES]
    energy = energy_row(network, sample, run_emulator(network, sample, record="spikes"))
    return Point(bits, network.steps, finetuned, tuple(arms), placement_row(network), energy, ())


def refused_point(bits: int, steps: int, finetuned: bool, refusal: RuleViolations) -> Point:
    """A point that no network stands for, and why."""
    violations = tuple(asdict(violation) for violation in refusal.violations)
    return Point(bits, steps, finetuned, (), None, None, violations)
