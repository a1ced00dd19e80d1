"""Robust fine-tuning of a converted SNN: weights, biases, batch-norm affine and thresholds together."""

from __future__ import annotations

from pipeline.checkpoints import Epoch
from pipeline.compute import CPU, Compute
from pipeline.data import Dataset
from pipeline.models.spiking import SpikingNetwork
from pipeline.objectives import Objective
from pipeline.training import Augment, Records, Schedule, fit, unchanged


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
    decay_thresholds: bool = False,
    augment: Augment = unchanged,
    compute: Compute = CPU,
    records: Records | None = None,
) -> list[Epoch]:
    """Fine-tune in place, thresholds clamped after every step. The epoch that is best on the validation split is kept.

    Args:
        network: a converted SNN, or a fresh one.
        decay_thresholds: whether weight decay pulls at thresholds too, as in the paper (Özdenizci & Legenstein, TMLR
            2024). On short schedules a decayed threshold drifts to its clamp and adds spikes.

    The other arguments, and what is returned, are those of :func:`~pipeline.training.fit`.
    """
    thresholds = [neuron.threshold for _, neuron in network.neurons()]
    held = {id(threshold) for threshold in thresholds}
    others = [parameter for parameter in network.parameters() if id(parameter) not in held]
    of_thresholds: dict[str, object] = {"params": thresholds}
    if not decay_thresholds:
        of_thresholds["weight_decay"] = 0.0

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
        parameter_groups=[{"params": others}, of_thresholds],
        after_step=clamp,
        augment=augment,
        compute=compute,
        records=records,
    )
