"""A convolutional network of random integers that spikes like a trained one, and the same network in snnTorch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import snntorch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hardware.emulator import run_emulator
from hardware.network import INPUT, InputSpec, IntegerNetwork, Population, Shape, Synapse
from hardware.targets.rules import count_activity, fan_out

IMAGE: Shape = (1, 28, 28)
CLASSES, STEPS = 10, 8
WIDTHS, STRIDES = (16, 32, 32), (1, 2, 2)
RATES = (0.14, 0.1, 0.07)
"""Spikes per neuron and step of each layer, within the 6 to 15 % of trained networks."""
CALIBRATION = 16


def random_images(samples: int, seed: int = 0) -> NDArray[np.uint8]:
    """Codes ``(samples, 1, 28, 28)``, hardly any of them zero, which would be work saved."""
    return np.random.default_rng(seed).integers(0, 256, (samples, *IMAGE)).astype(np.uint8)


def random_network(widening: float = 1.0, steps: int = STEPS) -> IntegerNetwork:
    """conv16 - conv32/2 - conv32/2 - dense10 on 28x28, with 8-bit weights; ``widening`` multiplies the channels."""
    rng = np.random.default_rng(0)
    populations, synapses, shape, source = [], [], IMAGE, INPUT
    for index, (width, stride) in enumerate(zip(WIDTHS, STRIDES, strict=True), start=1):
        name, channels = f"conv{index}", round(width * widening)
        synapse = Synapse(source, name, "conv", _weights(rng, (channels, shape[0], 3, 3)), 8, 0, stride, 1)
        shape, source = synapse.output_shape(shape), name
        synapses.append(synapse)
        populations.append(Population(name, shape, 0, _bias(rng, shape), 1.0))
    synapses.append(Synapse(source, "dense", "dense", _weights(rng, (CLASSES, int(np.prod(shape)))), 8))
    populations.append(Population("dense", (CLASSES,), 0, _bias(rng, (CLASSES,)), 1.0, spiking=False))
    network = IntegerNetwork(InputSpec(IMAGE), tuple(populations), tuple(synapses), steps)
    for index, rate in enumerate(RATES):
        network = _with_rate(network, index, rate)
    return network


def _weights(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int32]:
    return np.clip(np.rint(32 * rng.standard_normal(shape)), -128, 127).astype(np.int32)


def _bias(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int64]:
    per_channel = rng.integers(-20, 21, (shape[0], *(1 for _ in shape[1:])))
    return np.ascontiguousarray(np.broadcast_to(per_channel, shape))


def _with_rate(network: IntegerNetwork, index: int, rate: float) -> IntegerNetwork:
    """The same with the threshold of one population at which it spikes at ``rate``, found by bisection."""
    images, low, high = random_images(CALIBRATION, seed=1), 0, 2**17
    while high - low > 1:
        middle = (low + high) // 2
        populations = list(network.populations)
        populations[index] = replace(populations[index], threshold=middle)
        network = replace(network, populations=tuple(populations))
        spikes = run_emulator(network, images, "spikes").populations[populations[index].name].spikes
        assert spikes is not None
        low, high = (middle, high) if spikes.mean() > rate else (low, middle)
    return network


def neurons(network: IntegerNetwork) -> int:
    """Neurons, the readout's included."""
    return sum(population.size for population in network.populations)


def dense_operations(network: IntegerNetwork) -> float:
    """Multiplications and additions of one image without regard to spikes, what the input does done once."""
    return sum(_connections(network, s) * 2.0 * (1 if s.source == INPUT else network.steps) for s in network.synapses)


def event_operations(network: IntegerNetwork, images: NDArray[np.uint8]) -> float:
    """What spikes leave of them: the first layer's products and sums, then one addition per spike and connection."""
    activity = count_activity(network, run_emulator(network, images, "spikes"))
    first = sum(2.0 * _connections(network, s) for s in network.synapses if s.source == INPUT)
    return first + sum(activity.synaptic_operations.values())


def _connections(network: IntegerNetwork, synapse: Synapse) -> int:
    return int(fan_out(network, synapse).sum())


class SnnTorch(nn.Module):
    """The same network as snnTorch's tutorials run one: all layers of a step before the next step, in float32.

    Its weights are the integers and its images the codes, so that it gives the very same spikes.

    Args:
        network: a chain of convolutions and a dense readout.
        memory_format: of its convolutions.
    """

    def __init__(self, network: IntegerNetwork, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.steps, self.memory_format = network.steps, memory_format
        layers: list[nn.Module] = []
        for synapse, population in zip(network.synapses, network.populations, strict=True):
            layer: nn.Conv2d | nn.Linear
            if synapse.kind == "conv":
                outputs, inputs, kernel, _ = synapse.weight.shape
                layer = nn.Conv2d(inputs, outputs, kernel, synapse.stride, synapse.padding)
            else:
                layers.append(nn.Flatten())
                layer = nn.Linear(synapse.weight.shape[1], len(synapse.weight))
            per_channel = population.bias.reshape(len(synapse.weight), -1)[:, 0].copy()
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(synapse.weight))
                assert layer.bias is not None
                layer.bias.copy_(torch.from_numpy(per_channel))
            layers.append(layer)
            if population.spiking:
                layers.append(snntorch.Leaky(beta=1.0, threshold=float(population.threshold), reset_mechanism="zero"))
        self.layers = nn.ModuleList(layers)
        self.to(memory_format=memory_format)  # type: ignore[call-overload]

    @torch.no_grad()
    def forward(self, codes: Tensor) -> Tensor:
        """Sums over the steps ``(samples, classes)``."""
        membranes = [layer.reset_mem() for layer in self.layers if isinstance(layer, snntorch.Leaky)]
        presented = codes.contiguous(memory_format=self.memory_format)
        total = torch.zeros(())
        for _ in range(self.steps):
            activity, index = presented, 0
            for layer in self.layers:
                if isinstance(layer, snntorch.Leaky):
                    activity, membranes[index] = layer(activity, membranes[index])
                    index += 1
                else:
                    activity = layer(activity)
            total = total + activity
        return total
