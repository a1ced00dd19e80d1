"""Spike rasters of both models on one image: time downwards, neurons across, one strip per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.fidelity.gallery import LayerSpikes

NEURONS = 40
"""Of each layer that are shown: first those whose spikes differ, then those that spike most."""
SILENT, SPIKE, ONLY_REFERENCE, ONLY_DEPLOYED, BETWEEN = (
    (0x1C, 0x22, 0x29), (0xD5, 0xDB, 0xE2), (0x6F, 0xB1, 0xF5), (0xFF, 0x9D, 0x57), (0x6C, 0x76, 0x81)
)  # fmt: skip


@dataclass(frozen=True)
class RasterPair:
    """Pictures uint8 ``(height, width, 3)`` of both models' spikes, and what to say instead of them."""

    reference: NDArray[np.uint8]
    deployed: NDArray[np.uint8]
    text: str


def raster_pair(layers: Sequence[LayerSpikes]) -> RasterPair:
    """Draw all layers, the same neurons of both models; a spike that only one of them has is in its colour."""
    strips: tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]] = ([], [])
    spoken = []
    for layer in layers:
        shown = _chosen(layer)
        reference, deployed = layer.reference[:, shown], layer.deployed[:, shown]
        for pictures, own, other, colour in (
            (strips[0], reference, deployed, ONLY_REFERENCE),
            (strips[1], deployed, reference, ONLY_DEPLOYED),
        ):
            if pictures:
                pictures.append(np.broadcast_to(np.array(BETWEEN, np.uint8), (1, NEURONS, 3)))
            pictures.append(_strip(own, other, colour))
        differing = int((layer.reference != layer.deployed).sum())
        spoken.append(f"{layer.name} {differing:,} of {layer.reference.size:,}")
    return RasterPair(np.concatenate(strips[0]), np.concatenate(strips[1]), "; ".join(spoken))


def _chosen(layer: LayerSpikes) -> NDArray[np.intp]:
    differing = (layer.reference != layer.deployed).any(0)
    spikes = layer.reference.sum(0) + layer.deployed.sum(0)
    order = np.lexsort((-spikes, ~differing))[:NEURONS]
    return np.sort(order)


def _strip(own: NDArray[np.bool_], other: NDArray[np.bool_], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    picture = np.empty((len(own), NEURONS, 3), np.uint8)
    picture[:] = BETWEEN
    part = picture[:, : own.shape[1]]
    part[:] = SILENT
    part[own & other] = SPIKE
    part[own & ~other] = colour
    return picture
