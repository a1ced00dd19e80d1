"""The training loop shared by the ANN stage and the fine-tuning of the SNN."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor, nn

from hardware.errors import SpikeguardError
from hardware.files import write_bytes
from pipeline.checkpoints import Epoch, TrainingState, restore_checkpoint, save_checkpoint
from pipeline.compute import CPU, Compute, deterministic
from pipeline.data import Dataset
from pipeline.inner_attacks import pgd_images
from pipeline.objectives import Objective
from pipeline.progress import console, track

MOMENTUM = 0.9
VALIDATION_BATCH = 256
ATTACKED_VALIDATION_IMAGES = 1000
VALIDATION_ATTACK_STEPS = 10

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Training images ``(samples, ...)`` in [0, 1] to images of the same shape and range."""


@dataclass(frozen=True)
class Schedule:
    """SGD with momentum 0.9, the learning rate a cosine to 0, step by step.

    Attributes:
        averaging: d; if above 0, an exponential average of weights and batch-norm statistics is validated and kept
            instead of the weights themselves: ``average <- d_n average + (1 - d_n) weights`` after step n, with
            ``d_n = min(d, (1 + n) / (10 + n))`` so that it soon forgets where training began.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    averaging: float = 0.0


@dataclass(frozen=True)
class Records:
    """What a training leaves behind while it goes on.

    Attributes:
        checkpoint: safetensors file, written after each epoch; training goes on from it if it has the same key.
        log: CSV file with a row for each epoch.
        key: stands for everything the training depends on.
    """

    checkpoint: Path
    log: Path
    key: str


def unchanged(images: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """No augmentation."""
    return images


def pixels(codes: Tensor) -> Tensor:
    """8-bit pixel codes as float32 in [0, 1]."""
    return codes.float() / 255


def images_of(data: Dataset) -> Tensor:
    """All images as float32 in [0, 1], four times the memory of their codes."""
    return pixels(torch.from_numpy(data.codes))


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
    augment: Augment = unchanged,
    compute: Compute = CPU,
    records: Records | None = None,
) -> list[Epoch]:
    """Train in place; at the end the model holds the weights of the epoch that was best on the validation split.

    Best is the highest sum of clean and robust validation accuracy (see :func:`validate`), the later epoch on a tie;
    at epsilon 0 the highest clean one.

    Every epoch draws its random numbers from seeds of its own, so the same arguments give the same weights bit for
    bit, on the same device with as many threads, whether or not training was killed and went on from its checkpoint.

    Args:
        model: its parameters stay the same objects; it is on the CPU afterwards.
        objective: loss of a mini-batch.
        train: kept as pixel codes, and converted batch by batch; what does not fill a batch sits out an epoch.
        validation: for the choice of the epoch only.
        schedule: of the optimiser.
        epsilon: l-infinity radius of the attack on validation images, in pixel units.
        seed: of order, noise, augmentation and dropout.
        label: for the progress bar.
        parameter_groups: as torch.optim.SGD takes them.
        after_step: done after every step of the optimiser.
        augment: done to every training batch.
        compute: device and precision.
        records: checkpoint and log, if any.

    Returns:
        One entry per epoch.
    """
    model.to(compute.device)
    optimiser = torch.optim.SGD(
        parameter_groups, lr=schedule.learning_rate, momentum=MOMENTUM, weight_decay=schedule.weight_decay
    )
    state = TrainingState(model, optimiser, copy.deepcopy(model) if schedule.averaging else None)
    if records is not None:
        _resume(state, records, label)
    codes, labels = (torch.from_numpy(array).to(compute.device) for array in (train.codes, train.labels))
    batches = max(len(train) // schedule.batch_size, 1)
    steps = schedule.epochs * batches
    learner = compute.cast(model)

    with deterministic(), track(label, steps, per=batches, done=len(state.history) * batches) as advance:
        for number in range(len(state.history), schedule.epochs):
            began = time.perf_counter()
            generator = _seed_epoch(seed, number)
            order = torch.randperm(len(train), generator=generator)[: batches * schedule.batch_size]
            total = torch.zeros((), dtype=torch.float64, device=compute.device)
            for index, batch in enumerate(order.to(compute.device).split(schedule.batch_size)):
                step = number * batches + index
                _set_learning_rate(optimiser, schedule.learning_rate * cosine(step, steps))
                images = augment(pixels(codes[batch]), generator)
                loss = objective(learner, images, labels[batch], generator)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                after_step()
                if state.average is not None:
                    update_average(state.average, model, averaging_decay(schedule.averaging, step))
                total += loss.detach()
                if index + 1 < batches:  # the last one counts once the epoch is validated
                    advance(partial(_note, total, index + 1, state.history))
            clean, robust = validate(state.judged, validation, epsilon, seed, compute.device)
            rate = schedule.learning_rate * cosine(number * batches, steps)
            state.note(Epoch(float(total) / batches, clean, robust, rate, time.perf_counter() - began))
            advance(_note(total, batches, state.history))
            if records is not None:
                save_checkpoint(records.checkpoint, records.key, state)
                write_log(records.log, state.history)
    if state.history:
        model.load_state_dict(state.best)
    model.eval().cpu()
    return state.history


def cosine(step: int, steps: int) -> float:
    """Factor on the learning rate: from 1 at the first step towards 0 after the last."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def averaging_decay(decay: float, step: int) -> float:
    """What the running average keeps of itself after a step, counted from 0: ``min(d, (1 + n) / (10 + n))``."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move parameters and batch-norm statistics of ``average`` towards the model's; counters are copied."""
    for held, current in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if held.is_floating_point():
            held.lerp_(current, 1 - decay)
        else:
            held.copy_(current)


