"""Each alarm by itself, and a zoo of models that mask their gradients, each in its own way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hardware.surrogates import TRIANGLE, Surrogate
from pipeline.attacks.alarms import (
    MAX_UNCHANGED,
    MAX_ZERO_GRADIENTS,
    Alarm,
    answers_change,
    black_box_stronger,
    clean_image_returned,
    huge_budget_survived,
    more_steps_weaker,
    zero_gradients,
)
from pipeline.attacks.backward import Backward
from pipeline.attacks.black_box import square
from pipeline.attacks.ensemble import Member, run_ensemble
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import (
    Answer,
    Codes,
    FloatTarget,
    GradientTarget,
    Labels,
    Logits,
    Loss,
    ModuleOracle,
    Oracle,
    SpikingModule,
    to_images,
)
from tests.pipeline import float_models

BUDGET, SAMPLES, QUERIES = 40, 60, 250
CLEAN = np.full((40, 1, 4, 4), 9, np.uint8)


def crafted(fooled: int, *, zero: float | None = 0.0, unchanged: int = 0) -> Crafted:
    """The first ``fooled`` images fooled, the last ``unchanged`` as they were."""
    codes = CLEAN + 1
    codes[len(codes) - unchanged :] -= 1
    return Crafted(codes, np.arange(40) < fooled, np.zeros(40), zero, 1)


@pytest.mark.parametrize(
    ("share", "raised"), [(0.0, False), (MAX_ZERO_GRADIENTS, False), (0.06, True), (1.0, True), (None, False)]
)
def test_zero_gradients(share: float | None, raised: bool) -> None:
    alarm = zero_gradients("float", crafted(0, zero=share))
    assert alarm.raised is raised
    assert alarm.value == (share or 0.0)


@pytest.mark.parametrize(
    ("fooled", "unchanged", "share"),
    [(0, 0, 0.0), (0, 40, 1.0), (20, 1, 0.05), (20, 2, 0.1), (40, 40, 0.0)],
)
def test_the_clean_image_given_back_counts_among_those_that_were_not_fooled(
    fooled: int, unchanged: int, share: float
) -> None:
    alarm = clean_image_returned("float", CLEAN, crafted(fooled, unchanged=unchanged))
    assert alarm.value == pytest.approx(share)
    assert alarm.raised is (share > MAX_UNCHANGED)


@pytest.mark.parametrize(
    ("white", "black", "raised"), [(30, 10, False), (10, 10, False), (10, 13, False), (10, 16, True), (0, 40, True)]
)
def test_a_black_box_that_is_significantly_stronger(white: int, black: int, raised: bool) -> None:
    alarm = black_box_stronger("float", crafted(white), crafted(black, zero=None))
    assert alarm.raised is raised
    assert alarm.value == pytest.approx((black - white) / 40)


@dataclass
class ShortWalksOnly:
    """A target that is fooled by long strides only, so that PGD of fewer steps does better."""

    name: str = "short walks"
    shown: list[Tensor] = field(default_factory=list)

    def logits(self, codes: Codes) -> Logits:
        return np.tile([1.0, 0.0], (len(codes), 1))

    def oracle(self, backward: Backward, loss: Loss) -> Oracle:  # noqa: ARG002
        previous: list[Tensor] = []

        def answer(images: Tensor, labels: Tensor, differentiate: bool) -> Answer:  # noqa: ARG001
            stride = (images - previous[-1]).abs().flatten(1).amax(1) if previous else torch.zeros(len(images))
            previous.append(images)
            gradient = torch.ones_like(images) if differentiate else None
            return Answer(stride * 255 > 5, stride, stride, gradient)

        return answer


def test_more_steps_that_are_weaker() -> None:
    codes = np.full((40, 1, 4, 4), 100, np.uint8)
    alarm = more_steps_weaker(ShortWalksOnly(), codes, np.zeros(40, np.int64), budget=BUDGET, seed=0)
    assert alarm.raised
    assert alarm.value == 1.0
    few = more_steps_weaker(ShortWalksOnly(), codes[:4], np.zeros(4, np.int64), budget=BUDGET, seed=0)
    assert few.value == 1.0
    assert not few.raised, "four images prove nothing"


Forward = Callable[[SpikingModule, Tensor, Any], Tensor]


@dataclass
class Wrapped:
    """The healthy target, its forward pass spoiled."""

    healthy: FloatTarget
    forward: Forward
    name: str

    def __call__(self, images: Tensor, rules: Any) -> Tensor:
        return self.forward(self.healthy._module, images, rules)

    def proxy(self, images: Tensor, clipped: bool) -> Tensor:
        return self.healthy._module.proxy(images, clipped)

    def logits(self, codes: Codes) -> Logits:
        with torch.no_grad():
            return self(to_images(codes), TRIANGLE).double().numpy()

    def oracle(self, backward: Backward, loss: Loss) -> Oracle:
        return ModuleOracle(self, self.healthy._module.neuron_names, backward, loss)


def as_it_is(network: SpikingModule, images: Tensor, rules: Any) -> Tensor:
    return network(images, rules)


def zero_surrogate(network: SpikingModule, images: Tensor, rules: Any) -> Tensor:  # noqa: ARG001
    return network(images, Surrogate("rectangle", 1e-12))


def saturated_logits(network: SpikingModule, images: Tensor, rules: Any) -> Tensor:
    return 1e4 * network(images, rules)


def detached_input(network: SpikingModule, images: Tensor, rules: Any) -> Tensor:
    return network(images.detach(), rules)


def carried_state() -> Forward:
    """What is left in the membranes of one call changes the next."""
    left: list[Tensor] = [torch.zeros(())]

    def forward(network: SpikingModule, images: Tensor, rules: Any) -> Tensor:
        logits = network(images + 0.2 * left[0] * (1 - images), rules)
        left[0] = images.detach().mean()
        return logits

    return forward


def stochastic_output() -> Forward:
    generator = torch.Generator().manual_seed(0)

    def forward(network: SpikingModule, images: Tensor, rules: Any) -> Tensor:
        logits = network(images, rules)
        return logits + 0.2 * torch.randn(logits.shape, generator=generator)

    return forward


@cache
def healthy() -> FloatTarget:
    wrapper = float_models.spiking().module
    assert isinstance(wrapper, float_models.FixedSurrogate)
    return FloatTarget(wrapper.network)  # type: ignore[arg-type]


@cache
def images() -> tuple[Codes, Labels]:
    victim = float_models.spiking(SAMPLES)
    return (victim.images * 255).round().numpy().astype(np.uint8), victim.labels.numpy()


def alarms_of(target: GradientTarget) -> list[Alarm]:
    """All of them, on a small ensemble and a short Square."""
    codes, labels = images()
    indices = np.arange(len(labels))
    members = (Member(TRIANGLE, "FGSM", 1), Member(Surrogate("triangle", 2.0)))
    white = run_ensemble(target, members, codes, labels, indices, budget=BUDGET, seed=0).crafted
    black = square(target, codes, labels, indices, budget=BUDGET, queries=QUERIES, seed=0)
    return [
        zero_gradients(target.name, white),
        clean_image_returned(target.name, codes, white),
        black_box_stronger(target.name, white, black),
        more_steps_weaker(target, codes, labels, budget=BUDGET, seed=0),
        huge_budget_survived(target, codes, labels, seed=0),
        answers_change(target, codes),
    ]


def raised(alarms: Sequence[Alarm]) -> set[str]:
    return {alarm.name.split(",")[0] for alarm in alarms if alarm.raised}


def test_a_healthy_model_raises_none() -> None:
    alarms = alarms_of(Wrapped(healthy(), as_it_is, "healthy"))
    assert raised(alarms) == set(), alarms
    assert len({alarm.name for alarm in alarms}) == len(alarms) == 6
    assert all(alarm.name.endswith("healthy") and alarm.limit and alarm.explanation for alarm in alarms)


ZOO: dict[str, tuple[Callable[[], Forward], set[str]]] = {
    "zero surrogate": (
        lambda: zero_surrogate,
        {"zero gradients", "black box beats white box", "accuracy at epsilon 0.5"},
    ),
    "saturated logits": (lambda: saturated_logits, {"zero gradients", "accuracy at epsilon 0.5"}),
    "detached input": (
        lambda: detached_input,
        {"zero gradients", "black box beats white box", "accuracy at epsilon 0.5"},
    ),
    "carried state": (carried_state, {"answers change"}),
    "stochastic output": (stochastic_output, {"answers change"}),
}


@pytest.mark.parametrize("animal", ZOO)
def test_every_way_to_mask_gradients_raises_its_alarm(animal: str) -> None:
    forward, expected = ZOO[animal]
    found = raised(alarms_of(Wrapped(healthy(), forward(), animal)))
    assert expected <= found


@pytest.mark.parametrize("animal", ["zero surrogate", "detached input"])
def test_one_signed_step_without_gradients_gives_the_clean_image_back(animal: str) -> None:
    codes, labels = images()
    model = Wrapped(healthy(), ZOO[animal][0](), animal)
    made = run_ensemble(
        model, [Member(TRIANGLE, "FGSM", 1)], codes, labels, np.arange(SAMPLES), budget=BUDGET, seed=0
    ).crafted
    alarm = clean_image_returned(animal, codes, made)
    assert alarm.raised
    assert alarm.value == 1.0
