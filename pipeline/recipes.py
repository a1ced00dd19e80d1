"""From the configuration to what the training loop takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hardware.surrogates import ENSEMBLE
from pipeline.checkpoints import Epoch
from pipeline.compute import Compute, choose_device
from pipeline.config import ComputeConfig, Config, FinetuningConfig, TrainingConfig
from pipeline.data import Dataset
from pipeline.data.augmentation import Augmentation
from pipeline.models.spiking import SpikingNetwork
from pipeline.objectives import Objective, mart, natural, pgd_adversarial_training, robust_finetuning, trades
from pipeline.quantization import Quantization
from pipeline.quantization_aware import finetune_quantized, remeasured
from pipeline.training import Records, Schedule


def training_objective(settings: TrainingConfig) -> Objective:
    """What the ANN is trained with."""
    epsilon, steps = settings.epsilon, settings.attack_steps
    weight = {} if settings.beta is None else {"beta": settings.beta}
    match settings.objective:
        case "natural":
            return natural()
        case "pgd-at":
            return pgd_adversarial_training(epsilon, steps)
        case "trades":
            return trades(epsilon, steps, **weight)
        case "mart":
            return mart(epsilon, steps, **weight)


def finetuning_objective(settings: FinetuningConfig) -> Objective:
    """What the SNN is fine-tuned with."""
    return robust_finetuning(
        settings.epsilon,
        settings.beta,
        attack_steps=settings.attack_steps,
        surrogates=ENSEMBLE if settings.surrogates == "ensemble" else (),
    )


def schedule_of(settings: TrainingConfig | FinetuningConfig) -> Schedule:
    """How long, how fast."""
    return Schedule(
        settings.epochs, settings.batch_size, settings.learning_rate, settings.weight_decay, settings.averaging
    )


def grid_schedule_of(config: Config) -> Schedule:
    """The fine-tuning of integers: as that of the float SNN, but for its own length and learning rate."""
    settings = config.quantization
    return replace(schedule_of(config.finetuning), epochs=settings.epochs, learning_rate=settings.learning_rate)


def finetune_integers(
    config: Config,
    network: SpikingNetwork,
    quantization: Quantization,
    calibration: NDArray[np.uint8],
    train: Dataset,
    validation: Dataset,
    records: Records,
) -> tuple[Quantization, list[Epoch]]:
    """Let an integer network learn on, on its grid, as configured.

    Args:
        config: its section ``quantization`` says how long and how fast, ``finetuning`` all else.
        network: the float SNN; it is not changed.
        quantization: of it.
        calibration: uint8 ``(samples, *shape)`` images on which spikes are compared again.
        train, validation: as for :func:`~pipeline.training.fit`.
        records: checkpoint and log.
    """
    settings = config.finetuning
    deployed, history = finetune_quantized(
        network,
        quantization.network,
        finetuning_objective(settings),
        train,
        validation,
        grid_schedule_of(config),
        epsilon=settings.epsilon,
        seed=config.seed,
        augment=augmentation_of(settings),
        # Half precision does not hold the integers.
        compute=replace(compute_of(config.compute), precision="float32"),
        records=records,
    )
    return remeasured(network, quantization, deployed, calibration), history


def augmentation_of(settings: TrainingConfig | FinetuningConfig) -> Augmentation:
    """What is done to training images."""
    cutout = settings.cutout if isinstance(settings, TrainingConfig) else 0
    return Augmentation(settings.crop_padding, settings.flip, cutout)


def compute_of(settings: ComputeConfig) -> Compute:
    """Device and precision.

    Raises:
        SpikeguardError: if the device is not there.
    """
    return Compute(choose_device(settings.device), settings.precision)
