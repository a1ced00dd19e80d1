from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hardware.surrogates import ENSEMBLE
from pipeline.checkpoints import Epoch
from pipeline.compute import Compute
from pipeline.conversion import calibrate, convert
from pipeline.finetuning import finetune
from pipeline.models.spiking import SpikingNetwork
from pipeline.neurons import MIN_THRESHOLD
from pipeline.objectives import natural, robust_finetuning
from pipeline.training import Schedule, fit, images_of
from tests.pipeline.samples import easy_data, rate_network

TRAIN, VALIDATION = easy_data(96, seed=1), easy_data(32, seed=2)
State = dict[str, Tensor]
_CONVERTED: list[SpikingNetwork] = []


def converted() -> SpikingNetwork:
    """A network trained a little, as an SNN with calibrated thresholds."""
    if not _CONVERTED:
        network = rate_network()
        groups: list[dict[str, object]] = [{"params": list(network.parameters())}]
        settings = Schedule(6, 16, 0.1, 5e-4)
        fit(network, natural(), TRAIN, VALIDATION, settings, epsilon=0.0, seed=0, label="", parameter_groups=groups)
        spiking = convert(network, 4)
        batches = list(images_of(TRAIN).split(32))
        calibrate(spiking, batches, percentile=99.7, calibration_steps=20, scale=0.3)
        _CONVERTED.append(spiking)
    return copy.deepcopy(_CONVERTED[0])


def finetuned(learning_rate: float = 0.01, **options: Any) -> tuple[SpikingNetwork, list[Epoch]]:
    network = converted()
    settings: dict[str, Any] = {"objective": robust_finetuning(0.05, 2.0), "epsilon": 0.05, "seed": 0, **options}
    schedule = Schedule(2, 16, learning_rate, 5e-4, settings.pop("averaging", 0.0))
    history = finetune(network, settings.pop("objective"), TRAIN, VALIDATION, schedule, label="test", **settings)
    return network, history


def same(left: State, right: State) -> bool:
    return all(torch.equal(left[key], right[key]) for key in left)


def test_finetuning_learns_weights_biases_affine_and_thresholds() -> None:
    before, (after, history) = converted().state_dict(), finetuned()
    assert history[-1].clean > 0.9
    changed = {key for key, value in after.state_dict().items() if not torch.equal(value, before[key])}
    for parameter in (
        "conv1.weight",
        "conv2.bias",
        "linear2.bias",
        "batch_norm1.weight",
        "batch_norm2.running_mean",
        "neurons1.threshold",
        "neurons3.threshold",
    ):
        assert f"layers.{parameter}" in changed
    assert "layers.normalize1.mean" not in changed


def test_finetuning_is_repeatable() -> None:
    assert same(finetuned()[0].state_dict(), finetuned()[0].state_dict())
    assert not same(finetuned()[0].state_dict(), finetuned(seed=1)[0].state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"objective": robust_finetuning(0.05, 2.0, attack_steps=3)},
        {"objective": robust_finetuning(0.05, 2.0, surrogates=ENSEMBLE)},
        {"averaging": 0.9},
        {"compute": Compute(torch.device("cpu"), "bfloat16")},
    ],
    ids=["stronger attack", "ensemble", "average", "bfloat16"],
)
def test_each_option_learns_something_else_and_repeatably(options: dict[str, Any]) -> None:
    network, history = finetuned(**options)
    again, history_again = finetuned(**options)
    assert history[-1].clean > 0.9
    assert history == history_again
    assert same(network.state_dict(), again.state_dict())
    assert not same(network.state_dict(), finetuned()[0].state_dict())


@pytest.mark.parametrize("averaging", [0.0, 0.5])
def test_thresholds_are_clamped_after_every_step(averaging: float) -> None:
    """Under a loss that pulls them down without end; an average of clamped thresholds is above the floor too."""

    def downwards(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        named = model.named_parameters()
        return sum((value for name, value in named if name.endswith("threshold")), start=torch.zeros(()))

    network, _ = finetuned(learning_rate=1.0, objective=downwards, averaging=averaging)
    for _, neuron in network.neurons():
        assert neuron.threshold.item() == pytest.approx(MIN_THRESHOLD, rel=0.01 if averaging else 1e-6)


@pytest.mark.parametrize("decay_thresholds", [False, True])
def test_thresholds_decay_only_if_asked_to(decay_thresholds: bool) -> None:
    """With a loss that no parameter moves, weights shrink by decay."""
    network = converted()
    before = copy.deepcopy(network.state_dict())

    def nothing(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        return 0.0 * sum((parameter.sum() for parameter in model.parameters()), start=torch.zeros(()))

    strong = Schedule(1, 16, 0.1, 0.5)
    finetune(
        network,
        nothing,
        TRAIN,
        VALIDATION,
        strong,
        epsilon=0.0,
        seed=0,
        label="test",
        decay_thresholds=decay_thresholds,
    )
    after = network.state_dict()
    shrunk = float(after["layers.conv1.weight"].norm()) / float(before["layers.conv1.weight"].norm())
    assert shrunk < 0.95
    for key in (key for key in after if key.endswith("threshold")):
        expected = max(float(before[key]) * (shrunk if decay_thresholds else 1), MIN_THRESHOLD)
        assert float(after[key]) == pytest.approx(expected, rel=1e-5)
