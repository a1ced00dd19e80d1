"""Layers torch does not have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Channel-wise ``(x - mean) / std``, the first operation of a network, so that budgets stay in pixel units."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError("Normalize needs one positive std per mean")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise ``(samples, channels, ...)``."""
        shape = (1, -1, *([1] * (images.ndim - 2)))
        return (images - self.mean.view(shape)) / self.std.view(shape)
