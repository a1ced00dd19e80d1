"""Wide residual networks (Zagoruyko & Komodakis, 2016).

Their residual sums are learned, as in Özdenizci & Legenstein (TMLR 2024).
"""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.models.layers import Normalize
from pipeline.models.zoo.parts import LearnedSum, conv3x3, initialize, scaled


class PreActivationBlock(nn.Module):
    """Batch norm and activation before each of two convolutions, beside a shortcut; nothing after the sum.

    Where the block changes the image's size or channels, the shortcut is a 1x1 convolution of the first activation.
    """

    def __init__(self, sources: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(sources)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(sources, channels, stride)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(channels, channels)
        changes = stride != 1 or sources != channels
        self.shortcut = nn.Conv2d(sources, channels, 1, stride, bias=False) if changes else None
        self.sum = LearnedSum()

    def forward(self, x: Tensor) -> Tensor:
        """``(samples, sources, height, width)`` to ``(samples, channels, height / stride, width / stride)``."""
        activity = self.relu1(self.norm1(x))
        branch = self.conv2(self.relu2(self.norm2(self.conv1(activity))))
        summed: Tensor = self.sum(x if self.shortcut is None else self.shortcut(activity), branch)
        return summed


class WideResNet(nn.Module):
    """A convolution and three groups of blocks, each with half the image's size and twice the channels of the last.

    Args:
        normalize: the first operation.
        classes: what is told apart.
        depth: convolutions on the longest path and the classifier, 6 n + 4 for n blocks in each group.
        widening: factor on the channels of the groups.
        width: factor on all channels.
    """

    def __init__(self, normalize: Normalize, classes: int, depth: int, widening: int, width: float) -> None:
        super().__init__()
        self.normalize = normalize
        sources = scaled(16, width)
        self.conv = conv3x3(len(normalize.mean), sources)
        self.blocks = nn.Sequential()
        for group, size in enumerate((16, 32, 64)):
            channels = scaled(size * widening, width)
            for index in range((depth - 4) // 6):
                self.blocks.append(PreActivationBlock(sources, channels, 2 if group and not index else 1))
                sources = channels
        self.norm = nn.BatchNorm2d(sources)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(sources, classes, bias=False)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(samples, classes)`` of images ``(samples, channels, side, side)``."""
        activity = self.relu(self.norm(self.blocks(self.conv(self.normalize(images)))))
        logits: Tensor = self.classifier(self.flatten(self.pool(activity)))
        return logits


def wrn_16_4(normalize: Normalize, classes: int, width: float = 1.0) -> nn.Module:
    """Sixteen layers, four times as wide as a ResNet."""
    return WideResNet(normalize, classes, 16, 4, width)


def wrn_28_4(normalize: Normalize, classes: int, width: float = 1.0) -> nn.Module:
    """Twenty-eight layers, four times as wide as a ResNet."""
    return WideResNet(normalize, classes, 28, 4, width)
