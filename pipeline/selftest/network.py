"""A small network with everything that can go wrong in a deployment: borders, pooling, a residual, a flattening."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.models.layers import Normalize
from pipeline.models.zoo import NORMALIZATIONS

CHANNELS = 8


class _Residual(nn.Module):
    """Two convolutions beside the identity, neurons after the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(CHANNELS)
        self.outer = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.outer_norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """``(samples, channels, height, width)`` to the same shape."""
        branch = self.outer_norm(self.outer(torch.relu(self.inner_norm(self.inner(x)))))
        return torch.relu(x + branch)


def residual_digits() -> nn.Module:
    """For 8 x 8 digits: convolution, average pooling, a residual block, a dense readout."""
    return nn.Sequential(
        Normalize(*NORMALIZATIONS["digits"]),
        nn.Conv2d(1, CHANNELS, 3, padding=1, bias=False),
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU(),
        nn.AvgPool2d(2),
        _Residual(),
        nn.Flatten(),
        nn.Linear(16 * CHANNELS, 10, bias=False),
    )
