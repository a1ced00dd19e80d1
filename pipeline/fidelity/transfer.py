"""Images crafted on each of several models, judged on each: float, and integers of more and of fewer bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hardware.network import IntegerNetwork
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import Codes, GradientTarget, IntegerTarget, correct
from pipeline.config import FidelityConfig
from pipeline.fidelity.crafting import Attack, Images, craft_ensemble
from pipeline.fidelity.shards import craft_all
from pipeline.fidelity.workers import Workers
from pipeline.models.spiking import SpikingNetwork
from pipeline.quantization import quantize
from pipeline.statistics import wilson_interval

KNOWN = {"float": "transfer", "integer": "adaptive"}
"""Attacks of the check that are this table's too."""


def at_bits(network: SpikingNetwork, calibration: Codes, bits: Sequence[int]) -> dict[str, IntegerTarget]:
    """Integer networks of a float SNN by name, as they are rounded."""
    made: dict[str, IntegerNetwork] = {f"{n} bits": quantize(network, calibration, n, {}).network for n in bits}
    return {name: IntegerTarget(integers) for name, integers in made.items()}


def transfer_row(
    targets: Mapping[str, GradientTarget],
    crafted: Mapping[str, Crafted],
    images: Images,
    settings: FidelityConfig,
    folder: Path,
    identity: str,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """``transfer_matrix`` of ``report.json``: the configured ensemble on each model, judged on all.

    Args:
        targets: "float", "integer", and others by name.
        crafted: of the check.
        images, settings, folder, identity, workers: as for :func:`~pipeline.fidelity.shards.craft_all`; the identity
            is that of all targets.
    """
    attacks = [
        Attack(
            f"transfer, {name}",
            (name,),
            "ensemble",
            "",
            partial(craft_ensemble, target=name),
            is_ensemble=True,
        )
        for name in targets
        if name not in KNOWN
    ]
    made = craft_all(targets, images, settings, folder, identity, attacks, workers)
    sources: dict[str, Codes] = {"clean images": images.codes}
    for name in targets:
        sources[name] = (crafted[KNOWN[name]] if name in KNOWN else made[f"transfer, {name}"]).codes
    rows = []
    for source, codes in sources.items():
        right = {name: int(correct(target, codes, images.labels).sum()) for name, target in targets.items()}
        rows.append(
            {
                "crafted_on": source,
                "accuracies": {name: count / len(codes) for name, count in right.items()},
                "intervals": {name: list(wilson_interval(count, len(codes))) for name, count in right.items()},
            }
        )
    return {
        "attack": f"{settings.attacks} ensemble",
        "epsilon": settings.epsilon,
        "samples": len(images.labels),
        "models": list(targets),
        "rows": rows,
    }
