"""Images of a check that are worth a look: attacked ones, both models' answers to them and spikes on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hardware.emulator import run_emulator
from hardware.network import IntegerNetwork
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import Target
from pipeline.fidelity.crafting import Images
from pipeline.models.spiking import SpikingNetwork

GALLERY_ITEMS = 8


@dataclass(frozen=True)
class LayerSpikes:
    """Spikes of one layer on one image, of both models: bool ``(steps, neurons)``."""

    name: str
    reference: NDArray[np.bool_]
    deployed: NDArray[np.bool_]


@dataclass(frozen=True)
class GalleryItem:
    """One image with its adversarial version, and what both models answer.

    Attributes:
        sample: index in the test split.
        label: the right class.
        attack: which attack made the adversarial image.
        clean: codes ``(channels, height, width)``.
        adversarial: codes of the same shape.
        reference_answers: classes the float SNN gives to the clean and to the adversarial image.
        deployed_answers: the same of the integer network.
        spikes: on the adversarial image, layer by layer.
    """

    sample: int
    label: int
    attack: str
    clean: NDArray[np.uint8]
    adversarial: NDArray[np.uint8]
    reference_answers: tuple[int, int]
    deployed_answers: tuple[int, int]
    spikes: tuple[LayerSpikes, ...] = field(default=())

    @property
    def largest_change(self) -> int:
        """In pixel codes."""
        return int(np.abs(self.adversarial.astype(np.int64) - self.clean).max())


def choose_items(images: Images, crafted: Mapping[str, Crafted], targets: Mapping[str, Target]) -> list[GalleryItem]:
    """Some images that fooled their target, the attacks in turn, no image twice."""
    items: list[GalleryItem] = []
    taken: set[int] = set()
    queues = {name: list(np.flatnonzero(made.fooled)) for name, made in crafted.items()}
    while any(queues.values()) and len(items) < GALLERY_ITEMS:
        for name, queue in queues.items():
            while queue and int(queue[0]) in taken:
                queue.pop(0)
            if queue and len(items) < GALLERY_ITEMS:
                index = int(queue.pop(0))
                taken.add(index)
                pair = np.stack([images.codes[index], crafted[name].codes[index]])
                answers = {model: target.logits(pair).argmax(1) for model, target in targets.items()}
                items.append(
                    GalleryItem(
                        index,
                        int(images.labels[index]),
                        name,
                        pair[0],
                        pair[1],
                        (int(answers["float"][0]), int(answers["float"][1])),
                        (int(answers["integer"][0]), int(answers["integer"][1])),
                    )
                )
    return items


def with_spikes(items: list[GalleryItem], network: SpikingNetwork, integers: IntegerNetwork) -> list[GalleryItem]:
    """The items with both models' spikes on the adversarial images."""
    if not items:
        return items
    codes = np.stack([item.adversarial for item in items])
    _, activity = network.record(network.images(codes))
    deployed = run_emulator(integers, codes, "spikes").populations
    spikes = {name: deployed[name].spikes for name in activity}

    def on(row: int) -> tuple[LayerSpikes, ...]:
        return tuple(
            LayerSpikes(name, layer.spikes[row].numpy(), found[row])
            for name, layer in activity.items()
            if (found := spikes[name]) is not None
        )

    return [replace(item, spikes=on(row)) for row, item in enumerate(items)]
