"""What the networks have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, rounded, at least 1."""
    return max(1, round(channels * width))


def conv3x3(sources: int, channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the image's size, or divides it by ``stride``; no bias."""
    return nn.Conv2d(sources, channels, 3, stride, padding=1, bias=False)


def initialize(network: nn.Module) -> nn.Module:
    """Draw the weights of all convolutions so that gradients keep their size from layer to layer (He et al., 2015)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


class LearnedSum(nn.Module):
    """A residual sum with learned weights, ``a shortcut + b branch``, both 0.5 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5))
        self.b = nn.Parameter(torch.tensor(0.5))

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """Add two tensors of the same shape."""
        return self.a * shortcut + self.b * branch
