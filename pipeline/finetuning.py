"""Robust fine-tuning of a converted SNN: weights, biases, batch-norm affine and thresholds together."""

from __future__ import annotations

from pipeline.data import Dataset
from pipeline.models.spiking import SpikingNetwork
from pipeline.objectives import Objective
from pipeline.training import Epoch, Schedule, fit


def finetune(
    network: SpikingNetwork,
    objective: Objective,
    train: Dataset,
    validation: Dataset,
    schedule: Schedule,
    *,
    epsilon: float,
    seed: int,
    label: str = "fine-tune SNN",
) -> list[Epoch]:
    """Fine-tune in place, thresholds excluded from weight decay (a decayed threshold drifts to its clamp and adds
    spikes) and clamped after every step. The epoch that is best on the validation split is kept.
    """
    thresholds = [neuron.threshold for _, neuron in network.neurons()]
    held = {id(threshold) for threshold in thresholds}
    others = [parameter for parameter in network.parameters() if id(parameter) not in held]

    def clamp() -> None:
        for _, neuron in network.neurons():
            neuron.clamp_threshold()

    return fit(
        network,
        objective,
        train,
        validation,
        schedule,
        epsilon=epsilon,
        seed=seed,
        label=label,
        parameter_groups=[{"params": others}, {"params": thresholds, "weight_decay": 0.0}],
        after_step=clamp,
    )
