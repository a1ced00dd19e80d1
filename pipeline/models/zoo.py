"""Networks that come with spikeguard."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from pipeline.models.layers import Normalize

# Mean and standard deviation of scikit-learn's digits over all pixels, as round numbers of 8-bit codes.
DIGITS_MEAN, DIGITS_STD = 78 / 255, 96 / 255


def digits_cnn(channels: int = 16, hidden: int = 64, classes: int = 10) -> nn.Module:
    """The small CNN for 8x8 images: conv16-BN-A2-conv32-BN-A2-dense64-dense10, without biases."""
    return nn.Sequential(
        Normalize([DIGITS_MEAN], [DIGITS_STD]),
        nn.Conv2d(1, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * channels * 4, hidden, bias=False),
        nn.ReLU(),
        nn.Linear(hidden, classes, bias=False),
    )


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {"digits-cnn": digits_cnn}
