"""Networks for small grey images."""

from __future__ import annotations

from torch import nn

from pipeline.models.layers import Normalize
from pipeline.models.zoo.parts import conv3x3, initialize, scaled


def digits_cnn(normalize: Normalize, classes: int, width: float = 1.0) -> nn.Module:
    """8x8 images: conv16 - pool2 - conv32 - pool2 - dense64 - classes."""
    channels, more, hidden = (scaled(size, width) for size in (16, 32, 64))
    return nn.Sequential(
        normalize,
        conv3x3(len(normalize.mean), channels),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AvgPool2d(2),
        conv3x3(channels, more),
        nn.BatchNorm2d(more),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(more * 2 * 2, hidden, bias=False),
        nn.ReLU(),
        nn.Linear(hidden, classes, bias=False),
    )


def cnn_28(normalize: Normalize, classes: int, width: float = 1.0) -> nn.Module:
    """28x28 images: conv16 - conv32 of stride 2 - conv32 of stride 2 - classes."""
    channels, more = scaled(16, width), scaled(32, width)
    network = nn.Sequential(
        normalize,
        conv3x3(len(normalize.mean), channels),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        conv3x3(channels, more, stride=2),
        nn.BatchNorm2d(more),
        nn.ReLU(),
        conv3x3(more, more, stride=2),
        nn.BatchNorm2d(more),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(more * 7 * 7, classes, bias=False),
    )
    return initialize(network)
