"""What each step from the trained network to the deployed one costs in accuracy on the adversarial images.

The images are those of the worst case, crafted on the float SNN and on its integer network. Networks between the two
are judged on them without an attack of their own, and so are the networks before the SNN: they look more robust than
they are, and the step to the integer network seems to pay for it. So where the integer network does lose against the
float SNN, the step that is named is the one that changes the logits of clean images most, which no attack distorts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hardware.network import INPUT, IntegerNetwork
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import Codes, batched_logits
from pipeline.attribution import relative_error
from pipeline.fidelity.arms import Hits
from pipeline.fidelity.certification import is_certified
from pipeline.fidelity.crafting import ATTACKS, Attack, Images
from pipeline.folding import RealPopulation, fold
from pipeline.hybrids import STEPS, hybrids
from pipeline.models.spiking import SpikingNetwork
from pipeline.progress import track
from pipeline.statistics import wilson_interval
from pipeline.unrounded import run_unrounded

Classify = Callable[[Codes], NDArray[np.intp]]
CLEAN_IMAGES = 128
"""On which the change that a step makes is measured."""
WORK = 10**11
"""Connections times steps times images that are spent; of large networks the first images only are looked at."""
MIN_IMAGES = 16
UNKNOWN = "The network before its conversion and its fine-tuning is in the folder of the run, not in a bundle."
NOTES: Mapping[str, str] = {
    "trained": "with ReLUs, on images that were not crafted on it",
    "conversion": "to a spiking network, before it was fine-tuned",
    "fine-tuning": "the float SNN, the reference of this check",
    "float SNN": "the reference of this check",
    "float64": "the same network, its batch norm folded, in float64",
    "thresholds": "become integers",
    "weights": "become the integers, whatever those learned; a bias that makes up for their mean error counts here",
    "bias": "becomes integers",
    "input codes": "the constant part of the normalisation goes through channels of pixel codes",
    "decay": "becomes shares of 4096",
    "everything": "the integer network: its own arithmetic, saturation included",
}


@dataclass(frozen=True)
class EarlierNetworks:
    """What a run knows of the time before the SNN was fine-tuned; None where the SNN was there from the beginning."""

    trained: nn.Module
    converted: SpikingNetwork


@dataclass(frozen=True)
class Contestants:
    """The networks of a waterfall.

    Attributes:
        reference, deployed: which images of each arm the float SNN and the integer network get right.
        earlier: networks before; None if they are not known.
    """

    reference: Mapping[str, Hits]
    deployed: Mapping[str, Hits]
    earlier: EarlierNetworks | None


def waterfall_row(
    network: SpikingNetwork,
    integers: IntegerNetwork,
    images: Images,
    crafted: Mapping[str, Crafted],
    contestants: Contestants,
    means: Mapping[str, NDArray[np.float64]],
    runtimes: Sequence[Mapping[str, Any]],
    attacks: Sequence[Attack] = ATTACKS,
) -> dict[str, Any]:
    """``waterfall`` of ``report.json``.

    Args:
        network: the float SNN.
        integers: its integer network.
        images: of the check.
        crafted: by attack.
        contestants: what is known of both models' answers, and the networks before.
        means: see :func:`~pipeline.hybrids.hybrids`.
        runtimes: rows of the certification.
        attacks: whose images make the worst case.
    """
    populations = fold(network)
    counted = [attack.name for attack in attacks if attack.in_worst_case]
    samples = min(len(images.labels), _affordable(populations, network.steps, len(counted)))
    # The most harmful ones first: what is wrong already is not looked at again.
    order = sorted(counted, key=lambda name: int((contestants.reference[name] & contestants.deployed[name]).sum()))
    shown = [*(crafted[name].codes[:samples] for name in order), images.codes[:samples]]
    labels = images.labels[:samples]

    def right(classify: Classify) -> int:
        return int(right_on_all(classify, shown, labels).sum())

    def known(hits: Mapping[str, Hits]) -> int:
        return int(np.logical_and.reduce([hits[name][:samples] for name in ("clean", *counted)]).sum())

    found: list[tuple[str, int | None]] = []
    if contestants.earlier is None:
        found.append(("float SNN", known(contestants.reference)))
    else:
        for name, module in (("trained", contestants.earlier.trained), ("conversion", contestants.earlier.converted)):
            module.eval()
            found.append((name, right(lambda codes, module=module: batched_logits(module, codes).argmax(1))))  # type: ignore[misc]
        found.append(("fine-tuning", known(contestants.reference)))
    between = list(hybrids(populations, integers, means))
    clean, changes = images.codes[: min(samples, CLEAN_IMAGES)], dict[str, float]()
    before: NDArray[np.float64] | None = None
    with track("waterfall", len(between)) as advance:
        for name, mixed in between:
            found.append((name, right(classifier(mixed, integers.steps))))
            logits = run_unrounded(mixed, clean, integers.steps)[1]
            if before is not None and name in STEPS:
                changes[name] = relative_error(logits, before)
            before = logits
            advance(name)
    everything = known(contestants.deployed)
    found.append(("everything", everything))
    names = ", ".join(row["name"] for row in runtimes)
    certified = all(is_certified(row) for row in runtimes)
    found.append(("runtimes", everything if certified else None))
    note = f"{names}: " + ("each computes the integer network, see the certification" if certified else "not certified")
    steps = step_rows(found, samples, {**NOTES, "runtimes": note})
    changed = [name for name in changes if changes[name] > 0]
    loss = known(contestants.reference) - everything
    return {
        "samples": samples,
        "description": "accuracy on the clean image and every image of the worst case; networks between the float SNN "
        "and the integer network, and before the float SNN, met no attack of their own",
        "unknown": UNKNOWN if contestants.earlier is None else None,
        "steps": steps,
        "costliest": max(changed, key=changes.__getitem__) if changed and loss > 0 else None,
    }


def step_rows(found: Sequence[tuple[str, int | None]], samples: int, notes: Mapping[str, str]) -> list[dict[str, Any]]:
    """Steps from how many images are right after each; what it costs is the difference to the step before."""
    rows = []
    before: int | None = None
    for name, right in found:
        rows.append(
            {
                "name": name,
                "accuracy": None if right is None else right / samples,
                "interval": None if right is None else list(wilson_interval(right, samples)),
                "cost": None if right is None or before is None else (before - right) / samples,
                "note": notes[name],
            }
        )
        before = right
    return rows


def right_on_all(classify: Classify, shown: Sequence[Codes], labels: NDArray[np.int64]) -> Hits:
    """Which images are right in every version; of those that were wrong in one, no further version is looked at."""
    right = np.ones(len(labels), np.bool_)
    for codes in shown:
        rows = np.flatnonzero(right)
        if len(rows):
            right[rows] = classify(codes[rows]) == labels[rows]
    return right


def classifier(populations: Sequence[RealPopulation], steps: int) -> Classify:
    """Classes that populations in weight units answer with."""

    def classify(codes: Codes) -> NDArray[np.intp]:
        answers: NDArray[np.intp] = run_unrounded(populations, codes, steps)[1].argmax(1)
        return answers

    return classify


def mean_activity(network: SpikingNetwork, integers: IntegerNetwork, codes: Codes) -> dict[str, NDArray[np.float64]]:
    """Of the input and of each population of a float SNN, over samples and steps, in its shape.

    Args:
        network: the float SNN.
        integers: its integer network, which says the shapes.
        codes: uint8 ``(samples, *shape)``.
    """
    _, activity = network.record(network.images(codes))
    means = {
        name: layer.spikes.numpy().mean((0, 1)).reshape(integers.by_name[name].shape)
        for name, layer in activity.items()
    }
    return {INPUT: codes.mean(0), **means}


def _affordable(populations: Sequence[RealPopulation], steps: int, arms: int) -> int:
    connections: int = sum(
        math.prod(one.shape) * sum(synapse.weight[0].size for synapse in one.synapses) for one in populations
    )
    return max(MIN_IMAGES, WORK // (connections * steps * (arms + 1) * (len(STEPS) + 1)))