def validate(
    model: nn.Module, data: Dataset, epsilon: float, seed: int, device: torch.device = CPU.device
) -> tuple[float, float]:
    """Clean accuracy, and accuracy under PGD of 10 steps on the first 1,000 images, in float32; for selection only.

    At epsilon 0 the second is the first. The attack is weak by design: it ranks epochs, and proves nothing.
    """
    model.eval()
    clean = _accuracy(model, _batches(data, device))
    if epsilon == 0:
        return clean, clean
    generator = torch.Generator().manual_seed(seed)
    attacked = Dataset(data.codes[:ATTACKED_VALIDATION_IMAGES], data.labels[:ATTACKED_VALIDATION_IMAGES])
    adversarial = (
        (pgd_images(model, images, labels, epsilon, VALIDATION_ATTACK_STEPS, generator), labels)
        for images, labels in _batches(attacked, device)
    )
    return clean, _accuracy(model, adversarial)


def write_log(path: Path, history: list[Epoch]) -> None:
    """Write the epochs as CSV, with their seconds, atomically."""
    header = "epoch,loss,clean,robust,learning_rate,seconds"
    rows = [
        f"{n},{e.loss:.6f},{e.clean:.6f},{e.robust:.6f},{e.learning_rate:.6g},{e.seconds:.3f}"
        for n, e in enumerate(history, 1)
    ]
    write_bytes(path, "\n".join([header, *rows, ""]).encode())


def _resume(state: TrainingState, records: Records, label: str) -> None:
    """Go on from the checkpoint; one that cannot be used is named, and training starts over."""
    path = records.checkpoint
    if not path.is_file():
        return
    try:
        restore_checkpoint(path, records.key, state)
    except SpikeguardError as error:
        why = escape(f"{path} is not used: {error}")
        console.print(f"[yellow]{escape(label)} starts over:[/yellow] {why}", highlight=False)
        return
    write_log(records.log, state.history)
    console.print(f"[dim]{escape(label)} goes on after epoch {len(state.history)}[/dim]", highlight=False)


def _seed_epoch(seed: int, number: int) -> torch.Generator:
    """Seed torch (dropout) and return a CPU generator for all else, both from the run's seed and the epoch alone."""
    of_torch, of_generator = np.random.SeedSequence([seed, number]).generate_state(2, np.uint64)
    torch.manual_seed(int(of_torch))
    return torch.Generator().manual_seed(int(of_generator))


def _set_learning_rate(optimiser: torch.optim.SGD, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def _batches(data: Dataset, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in [0, 1] and labels, in order."""
    for first in range(0, len(data), VALIDATION_BATCH):
        part = slice(first, first + VALIDATION_BATCH)
        codes, labels = torch.from_numpy(data.codes[part]), torch.from_numpy(data.labels[part])
        yield pixels(codes.to(device)), labels.to(device)


def _accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of images whose largest logit is the label's."""
    right = seen = 0
    for images, labels in batches:
        with torch.no_grad():
            right += int((model(images).argmax(1) == labels).sum())
        seen += len(labels)
    return right / seen


def _note(total_loss: Tensor, batches: int, history: list[Epoch]) -> str:
    accuracies = f" clean {history[-1].clean:.0%} robust {history[-1].robust:.0%}" if history else ""
    return f"loss {float(total_loss) / batches:.2f}{accuracies}"
