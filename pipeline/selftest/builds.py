"""Builds of the self-test network that run exactly as exported and still must not pass, each for another reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from exporters.bundle import write_bundle
from hardware.formats.bundle import Bundle, open_bundle
from pipeline.attacks.targets import Codes
from pipeline.models.float_file import float_files
from pipeline.models.spiking import SpikingNetwork
from pipeline.quantization import Rounding, quantize

GOLDEN_IMAGES = 4
STEEP = 1e4
"""Factor on the logits at which the softmax of float32 is flat: no answer changes, and gradients are zero."""


@dataclass(frozen=True)
class Build:
    """A deployment to refuse.

    Attributes:
        name: in words.
        stem: of its files.
        outcome: that the check must come to.
        spoil: what is done to the float SNN.
        bits: of every weight.
        rounding: of the weights.
    """

    name: str
    stem: str
    outcome: str
    spoil: Callable[[SpikingNetwork], SpikingNetwork] = copy.deepcopy
    bits: int = 8
    rounding: Rounding = "compensated"

    def write(self, folder: Path, network: SpikingNetwork, calibration: Codes) -> Bundle:
        """Quantise and export it."""
        spoiled = self.spoil(network)
        integers = quantize(spoiled, calibration, self.bits, {}, self.rounding).network
        write_bundle(
            folder,
            integers,
            golden_codes=calibration[:GOLDEN_IMAGES],
            float_model_files=float_files(spoiled),
            provenance={},
            models=(),
        )
        return open_bundle(folder)


def with_steep_logits(network: SpikingNetwork) -> SpikingNetwork:
    """The same answers from logits so far apart that the cross-entropy has no gradients."""
    steep, readout = copy.deepcopy(network), network.graph.layers[-1].name
    state = steep.state_dict()
    for key in state:
        if key.startswith(f"layers.{readout}."):
            state[key] = state[key] * STEEP
    steep.load_state_dict(state)
    return steep


BUILDS: tuple[Build, ...] = (
    Build("2 bits, rounded to the nearest, not fine-tuned", "naive", "ROBUSTNESS_INFERIOR", bits=2, rounding="nearest"),
    Build("logits so far apart that gradients vanish", "steep", "MASKED_GRADIENTS", with_steep_logits),
)
