"""Networks of plain convolutions (Simonyan & Zisserman, 2015), with batch norm and average pooling.

The eleven-layer plan is the one of Özdenizci & Legenstein (TMLR 2024): its first layers stay large.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pipeline.models.layers import Normalize
from pipeline.models.zoo.parts import conv3x3, initialize, scaled

POOL = 0
VGG11 = (64, POOL, 128, 256, POOL, 512, 512, 512, POOL, 512, 512)
VGG16 = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512, POOL)
HIDDEN = 4096
DROPOUT = 0.2


def vgg11(normalize: Normalize, classes: int, width: float = 1.0) -> nn.Module:
    """32x32 images: eight convolutions, two hidden dense layers."""
    return _vgg(normalize, _convolutions(normalize, VGG11, width), 4 * 4, 2, classes, width)


def vgg16(normalize: Normalize, classes: int, width: float = 1.0) -> nn.Module:
    """32x32 images: thirteen convolutions, two hidden dense layers."""
    return _vgg(normalize, _convolutions(normalize, VGG16, width), 1, 2, classes, width)


def vgg11_tiny(normalize: Normalize, classes: int, width: float = 1.0) -> nn.Module:
    """64x64 images: eight convolutions, an average over the image, one hidden dense layer."""
    layers = [*_convolutions(normalize, VGG11, width), nn.AdaptiveAvgPool2d(1)]
    return _vgg(normalize, layers, 1, 1, classes, width)


def _convolutions(normalize: Normalize, plan: tuple[int, ...], width: float) -> list[nn.Module]:
    layers: list[nn.Module] = []
    sources = len(normalize.mean)
    for entry in plan:
        if entry == POOL:
            layers.append(nn.AvgPool2d(2))
            continue
        channels = scaled(entry, width)
        layers += [conv3x3(sources, channels), nn.BatchNorm2d(channels), nn.ReLU()]
        sources = channels
    return layers


def _vgg(
    normalize: Normalize, features: list[nn.Module], positions: int, hidden_layers: int, classes: int, width: float
) -> nn.Module:
    """The convolutions, and dense layers on what they leave at so many ``positions``."""
    dense: list[nn.Module] = [nn.Flatten()]
    sources = scaled(512, width) * positions
    for _ in range(hidden_layers):
        hidden = scaled(HIDDEN, width)
        dense += [nn.Linear(sources, hidden, bias=False), nn.ReLU(), nn.Dropout(DROPOUT)]
        sources = hidden
    dense.append(nn.Linear(sources, classes, bias=False))
    parts = {"normalize": normalize, "features": nn.Sequential(*features), "classifier": nn.Sequential(*dense)}
    return initialize(nn.Sequential(OrderedDict(parts)))
