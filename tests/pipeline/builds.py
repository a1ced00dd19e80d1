"""Untrained builds of the self-test network, for tests of whole checks: quick to make and to attack."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from exporters.bundle import write_bundle
from hardware.formats.bundle import ONNX_FILE, ONNX_STEP_FILE, Bundle, open_bundle
from pipeline.attacks.targets import FloatTarget
from pipeline.config import FidelityConfig
from pipeline.fidelity.crafting import Images
from pipeline.models.float_file import float_files
from pipeline.models.spiking import SpikingNetwork
from pipeline.quantization import quantize
from pipeline.selftest.network import residual_digits
from tests.pipeline.samples import busy_spiking_network, random_images

SHAPE = (1, 8, 8)
CALIBRATION = random_images(SHAPE, 16, 3)
QUICK = FidelityConfig(
    epsilon=0.05,
    margin=0.3,
    attacks="quick",
    square_queries=3,
    certify=6,
    curve=(),
    runtimes=("emulator",),
    baseline=False,
)


@cache
def untrained() -> SpikingNetwork:
    """Random weights, but neurons that are busy."""
    return busy_spiking_network(residual_digits(), SHAPE, seed=2, steps=4)


def write_build(folder: Path, bits: int = 8, steps: int = 4) -> Bundle:
    """A bundle of it, with ONNX files."""
    network = busy_spiking_network(residual_digits(), SHAPE, seed=2, steps=steps)
    write_bundle(
        folder,
        quantize(network, CALIBRATION, bits, {}).network,
        golden_codes=CALIBRATION[:2],
        float_model_files=float_files(network),
        provenance={},
        models=(ONNX_FILE, ONNX_STEP_FILE),
    )
    return open_bundle(folder)


def own_images(count: int, seed: int = 0) -> Images:
    """Images with the labels that the float network gives them."""
    codes = random_images(SHAPE, count, seed=5)
    labels = FloatTarget(untrained()).logits(codes).argmax(1).astype(np.int64)
    return Images(codes, labels, seed)
