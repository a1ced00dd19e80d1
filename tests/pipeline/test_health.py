from __future__ import annotations

import numpy as np
import torch

from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import GradientTarget
from pipeline.fidelity.crafting import ATTACKS, Images
from pipeline.fidelity.health import SOURCES, examine, health_row
from tests.pipeline.attack_samples import PlainTarget
from tests.pipeline.samples import random_images

SAMPLES = 40
CODES = random_images((1, 4, 4), SAMPLES)


class Linear(torch.nn.Module):
    """A linear model of the pixels, which any attack with a true gradient takes down; ``masked`` hides it."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
        self.masked = masked

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = images.flatten(1) @ self.weight.T
        return logits.detach() if self.masked else logits


def crafted(fooled: int, zero: float | None = 0.0) -> Crafted:
    return Crafted(np.zeros_like(CODES), np.arange(SAMPLES) < fooled, np.zeros(SAMPLES), zero, 1)


def test_every_alarm_is_asked_about_both_models_and_those_that_are_raised_are_named() -> None:
    targets: dict[str, GradientTarget] = {
        "float": PlainTarget(Linear(), "healthy"),
        "integer": PlainTarget(Linear(masked=True), "masked"),
    }
    images = Images(CODES, targets["float"].logits(CODES).argmax(1), 3)
    made = {
        "transfer": crafted(30),
        "black box, float": crafted(20, zero=None),
        "adaptive": crafted(0, zero=1.0),
        "black box": crafted(20, zero=None),
    }
    row = health_row(examine(targets, made, images, 25))
    assert len(row["checks"]) == 12
    assert len({check["name"] for check in row["checks"]}) == 12
    assert row["alarms"] == [check["name"] for check in row["checks"] if not check["passed"]]
    assert {name.split(",")[0] for name in row["alarms"]} == {
        "zero gradients",
        "black box beats white box",
        "accuracy at epsilon 0.5",
    }
    assert all(name.endswith(("integer", "masked")) for name in row["alarms"])
    assert all(check["explanation"] and check["limit"] for check in row["checks"])


def test_the_alarms_read_the_attacks_on_the_model_they_are_about() -> None:
    targets_of = {attack.name: attack.targets for attack in ATTACKS}
    for model, sources in SOURCES.items():
        assert [targets_of[source] for source in sources] == [(model,), (model,)]
