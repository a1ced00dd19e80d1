from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import training
from pipeline.conversion import calibrate, convert
from pipeline.data import Dataset
from pipeline.finetuning import finetune
from pipeline.models.spiking import RateNetwork, SpikingNetwork
from pipeline.neurons import MIN_THRESHOLD
from pipeline.objectives import natural, pgd_adversarial_training, robust_finetuning
from pipeline.training import Epoch, Schedule, fit, images_of, validate
from tests.pipeline.samples import easy_data, rate_network

TRAIN, VALIDATION = easy_data(96, seed=1), easy_data(32, seed=2)
State = dict[str, Tensor]


def schedule(epochs: int = 6, learning_rate: float = 0.1) -> Schedule:
    return Schedule(epochs, 16, learning_rate, 5e-4)


def trained(seed: int = 0, **options: Any) -> tuple[RateNetwork, list[Epoch]]:
    network = rate_network()
    settings: dict[str, Any] = {"epsilon": 0.05, "seed": seed, "label": "test", **options}
    history = fit(
        network,
        pgd_adversarial_training(0.05, 2),
        TRAIN,
        VALIDATION,
        settings.pop("schedule", schedule()),
        parameter_groups=[{"params": list(network.parameters())}],
        **settings,
    )
    return network, history


def same(left: State, right: State) -> bool:
    return all(torch.equal(left[key], right[key]) for key in left)


def test_training_learns() -> None:
    _, history = trained(schedule=schedule(12))
    assert history[-1].loss < 0.7 * history[0].loss
    assert history[-1].clean > 0.9
    assert all(epoch.robust <= epoch.clean for epoch in history)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, history = trained()
    torch.manual_seed(99)
    again, history_again = trained()
    other, _ = trained(seed=1)
    assert same(first.state_dict(), again.state_dict())
    assert history == history_again
    assert not same(first.state_dict(), other.state_dict())


def test_the_best_epoch_on_the_validation_split_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are planted: the second of four epochs is best, and tied with the third in the second case."""
    for scores, best in (((0.4, 0.9, 0.5, 0.6), 1), ((0.4, 0.9, 0.9, 0.6), 2)):
        seen: list[State] = []

        def planted(
            model: nn.Module, *_: object, scores: tuple[float, ...] = scores, seen: list[State] = seen
        ) -> tuple[float, float]:
            seen.append(copy.deepcopy(model.state_dict()))
            return scores[len(seen) - 1], 0.0

        monkeypatch.setattr(training, "validate", planted)
        network, history = trained(schedule=schedule(4))
        assert len(history) == len(seen) == 4
        assert same(network.state_dict(), seen[best])
        assert not same(seen[best], seen[3])
        assert not network.training


def test_selection_looks_at_validation_images_only(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[Dataset] = []

    def watched(_model: nn.Module, data: Dataset, _epsilon: float, _seed: int) -> tuple[float, float]:
        looked_at.append(data)
        return 0.5, 0.5

    monkeypatch.setattr(training, "validate", watched)
    trained()
    assert all(data is VALIDATION for data in looked_at)


def test_without_a_budget_robust_accuracy_is_the_clean_one() -> None:
    network, _ = trained()
    clean, robust = validate(network, VALIDATION, 0.0, 0)
    assert clean == robust == validate(network, VALIDATION, 0.3, 0)[0]
    assert validate(network, VALIDATION, 0.3, 0)[1] < clean


def test_the_learning_rate_ends_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD, *arguments: Any, **options: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    trained(schedule=schedule(2))
    assert len(rates) == 2 * 6
    assert rates[0] == 0.1
    assert rates[6] == pytest.approx(0.05)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.004


def test_fewer_images_than_a_batch_still_train() -> None:
    network = rate_network()
    before = copy.deepcopy(network.state_dict())
    groups: list[dict[str, object]] = [{"params": list(network.parameters())}]
    few = easy_data(8)
    fit(network, natural(), few, few, schedule(1), epsilon=0.0, seed=0, label="few", parameter_groups=groups)
    assert not same(network.state_dict(), before)


def converted() -> SpikingNetwork:
    network, _ = trained()
    spiking = convert(network, 4)
    batches = list(images_of(TRAIN).split(32))
    calibrate(spiking, batches, percentile=99.7, calibration_steps=20, scale=0.3)
    return spiking


def finetuned(seed: int = 0, learning_rate: float = 0.01) -> tuple[SpikingNetwork, list[Epoch]]:
    network = converted()
    settings = schedule(2, learning_rate)
    history = finetune(
        network, robust_finetuning(0.05, 2.0), TRAIN, VALIDATION, settings, epsilon=0.05, seed=seed, label="test"
    )
    return network, history


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


def test_thresholds_stay_above_their_floor_whatever_the_step() -> None:
    network, _ = finetuned(learning_rate=2.0)
    assert all(neuron.threshold.item() >= MIN_THRESHOLD - 1e-9 for _, neuron in network.neurons())


def test_thresholds_do_not_decay() -> None:
    """With a loss that no parameter moves, weights shrink by decay and thresholds stay."""
    network = converted()
    before = copy.deepcopy(network.state_dict())

    def nothing(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        return 0.0 * sum((parameter.sum() for parameter in model.parameters()), start=torch.zeros(()))

    strong = Schedule(1, 16, 0.1, 0.5)
    finetune(network, nothing, TRAIN, VALIDATION, strong, epsilon=0.0, seed=0, label="test")
    after = network.state_dict()
    assert float(after["layers.conv1.weight"].norm()) < 0.95 * float(before["layers.conv1.weight"].norm())
    assert all(torch.equal(after[key], before[key]) for key in after if key.endswith("threshold"))
