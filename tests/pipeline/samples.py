"""Small networks and data for the tests of the pipeline: quick to make, and never trivial."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.conversion import convert
from pipeline.data import Dataset
from pipeline.models.layers import Normalize
from pipeline.models.spiking import RateNetwork, SpikingNetwork, rebuild
from pipeline.models.tracing import trace_network

Shape = tuple[int, ...]
Builder = Callable[[], nn.Module]


def conv_net() -> nn.Module:
    return nn.Sequential(
        Normalize([0.3], [0.4]),
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 10, bias=False),
        nn.ReLU(),
        nn.Linear(10, 4, bias=False),
    )


def _wide_kernel_net() -> nn.Module:
    return nn.Sequential(
        Normalize([0.2, 0.5], [0.3, 0.25]),
        nn.Conv2d(2, 3, 5, padding=2, stride=2),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 5, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(45, 3),
    )


def _padded_beyond_the_kernel_net() -> nn.Module:
    """No tap of the first kernel meets every output position, so none can carry the bias."""
    return nn.Sequential(
        Normalize([0.4], [0.5]),
        nn.Conv2d(1, 3, 2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(147, 3),
    )


def _plain_conv_net() -> nn.Module:
    """No normalisation and no batch norm; pooling by 3 before a dense layer."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(3),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(16, 3),
    )


def _dense_net() -> nn.Module:
    return nn.Sequential(
        Normalize([0.4, 0.5], [0.3, 0.2]),
        nn.Flatten(),
        nn.Linear(18, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Linear(12, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


def _feature_net() -> nn.Module:
    return nn.Sequential(Normalize([0.1, 0.2, 0.6], [0.3, 0.5, 0.2]), nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 3))


class _ResidualBlock(nn.Module):
    """Neurons after the sum; the shortcut is the spikes themselves, or a strided conv of them."""

    def __init__(self, sources: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(sources, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or sources != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(sources, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.6))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(self.a * self.shortcut(x) + self.b * branch)


class _PreActivationBlock(nn.Module):
    """Batch norm and neurons before every conv; what is summed is never spiked on its way."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv1(torch.relu(self.norm1(x)))
        return self.a * x + self.b * self.conv2(torch.relu(self.norm2(branch)))


def _residual_net() -> nn.Module:
    return nn.Sequential(
        Normalize([0.4], [0.3]),
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        _ResidualBlock(3, 3, 1),
        _ResidualBlock(3, 5, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3, bias=False),
    )


def _pre_activation_net() -> nn.Module:
    return nn.Sequential(
        Normalize([0.4, 0.6], [0.3, 0.2]),
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        _PreActivationBlock(4),
        _PreActivationBlock(4),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3, bias=False),
    )


NETWORKS: Mapping[str, tuple[Builder, Shape]] = {
    "conv": (conv_net, (1, 8, 8)),
    "wide kernel": (_wide_kernel_net, (2, 8, 8)),
    "padded beyond the kernel": (_padded_beyond_the_kernel_net, (1, 6, 6)),
    "plain conv": (_plain_conv_net, (1, 6, 6)),
    "dense": (_dense_net, (2, 3, 3)),
    "features": (_feature_net, (3,)),
    "residual": (_residual_net, (1, 6, 6)),
    "pre-activation": (_pre_activation_net, (2, 4, 4)),
}


def rate_network(name: str = "conv", seed: int = 0) -> RateNetwork:
    """One of ``NETWORKS`` as a graph in eval mode, batch norm's statistics and affine away from their defaults."""
    torch.manual_seed(seed)
    builder, shape = NETWORKS[name]
    return _away_from_defaults(builder(), shape)


def _away_from_defaults(module: nn.Module, shape: Shape) -> RateNetwork:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.3, 1.5)  # type: ignore[arg-type]
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
    network = rebuild(trace_network(module, shape), 1)
    assert isinstance(network, RateNetwork)
    return network.eval()


def spiking_network(name: str = "conv", seed: int = 0, steps: int = 5) -> SpikingNetwork:
    """The same as an SNN in eval mode, with batch norm's statistics, thresholds and biases that keep it busy."""
    return _busy(rate_network(name, seed), seed, steps)


def busy_spiking_network(module: nn.Module, shape: Shape, seed: int = 0, steps: int = 5) -> SpikingNetwork:
    """The same of any torch module."""
    torch.manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()
    return _busy(_away_from_defaults(module, shape), seed, steps)


def _busy(rate: RateNetwork, seed: int, steps: int) -> SpikingNetwork:
    network = convert(rate, steps)
    generator = torch.Generator().manual_seed(seed)
    state = network.state_dict()
    for key, value in rate.state_dict().items():
        if "running_" in key:
            state[key] = value
    for key, value in state.items():
        if key.endswith("threshold"):
            value.fill_(0.2 + 0.3 * float(torch.rand((), generator=generator)))
        elif key.endswith("bias") and not value.any():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    network.load_state_dict(state)
    return network.eval()


def random_images(shape: Shape, samples: int, seed: int = 0) -> NDArray[np.uint8]:
    """Codes ``(samples, *shape)`` with many pixels at the ends of the range."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (samples, *shape))
    ends = rng.random(codes.shape)
    return np.where(ends < 0.15, 0, np.where(ends > 0.85, 255, codes)).astype(np.uint8)


def easy_data(samples: int, shape: Shape = (1, 8, 8), classes: int = 4, seed: int = 0) -> Dataset:
    """Images a small network learns in seconds: one fixed pattern per class, with noise."""
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(123).integers(60, 200, (classes, *shape))
    labels = np.arange(samples) % classes
    codes = patterns[labels] + rng.integers(-50, 51, (samples, *shape))
    return Dataset(codes.clip(0, 255).astype(np.uint8), labels.astype(np.int64))
