"""Models and images that other people's attack libraries can be tried on: state-free modules, trained in seconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hardware.surrogates import TRIANGLE, Surrogate
from hardware.twin import Twin
from pipeline.conversion import calibrate, convert
from pipeline.data import Dataset, Splits, load_digits, split
from pipeline.models.spiking import RateNetwork, SpikingNetwork
from pipeline.models.tracing import trace_network
from pipeline.models.zoo import build
from pipeline.objectives import Objective, natural, pgd_adversarial_training
from pipeline.quantization import quantize
from pipeline.training import images_of

BATCH = 64
BLUR = 2**12
"""Parts of a code that float32 in [0, 1] tells apart after some steps."""


class Victim(NamedTuple):
    """What an attack is tried on.

    Attributes:
        module: in eval mode; images ``(samples, 1, 8, 8)`` in [0, 1] to logits, nothing carried over.
        images: float32 test images on the grid of the pixel codes.
        labels: int64.
    """

    module: nn.Module
    images: Tensor
    labels: Tensor


class FixedSurrogate(nn.Module):
    """A spiking network with one surrogate, as the plain module of images that attack libraries expect.

    Args:
        network: the float SNN, or the differentiable twin of an integer one.
        surrogate: gradient of the spikes.
    """

    def __init__(self, network: SpikingNetwork | Twin, surrogate: Surrogate) -> None:
        super().__init__()
        self.network = network
        self.surrogate = surrogate
        # Libraries look for the device at the first parameter, and a twin has none.
        self.device_holder = nn.Parameter(torch.empty(0))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images, self.surrogate)
        return logits


class OnCodes(nn.Module):
    """Rounds images to pixel codes before a module sees them; gradients pass unchanged.

    So a library judges each iterate as our attacks do, after rounding. A budget of whole codes is kept by rounding.
    Steps of halves and quarters of codes, taken from the border of the budget, often end midway between two codes.
    Multiples of 1/255 blur that, so the blur is removed first, or chance would round such pixels.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.eval()  # torchattacks puts a model back into the mode it found, and all inside with it

    def forward(self, images: Tensor) -> Tensor:
        exact = (images.detach().double() * 255 * BLUR).round() / BLUR
        rounded = (exact.round() / 255).to(images.dtype)
        logits: Tensor = self.module(images + (rounded - images).detach())
        return logits


class AnyIterate(nn.Module):
    """Remembers which images were misclassified in any call, for libraries that return the last iterate only.

    Every call must hold all the images.
    """

    def __init__(self, module: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.module = module
        self.eval()  # torchattacks puts a model back into the mode it found, and all inside with it
        self.labels = labels
        self.fooled = torch.zeros(len(labels), dtype=torch.bool)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.module(images)
        self.fooled |= logits.detach().argmax(1) != self.labels
        return logits


def natural_cnn(samples: int = 60) -> Victim:
    """A float CNN trained without attacks: some 98 % of the clean digits."""
    return Victim(_trained(natural, 8, 0.05), *test_images(samples))


def robust_cnn(samples: int = 60) -> Victim:
    """The same trained against PGD at 0.1, so that attacks of that size succeed on some images only."""
    return Victim(_trained(_robust, 15, 0.05), *test_images(samples))


def spiking(samples: int = 60, surrogate: Surrogate = TRIANGLE) -> Victim:
    """The robust CNN as a float SNN of 8 steps with one fixed surrogate."""
    return Victim(FixedSurrogate(_converted(), surrogate).eval(), *test_images(samples))


def integer(samples: int = 60, surrogate: Surrogate = TRIANGLE) -> Victim:
    """The twin of that SNN with 8-bit weights, with one fixed surrogate."""
    return Victim(FixedSurrogate(_twin(), surrogate).eval(), *test_images(samples))


def test_images(samples: int) -> tuple[Tensor, Tensor]:
    """The first images of the test split, and their labels."""
    test = _splits().test
    return images_of(test)[:samples], torch.from_numpy(test.labels)[:samples]


def _robust() -> Objective:
    return pgd_adversarial_training(0.1, 3)


@cache
def _splits() -> Splits:
    return split("digits", load_digits(), validation=10, test=360, seed=0)


@cache
def _trained(objective: Callable[[], Objective], epochs: int, learning_rate: float) -> RateNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = RateNetwork(trace_network(build("digits-cnn", "digits", 10, 1, (1, 8, 8)), (1, 8, 8)).graph)
        _fit(network, objective(), _splits().train, epochs, learning_rate)
    return network.eval()


def _fit(network: RateNetwork, objective: Objective, train: Dataset, epochs: int, learning_rate: float) -> None:
    """SGD with a cosine, as the pipeline trains, without its selection on validation images."""
    images, labels = images_of(train), torch.from_numpy(train.labels)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(network.parameters(), lr=learning_rate, momentum=0.9, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        network.train()
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = objective(network, images[batch], labels[batch], generator)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        cosine.step()


@cache
def _converted() -> SpikingNetwork:
    network = convert(_trained(_robust, 15, 0.05), steps=8)
    batches = images_of(_splits().train)[: 6 * BATCH].split(BATCH)
    calibrate(network, batches, percentile=99.7, calibration_steps=50, scale=0.6)
    return network.eval()


@cache
def _twin() -> Twin:
    calibration = _splits().train.codes[: 2 * BATCH]
    return Twin(quantize(_converted(), np.ascontiguousarray(calibration), 8, {}).network)
