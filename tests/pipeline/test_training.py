from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import training
from pipeline.checkpoints import Epoch
from pipeline.compute import Compute
from pipeline.data import Dataset
from pipeline.data.augmentation import Augmentation
from pipeline.inner_attacks import pgd_images
from pipeline.models.spiking import RateNetwork
from pipeline.objectives import natural, pgd_adversarial_training
from pipeline.training import Records, Schedule, averaging_decay, fit, images_of, pixels, update_average, validate
from tests.pipeline.samples import easy_data, rate_network

TRAIN, VALIDATION = easy_data(96, seed=1), easy_data(32, seed=2)
State = dict[str, Tensor]


def schedule(epochs: int = 6, learning_rate: float = 0.1, averaging: float = 0.0) -> Schedule:
    return Schedule(epochs, 16, learning_rate, 5e-4, averaging)


def trained(seed: int = 0, name: str = "conv", **options: Any) -> tuple[RateNetwork, list[Epoch]]:
    network = rate_network(name)
    settings: dict[str, Any] = {"epsilon": 0.05, "seed": seed, "label": "test", **options}
    history = fit(
        network,
        settings.pop("objective", pgd_adversarial_training(0.05, 2)),
        settings.pop("train", TRAIN),
        settings.pop("validation", VALIDATION),
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
    assert all(epoch.seconds > 0 for epoch in history)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, history = trained()
    torch.manual_seed(99)
    again, history_again = trained()
    other, _ = trained(seed=1)
    assert same(first.state_dict(), again.state_dict())
    assert history == history_again
    assert not same(first.state_dict(), other.state_dict())


def test_every_epoch_has_other_random_numbers_and_they_follow_from_its_number_alone() -> None:
    class Noted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, images: Tensor) -> Tensor:
            return self.weight * images.flatten(1)[:, :4]

    def epochs(extra: int) -> list[tuple[float, ...]]:
        drawn: list[tuple[float, ...]] = []

        def objective(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            drawn.append((float(torch.rand(())), float(torch.rand((), generator=generator)), float(images[0, 0, 0, 0])))
            torch.rand(extra)
            torch.rand(extra, generator=generator)
            return F.cross_entropy(model(images), labels)

        network = Noted()
        groups: list[dict[str, object]] = [{"params": [network.weight]}]
        one_batch = Schedule(4, 96, 0.1, 0.0)
        fit(network, objective, TRAIN, VALIDATION, one_batch, epsilon=0, seed=3, label="", parameter_groups=groups)
        return drawn

    first = epochs(0)
    assert len(set(first)) == len({numbers[0] for numbers in first}) == len({numbers[1] for numbers in first}) == 4
    assert epochs(7) == first


def planted_scores(monkeypatch: pytest.MonkeyPatch, scores: tuple[float, ...]) -> list[State]:
    """Validation says what is planted; returns the states it was asked about."""
    seen: list[State] = []

    def planted(model: nn.Module, *_: object) -> tuple[float, float]:
        seen.append(copy.deepcopy(model.state_dict()))
        return scores[len(seen) - 1], 0.0

    monkeypatch.setattr(training, "validate", planted)
    return seen


@pytest.mark.parametrize(("scores", "best"), [((0.4, 0.9, 0.5, 0.6), 1), ((0.4, 0.9, 0.9, 0.6), 2)])
@pytest.mark.parametrize("averaging", [0.0, 0.9])
def test_the_best_epoch_on_the_validation_split_is_kept(
    monkeypatch: pytest.MonkeyPatch, scores: tuple[float, ...], best: int, averaging: float
) -> None:
    seen = planted_scores(monkeypatch, scores)
    network, history = trained(schedule=schedule(4, averaging=averaging))
    assert len(history) == len(seen) == 4
    assert same(network.state_dict(), seen[best])
    assert not same(seen[best], seen[3])
    assert not network.training


def test_selection_looks_at_validation_images_only(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[Dataset] = []

    def watched(_model: nn.Module, data: Dataset, *_: object) -> tuple[float, float]:
        looked_at.append(data)
        return 0.5, 0.5

    monkeypatch.setattr(training, "validate", watched)
    trained()
    assert len(looked_at) == 6
    assert all(data is VALIDATION for data in looked_at)


def test_without_a_budget_robust_accuracy_is_the_clean_one() -> None:
    network, _ = trained()
    clean, robust = validate(network, VALIDATION, 0.0, 0)
    assert clean == robust == validate(network, VALIDATION, 0.3, 0)[0]
    assert validate(network, VALIDATION, 0.3, 0)[1] < clean


class Counting(nn.Module):
    """Notes how many images it is asked about, and whether a gradient was wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = rate_network()
        self.batches: list[tuple[bool, int]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append((images.requires_grad, len(images)))
        logits: Tensor = self.inner(images)
        return logits


def test_validation_goes_in_batches_and_attacks_a_thousand_images_at_most() -> None:
    probe, data = Counting(), easy_data(1300)
    clean, robust = validate(probe, data, 0.05, 0)
    asked = [size for wanted, size in probe.batches if not wanted]
    assert asked == [256] * 5 + [20] + [256, 256, 256, 232]
    assert [size for wanted, size in probe.batches if wanted] == [256] * 30 + [232] * 10
    images, labels = images_of(data), torch.from_numpy(data.labels)
    assert clean == pytest.approx(float((probe.inner(images).argmax(1) == labels).float().mean()))
    generator = torch.Generator().manual_seed(0)
    right = 0
    for part in torch.arange(1000).split(256):
        made = pgd_images(probe.inner, images[part], labels[part], 0.05, 10, generator)
        right += int((probe.inner(made).argmax(1) == labels[part]).sum())
    assert robust == right / 1000


def test_the_learning_rate_is_a_cosine_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD, *arguments: Any, **options: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        assert self.param_groups[0]["momentum"] == 0.9
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    _, history = trained(schedule=schedule(2))
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * n / 12)) for n in range(12)])
    assert [epoch.learning_rate for epoch in history] == [rates[0], rates[6]]


def test_fewer_images_than_a_batch_still_train() -> None:
    before = rate_network().state_dict()
    few = easy_data(8)
    network, history = trained(objective=natural(), train=few, validation=few, schedule=schedule(1))
    assert not same(network.state_dict(), before)
    assert math.isfinite(history[0].loss)


def test_batches_are_pixel_codes_over_255_and_each_image_comes_once() -> None:
    seen: list[Tensor] = []

    def objective(model: nn.Module, images: Tensor, labels: Tensor, _generator: torch.Generator) -> Tensor:
        seen.append(torch.cat([images.flatten(1), labels[:, None]], 1))
        return F.cross_entropy(model(images), labels)

    trained(objective=objective, schedule=schedule(1))
    given = np.concatenate([TRAIN.codes.reshape(96, -1) / np.float32(255), TRAIN.labels[:, None]], 1)
    assert all(batch.dtype == torch.float32 and len(batch) == 16 for batch in seen)
    assert sorted(map(tuple, torch.cat(seen).tolist())) == sorted(map(tuple, given.astype(np.float32).tolist()))


def test_images_are_augmented_before_the_objective_sees_them() -> None:
    seen: list[Tensor] = []

    def objective(model: nn.Module, images: Tensor, labels: Tensor, _generator: torch.Generator) -> Tensor:
        seen.append(images)
        return F.cross_entropy(model(images), labels)

    def inverted(images: Tensor, generator: torch.Generator) -> Tensor:
        return 1 - images + 0 * torch.rand(1, generator=generator)

    trained(objective=objective, schedule=schedule(1), augment=inverted)
    torch.testing.assert_close(torch.cat(seen).mean(), (1 - pixels(torch.from_numpy(TRAIN.codes))).mean())
    plain, _ = trained(schedule=schedule(2))
    shifted, _ = trained(schedule=schedule(2), augment=Augmentation(crop_padding=1, flip=True, cutout=2))
    again, _ = trained(schedule=schedule(2), augment=Augmentation(crop_padding=1, flip=True, cutout=2))
    assert not same(plain.state_dict(), shifted.state_dict())
    assert same(shifted.state_dict(), again.state_dict())


def test_the_average_covers_weights_and_batch_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Followed step by step beside the training, which must not notice that it is averaged."""
    seen = planted_scores(monkeypatch, (0.1, 0.2))
    plain: list[State] = []
    network = rate_network()

    def note() -> None:
        plain.append(copy.deepcopy(network.state_dict()))

    groups: list[dict[str, object]] = [{"params": list(network.parameters())}]
    expected = copy.deepcopy(network.state_dict())
    fit(
        network,
        natural(),
        TRAIN,
        VALIDATION,
        schedule(2, averaging=0.5),
        epsilon=0.0,
        seed=0,
        label="",
        parameter_groups=groups,
        after_step=note,
    )
    assert len(plain) == 12
    for n, state in enumerate(plain):
        keep = min(0.5, (1 + n) / (10 + n))
        for key, value in state.items():
            moved = keep * expected[key] + (1 - keep) * value if value.is_floating_point() else value
            expected[key] = moved
    assert seen[1].keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(seen[1][key], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(network.state_dict()[key], seen[1][key], rtol=0, atol=0)
    assert not torch.equal(seen[1]["layers.batch_norm1.running_mean"], plain[-1]["layers.batch_norm1.running_mean"])


def test_averaging_changes_nothing_about_the_training_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [[epoch.loss for epoch in trained(schedule=schedule(2, averaging=d))[1]] for d in (0.0, 0.9)]
    assert losses[0] == losses[1]
    monkeypatch.setattr(training, "averaging_decay", lambda _decay, _step: 0.0)
    assert same(trained()[0].state_dict(), trained(schedule=schedule(averaging=0.9))[0].state_dict())


def test_the_average_moves_slowly_only_after_it_has_found_its_place() -> None:
    assert averaging_decay(0.999, 0) == 0.1
    assert averaging_decay(0.999, 90) == pytest.approx(0.91)
    assert averaging_decay(0.999, 10**6) == 0.999
    average, model = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    model(torch.randn(8, 2))
    update_average(average, model, 0.75)
    torch.testing.assert_close(average.running_mean, 0.25 * model.running_mean)
    assert average.num_batches_tracked == model.num_batches_tracked == 1


def test_in_bfloat16_it_trains_nearly_alike_and_leaves_float32_weights() -> None:
    compute = Compute(torch.device("cpu"), "bfloat16")
    network, history = trained(compute=compute)
    _, exact = trained()
    assert all(value.dtype != torch.bfloat16 for value in network.state_dict().values())
    assert [epoch.loss for epoch in history] != [epoch.loss for epoch in exact]
    assert [epoch.loss for epoch in history] == pytest.approx([epoch.loss for epoch in exact], rel=0.1)
    again, _ = trained(compute=compute)
    assert same(network.state_dict(), again.state_dict())


def test_the_log_grows_with_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(tmp_path / "c" / "train.safetensors", tmp_path / "logs" / "train.csv", "key")
    lengths: list[int] = []
    judge = training.validate

    def watched(*arguments: Any) -> tuple[float, float]:
        lengths.append(len(records.log.read_text().splitlines()) if records.log.is_file() else 0)
        return judge(*arguments)

    monkeypatch.setattr(training, "validate", watched)
    _, history = trained(schedule=schedule(3), records=records)
    assert lengths == [0, 2, 3]
    rows = list(csv.DictReader(records.log.read_text().splitlines()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    for row, epoch in zip(rows, history, strict=True):
        for column in ("loss", "clean", "robust", "learning_rate", "seconds"):
            assert float(row[column]) == pytest.approx(getattr(epoch, column), abs=1e-3)
