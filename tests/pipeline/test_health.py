from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hardware.surrogates import Surrogate
from pipeline.attacks.gradient import Crafted
from pipeline.attacks.targets import Codes, GradientTarget, Logits
from pipeline.fidelity.crafting import Images
from pipeline.fidelity.health import (
    MAX_ZERO_GRADIENTS,
    black_box_is_not_stronger,
    examine,
    gradients_are_not_zero,
    health_row,
    nothing_survives_a_huge_budget,
)
from tests.pipeline.samples import random_images


class Linear:
    """A linear model of the pixels, which any attack with a true gradient takes down; ``masked`` hides it."""

    def __init__(self, masked: bool = False, name: str = "linear") -> None:
        self.name = name
        self.weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
        self.masked = masked

    def forward(self, images: Tensor, surrogate: Surrogate) -> Tensor:  # noqa: ARG002
        logits = images.flatten(1) @ self.weight.T
        return logits.detach() + 0 * images.sum() if self.masked else logits

    def logits(self, codes: Codes) -> Logits:
        with torch.no_grad():
            return self.forward(torch.from_numpy(codes).float() / 255, Surrogate("triangle")).double().numpy()


def images(target: GradientTarget, samples: int = 40) -> Images:
    codes = random_images((1, 4, 4), samples)
    return Images(codes, target.logits(codes).argmax(1), 3)


def crafted(fooled: int, samples: int = 40, zero: float | None = 0.0) -> Crafted:
    return Crafted(np.zeros((samples, 1, 4, 4), np.uint8), np.arange(samples) < fooled, zero, 1)


@pytest.mark.parametrize(("share", "passed"), [(0.0, True), (MAX_ZERO_GRADIENTS, True), (0.06, False), (1.0, False)])
def test_zero_gradients_raise_the_alarm(share: float, passed: bool) -> None:
    check = gradients_are_not_zero("float", crafted(0, zero=share))
    assert check.passed is passed
    assert check.value == share


@pytest.mark.parametrize(
    ("white", "black", "passed"), [(30, 10, True), (10, 10, True), (10, 13, True), (10, 16, False), (0, 40, False)]
)
def test_a_black_box_that_is_significantly_stronger_raises_the_alarm(white: int, black: int, passed: bool) -> None:
    check = black_box_is_not_stronger("float", crafted(white), crafted(black, zero=None))
    assert check.passed is passed
    assert check.value == pytest.approx((black - white) / 40)


def test_a_model_with_true_gradients_falls_at_a_huge_budget() -> None:
    target = Linear()
    check = nothing_survives_a_huge_budget(target, images(target))
    assert check.passed
    assert check.value <= 0.01


def test_a_model_with_hidden_gradients_does_not_and_is_caught() -> None:
    target = Linear(masked=True)
    check = nothing_survives_a_huge_budget(target, images(target))
    assert not check.passed
    assert check.value > 0.3


def test_all_checks_run_on_both_models_and_alarms_are_named() -> None:
    healthy, masked = Linear(), Linear(masked=True, name="masked")
    made = {
        "transfer": crafted(30),
        "black box, float": crafted(20, zero=None),
        "adaptive": crafted(0, zero=1.0),
        "black box": crafted(20, zero=None),
    }
    row = health_row(examine({"float": healthy, "integer": masked}, made, images(healthy)))
    assert len(row["checks"]) == 6
    assert len({check["name"] for check in row["checks"]}) == 6
    failed = [check["name"] for check in row["checks"] if not check["passed"]]
    assert row["alarms"] == failed
    assert len(failed) == 3
    assert all(check["explanation"] and check["limit"] for check in row["checks"])
