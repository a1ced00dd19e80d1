from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from hardware.errors import SpikeguardError
from hardware.surrogates import ENSEMBLE
from pipeline.config import ConfigError, FinetuningConfig, TrainingConfig, validate_config
from pipeline.data.augmentation import Augmentation
from pipeline.objectives import Objective, mart, natural, pgd_adversarial_training, robust_finetuning, trades
from pipeline.recipes import (
    augmentation_of,
    compute_of,
    finetuning_objective,
    grid_schedule_of,
    schedule_of,
    training_objective,
)
from pipeline.training import Schedule
from tests.pipeline.samples import easy_data, rate_network, spiking_network

DATA = easy_data(8)
IMAGES, LABELS = torch.from_numpy(DATA.codes).float() / 255, torch.from_numpy(DATA.labels)


def value(objective: Objective, network: nn.Module) -> float:
    return objective(network, IMAGES, LABELS, torch.Generator().manual_seed(0)).item()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"objective": "natural"}, natural()),
        ({}, pgd_adversarial_training(0.1, 10)),
        ({"attack_steps": 3, "epsilon": 0.3}, pgd_adversarial_training(0.3, 3)),
        ({"objective": "trades"}, trades(0.1, 10, 6.0)),
        ({"objective": "trades", "beta": 1.0}, trades(0.1, 10, 1.0)),
        ({"objective": "mart"}, mart(0.1, 10, 4.0)),
        ({"objective": "mart", "beta": 0.0, "attack_steps": 2}, mart(0.1, 2, 0.0)),
    ],
)
def test_the_ann_learns_with_what_is_configured(settings: dict[str, Any], expected: Objective) -> None:
    configured = training_objective(TrainingConfig(**settings))
    assert value(configured, rate_network()) == value(expected, rate_network())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, robust_finetuning(0.1, 2.0)),
        ({"epsilon": 0.4, "beta": 8.0, "attack_steps": 3}, robust_finetuning(0.4, 8.0, attack_steps=3)),
        ({"epsilon": 0.4, "surrogates": "ensemble"}, robust_finetuning(0.4, 2.0, surrogates=ENSEMBLE)),
    ],
)
def test_the_snn_is_finetuned_with_what_is_configured(settings: dict[str, Any], expected: Objective) -> None:
    configured = finetuning_objective(FinetuningConfig(**settings))
    assert value(configured, spiking_network()) == value(expected, spiking_network())


def test_schedule_augmentation_and_compute_are_what_is_configured() -> None:
    config = validate_config(
        {
            "compute": {"device": "cpu", "precision": "bfloat16"},
            "training": {"epochs": 3, "learning_rate": 0.2, "crop_padding": 4, "flip": True, "cutout": 8},
            "finetuning": {"batch_size": 5, "weight_decay": 0.25, "averaging": 0.99, "crop_padding": 2, "flip": True},
        },
        "test",
    )
    assert schedule_of(config.training) == Schedule(3, 64, 0.2, 5e-4, 0.0)
    assert schedule_of(config.finetuning) == Schedule(10, 5, 0.01, 0.25, 0.99)
    assert augmentation_of(config.training) == Augmentation(4, True, 8)
    assert augmentation_of(config.finetuning) == Augmentation(2, True, 0)
    assert compute_of(config.compute).precision == "bfloat16"
    assert compute_of(config.compute).device == torch.device("cpu")


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpikeguardError, match="CUDA"):
        compute_of(validate_config({"compute": {"device": "cuda"}}, "test").compute)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"training": {"beta": 6.0}}, "pgd-at has none"),
        ({"training": {"objective": "trades", "beta": -1.0}}, "training.beta"),
        ({"training": {"averaging": 1.0}}, "training.averaging"),
        ({"training": {"cutout": -1}}, "training.cutout"),
        ({"finetuning": {"cutout": 8}}, "finetuning.cutout"),
        ({"finetuning": {"attack_steps": 0}}, "finetuning.attack_steps"),
        ({"finetuning": {"surrogates": "all"}}, "finetuning.surrogates"),
        ({"compute": {"device": "gpu"}}, "compute.device"),
        ({"compute": {"precision": "float16"}}, "compute.precision"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        validate_config(settings, "test")


def test_integers_are_finetuned_as_the_float_network_but_for_length_and_rate() -> None:
    settings = {"finetuning": {"averaging": 0.9, "epochs": 7}, "quantization": {"epochs": 2, "learning_rate": 0.5}}
    config = validate_config(settings, "test")
    assert grid_schedule_of(config) == replace(schedule_of(config.finetuning), epochs=2, learning_rate=0.5)
