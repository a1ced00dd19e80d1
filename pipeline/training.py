"""The training loop shared by the ANN stage and the fine-tuning of the SNN."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data import Dataset
from pipeline.objectives import Objective, pgd_images
from pipeline.progress import track


@dataclass(frozen=True)
class Schedule:
    """SGD with momentum 0.9 and a cosine to 0."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave: mean training loss, and accuracies on the validation split."""

    loss: float
    clean: float
    robust: float


def images_of(data: Dataset) -> Tensor:
    """Images as float32 in [0, 1]."""
    return torch.from_numpy(data.codes).float() / 255


def fit(
    model: nn.Module,
    objective: Objective,
    train: Dataset,
    validation: Dataset,
    schedule: Schedule,
    *,
    epsilon: float,
    seed: int,
    label: str,
    parameter_groups: Iterable[dict[str, object]],
    after_step: Callable[[], None] = lambda: None,
) -> list[Epoch]:
    """Train in place; at the end the model holds the weights of the epoch that was best on the validation split.

    Best is the highest sum of clean and robust (PGD, 10 steps at ``epsilon``) validation accuracy, the later epoch
    on a tie; at epsilon 0 the highest clean one.

    Returns:
        One entry per epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    optimiser = torch.optim.SGD(
        parameter_groups, lr=schedule.learning_rate, momentum=0.9, weight_decay=schedule.weight_decay
    )
    images, labels = images_of(train), torch.from_numpy(train.labels)
    batches = max(len(train) // schedule.batch_size, 1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, schedule.epochs * batches)
    history: list[Epoch] = []
    best_score, best_state = -1.0, copy.deepcopy(model.state_dict())
    with track(label, schedule.epochs) as advance:
        for _ in range(schedule.epochs):
            order = torch.randperm(len(images), generator=generator)
            total = 0.0
            for batch in order[: batches * schedule.batch_size].split(schedule.batch_size):
                model.train()
                loss = objective(model, images[batch], labels[batch], generator)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                cosine.step()
                after_step()
                total += loss.item()
            clean, robust = validate(model, validation, epsilon, seed)
            history.append(Epoch(total / batches, clean, robust))
            if clean + robust >= best_score:
                best_score, best_state = clean + robust, copy.deepcopy(model.state_dict())
            advance(f"loss {total / batches:.2f} clean {clean:.0%} robust {robust:.0%}")
    model.load_state_dict(best_state)
    model.eval()
    return history


def validate(model: nn.Module, data: Dataset, epsilon: float, seed: int) -> tuple[float, float]:
    """Clean accuracy, and accuracy under PGD of 10 steps (the clean one again at epsilon 0), for selection only."""
    model.eval()
    images, labels = images_of(data), torch.from_numpy(data.labels)
    clean = accuracy(model, images, labels)
    if epsilon == 0:
        return clean, clean
    generator = torch.Generator().manual_seed(seed)
    return clean, accuracy(model, pgd_images(model, images, labels, epsilon, 10, generator), labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is the label's."""
    return float((model(images).argmax(1) == labels).float().mean())


def cross_entropy_of(model: nn.Module, data: Dataset) -> float:
    """Mean cross-entropy on a data set."""
    with torch.no_grad():
        return float(F.cross_entropy(model(images_of(data)), torch.from_numpy(data.labels)))
