"""Alarms: signs that an attack failed because gradients were masked, not because the model is robust.

Each is a value with its limit (Carlini et al., arXiv 1902.06705).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hardware.surrogates import TRIANGLE
from pipeline.attacks.ensemble import Member, run_member
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import Codes, GradientTarget, Labels, Target, budget_of
from pipeline.statistics import mcnemar, pair

MAX_ZERO_GRADIENTS = 0.05
MAX_UNCHANGED = 0.05
HUGE_EPSILON, MAX_HUGE_ACCURACY, HUGE_STEPS = 0.5, 0.01, 20
FEW_STEPS, MANY_STEPS = 10, 40
MAX_P = 0.05


@dataclass(frozen=True)
class Alarm:
    """One sign.

    Attributes:
        name: of the sign and the model.
        value: what was measured.
        limit: what it must keep, in words.
        raised: whether it does not.
        explanation: what was measured, in words.
    """

    name: str
    value: float
    limit: str
    raised: bool
    explanation: str


def zero_gradients(model: str, crafted: Crafted) -> Alarm:
    """A zero gradient leaves the image where it started; a library would call that robust."""
    share = crafted.zero_gradients or 0.0
    return Alarm(
        f"zero gradients, {model}",
        share,
        f"at most {MAX_ZERO_GRADIENTS:.0%}",
        share > MAX_ZERO_GRADIENTS,
        "share of input gradients that were zero over the whole image",
    )


def clean_image_returned(model: str, clean: Codes, crafted: Crafted) -> Alarm:
    """An attack that tried hard and gives the clean image back did not try."""
    survivors = ~crafted.fooled
    unchanged = (crafted.codes == clean).reshape(len(clean), -1).all(1) & survivors
    share = float(unchanged.sum() / max(survivors.sum(), 1))
    return Alarm(
        f"clean image returned, {model}",
        share,
        f"at most {MAX_UNCHANGED:.0%}",
        share > MAX_UNCHANGED,
        "share of the images that were not fooled whose strongest version is the clean one",
    )


def black_box_stronger(model: str, white_box: Crafted, black_box: Crafted) -> Alarm:
    """An attack that only asks should not beat one that sees the gradients."""
    outcome = pair(~white_box.fooled, ~black_box.fooled)
    more = outcome.only_reference - outcome.only_deployed
    p = mcnemar(outcome)
    return Alarm(
        f"black box beats white box, {model}",
        more / max(outcome.samples, 1),
        f"not above 0 with p < {MAX_P} (here p = {p:.3f})",
        more > 0 and p < MAX_P,
        "images that Square fooled beyond the gradient ensemble, net, as a share",
    )


def more_steps_weaker(target: GradientTarget, codes: Codes, labels: Labels, *, budget: int, seed: int) -> Alarm:
    """More steps of the same attack may not fool significantly fewer images."""
    indices = np.arange(len(codes))
    few, many = (
        run_member(target, Member(TRIANGLE, steps=steps), codes, labels, indices, budget=budget, seed=seed).fooled
        for steps in (FEW_STEPS, MANY_STEPS)
    )
    outcome = pair(~few, ~many)
    lost = outcome.only_deployed - outcome.only_reference
    p = mcnemar(outcome)
    return Alarm(
        f"more steps are weaker, {target.name}",
        lost / max(outcome.samples, 1),
        f"not above 0 with p < {MAX_P} (here p = {p:.3f})",
        lost > 0 and p < MAX_P,
        f"images fooled by PGD of {FEW_STEPS} steps but not of {MANY_STEPS}, net, as a share of {len(codes)}",
    )


def huge_budget_survived(target: GradientTarget, codes: Codes, labels: Labels, *, seed: int) -> Alarm:
    """At half the pixel range any image can be turned into another; a model that stays right hides its gradients."""
    crafted = run_member(
        target,
        Member(TRIANGLE, steps=HUGE_STEPS),
        codes,
        labels,
        np.arange(len(codes)),
        budget=budget_of(HUGE_EPSILON),
        seed=seed,
    )
    accuracy = float(1 - crafted.fooled.mean())
    return Alarm(
        f"accuracy at epsilon {HUGE_EPSILON:g}, {target.name}",
        accuracy,
        f"at most {MAX_HUGE_ACCURACY:.0%}",
        accuracy > MAX_HUGE_ACCURACY,
        f"PGD of {HUGE_STEPS} steps on {len(codes)} images",
    )


def answers_change(target: Target, codes: Codes) -> Alarm:
    """The same question, asked again after another one, must get the same answer: no state, no chance."""
    first = target.logits(codes)
    target.logits(255 - codes)
    again = target.logits(codes)
    share = float((first != again).any(axis=1).mean())
    return Alarm(
        f"answers change, {target.name}",
        share,
        "0",
        share > 0,
        "share of images whose logits differ when they are asked for again; state carried over, or chance",
    )
