"""Residual networks for 32x32 images (He et al., 2016).

Their residual sums are learned, as in Özdenizci & Legenstein (TMLR 2024).
"""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.models.layers import Normalize
from pipeline.models.zoo.parts import LearnedSum, conv3x3, initialize, scaled


class Block(nn.Module):
    """Two convolutions beside a shortcut, with an activation after the first and one after the sum.

    Where the block changes the image's size or channels, the shortcut is a 1x1 convolution with batch norm.
    """

    def __init__(self, sources: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(sources, channels, stride)
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(channels, channels)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or sources != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(sources, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        self.sum = LearnedSum()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(samples, sources, height, width)`` to ``(samples, channels, height / stride, width / stride)``."""
        branch = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        activity: Tensor = self.relu2(self.sum(self.shortcut(x), branch))
        return activity


class ResNet(nn.Module):
    """A convolution and three groups of blocks, each with half the image's size and twice the channels of the last.

    Args:
        normalize: the first operation.
        classes: what is told apart.
        blocks: in each group; the network has 6 blocks + 2 layers.
        width: factor on all channels.
    """

    def __init__(self, normalize: Normalize, classes: int, blocks: int, width: float) -> None:
        super().__init__()
        self.normalize = normalize
        channels = [scaled(size, width) for size in (16, 32, 64)]
        self.conv = conv3x3(len(normalize.mean), channels[0])
        self.norm = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential()
        sources = channels[0]
        for group, size in enumerate(channels):
            for index in range(blocks):
                self.blocks.append(Block(sources, size, 2 if group and not index else 1))
                sources = size
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(sources, classes, bias=False)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(samples, classes)`` of images ``(samples, channels, side, side)``."""
        activity = self.blocks(self.relu(self.norm(self.conv(self.normalize(images)))))
        logits: Tensor = self.classifier(self.flatten(self.pool(activity)))
        return logits


def resnet_20(normalize: Normalize, classes: int, width: float = 1.0) -> nn.Module:
    """Three blocks in each group."""
    return ResNet(normalize, classes, 3, width)


def resnet_32(normalize: Normalize, classes: int, width: float = 1.0) -> nn.Module:
    """Five blocks in each group."""
    return ResNet(normalize, classes, 5, width)
