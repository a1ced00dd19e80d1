"""Speed of one robust fine-tuning step, batch norm in training mode, against plain snnTorch stepping.

Run it as ``python -m tests.benchmarks.bench_training_step``.

Both networks hold the same weights and follow the same objective: RFGSM on the KL divergence in eval mode, then the
loss with gradients through both branches. snnTorch steps through time as its tutorials do, all layers of a step before
the next step, so that its batch norm sees one step at a time and the first convolution is done at every step. Variants
take turns within each repetition, so that other load on the machine meets all alike.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import snntorch
import torch
from snntorch import surrogate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.compute import use_cpu
from pipeline.conversion import calibrate, convert
from pipeline.models.spiking import RateNetwork, SpikingNetwork, rebuild
from pipeline.models.tracing import trace_network
from pipeline.models.zoo import build
from pipeline.neurons import Leaky
from pipeline.objectives import robust_finetuning
from tests.benchmarks.bench_attack_step import PLAIN, peak_flops, take_turns

STEPS, CLASSES, EPSILON, BETA = 8, 10, 0.1, 2.0
OURS = "spikeguard"
FORWARDS = 9
"""Forward passes' worth of products: the clean logits 1, the attack 2, and 3 for each branch of the loss."""


class Stepped(nn.Module):
    """The same network as snnTorch's tutorials run one."""

    def __init__(self, network: SpikingNetwork) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            snntorch.Leaky(
                beta=1.0,
                threshold=float(layer.effective_threshold.detach()),
                learn_threshold=True,
                reset_mechanism="zero",
                spike_grad=surrogate.triangular(),
            )
            if isinstance(layer, Leaky)
            else copy.deepcopy(layer)
            for layer in network.layers.values()
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(samples, classes)``."""
        membranes = {i: layer.reset_mem() for i, layer in enumerate(self.layers) if isinstance(layer, snntorch.Leaky)}
        total = torch.zeros(())
        for _ in range(STEPS):
            activity = images
            for index, layer in enumerate(self.layers):
                if index in membranes:
                    activity, membranes[index] = layer(activity, membranes[index])
                else:
                    activity = layer(activity)
            total = total + activity
        return total / STEPS


def spiking(name: str, shape: tuple[int, ...], width: float) -> SpikingNetwork:
    """A network of the zoo with fresh weights, converted."""
    torch.manual_seed(0)
    rate = rebuild(trace_network(build(name, "", CLASSES, width, shape), shape), STEPS)
    assert isinstance(rate, RateNetwork)
    network = convert(rate, STEPS)
    calibrate(network, [torch.rand(8, *shape)], percentile=99.7, calibration_steps=20, scale=0.3)
    return network


def training_step(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step without the optimiser's."""
    objective = robust_finetuning(EPSILON, BETA)

    def work() -> None:
        network.zero_grad()
        objective(network, images, labels, torch.Generator().manual_seed(0)).backward()

    return work


def measure(name: str, shape: tuple[int, ...], width: float, batch: int, repetitions: int) -> None:
    """Print the times and their ratio for one network."""
    network = spiking(name, shape, width)
    images, labels = torch.rand(batch, *shape), torch.randint(CLASSES, (batch,))
    works = {
        PLAIN: training_step(Stepped(network), images, labels),
        OURS: training_step(network, images, labels),
    }
    timings = take_turns(works, repetitions)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    peak = peak_flops()
    share = FORWARDS * counter.get_total_flops() / timings.best(OURS) / peak
    print(
        f"{name} width {width:g}, {shape}, batch {batch}, T {STEPS}: snnTorch {timings.typical(PLAIN) * 1e3:.0f} ms, "
        f"ours {timings.typical(OURS) * 1e3:.0f} ms, ratio {timings.ratio(OURS):.2f}; "
        f"{share:.0%} of the {peak / 1e9:.0f} GFLOP/s of a large product"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    use_cpu(options.threads)
    measure("cnn-28", (1, 28, 28), 1.0, 64, options.repetitions)
    measure("vgg11", (3, 32, 32), 0.25, 16, options.repetitions)


if __name__ == "__main__":
    main()
