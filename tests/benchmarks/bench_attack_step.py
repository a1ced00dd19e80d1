"""Speed of one attack step and of inference against plain snnTorch stepping.

Run it as ``python -m tests.benchmarks.bench_attack_step``.

An attack step is forward and backward to the pixels in eval mode. All variants hold the same weights with batch norm
folded, run on one thread, and take turns within each repetition, so that other load on the machine meets all alike.
snnTorch gets its cheapest surrogate and the memory format in which it is faster.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import snntorch
import torch
import torch.nn.functional as F
from snntorch import surrogate
from torch import Tensor, nn

from hardware.surrogates import RATE, AdaptiveSurrogate, Surrogate
from pipeline.compute import use_cpu
from pipeline.models.folded import FoldedNetwork
from pipeline.models.graph import Layer, LayerGraph, Options
from pipeline.models.spiking import SpikingNetwork
from pipeline.neurons import Leaky

STEPS, BATCH, CLASSES = 8, 128, 10
# With random weights every layer then spikes at 6 to 15 % of its chances, as trained networks do.
THRESHOLD = 0.8
PLAIN = "snnTorch"
Model = Callable[[Tensor], Tensor]


def network() -> SpikingNetwork:
    """conv16 - conv32/2 - conv32/2 - dense10 on 28x28, with batch norm whose statistics fit its spikes."""

    def conv(name: str, sources: int, channels: int, stride: int) -> tuple[Layer, Layer, Layer]:
        sizes: Options = {
            "in_channels": sources,
            "out_channels": channels,
            "kernel_size": 3,
            "stride": stride,
            "padding": 1,
            "bias": True,
        }
        norm: Options = {"features": channels, "eps": 1e-5, "momentum": 0.1, "spatial": True}
        neurons: Options = {"beta": 1.0, "subtract": False}
        return (
            Layer(name, "conv", sizes),
            Layer(f"norm_{name}", "batch_norm", norm),
            Layer(f"spike_{name}", "spike", neurons),
        )

    features = 32 * 7 * 7
    graph = LayerGraph(
        (1, 28, 28),
        (
            Layer("normalize", "normalize", {"features": 1}),
            *conv("conv1", 1, 16, 1),
            *conv("conv2", 16, 32, 2),
            *conv("conv3", 32, 32, 2),
            Layer("flatten", "flatten"),
            Layer("dense", "linear", {"in_features": features, "out_features": CLASSES, "bias": True}),
        ),
    )
    spiking = SpikingNetwork(graph, STEPS)
    for _, neurons in spiking.neurons():
        nn.init.constant_(neurons.threshold, THRESHOLD)
    with torch.no_grad():
        for _ in range(20):
            spiking(torch.rand(16, *graph.input_shape))
    return spiking.eval()


class Stepped(nn.Module):
    """The same network as snnTorch's tutorials run one: all layers of a step before the next step."""

    def __init__(self, folded: FoldedNetwork, first_layer_once: bool, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.memory_format = memory_format
        layers = [
            snntorch.Leaky(
                beta=1.0,
                threshold=float(layer.effective_threshold),
                reset_mechanism="zero",
                spike_grad=surrogate.fast_sigmoid(),
            )
            if isinstance(layer, Leaky)
            else copy.deepcopy(layer)
            for layer in folded.layers.values()
        ]
        # Normalisation, and the first convolution if it is done once for all steps.
        once = 2 if first_layer_once else 1
        self.once, self.stepped = nn.Sequential(*layers[:once]), nn.ModuleList(layers[once:])
        self.to(memory_format=memory_format)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(samples, classes)``."""
        membranes = [layer.reset_mem() for layer in self.stepped if isinstance(layer, snntorch.Leaky)]
        presented = self.once(images.contiguous(memory_format=self.memory_format))
        total = torch.zeros(())
        for _ in range(STEPS):
            activity, index = presented, 0
            for layer in self.stepped:
                if isinstance(layer, snntorch.Leaky):
                    activity, membranes[index] = layer(activity, membranes[index])
                    index += 1
                else:
                    activity = layer(activity)
            total = total + activity
        return total / STEPS


@dataclass(frozen=True)
class Timings:
    """Seconds of each variant, one value per repetition."""

    seconds: Mapping[str, list[float]]

    def ratio(self, name: str) -> float:
        """How much faster than plain snnTorch: median over the repetitions of the quotients within one."""
        return float(np.median(np.array(self.seconds[PLAIN]) / np.array(self.seconds[name])))

    def best(self, name: str) -> float:
        """Shortest time."""
        return min(self.seconds[name])

    def typical(self, name: str) -> float:
        """Median time."""
        return float(np.median(self.seconds[name]))


def take_turns(works: Mapping[str, Callable[[], object]], repetitions: int) -> Timings:
    """Time all works in every repetition, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repetition in range(repetitions + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return Timings(seconds)


def attack_step(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the cross-entropy at the pixels."""
    pixels = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(pixels), labels, reduction="sum"), pixels)
    return gradient


@torch.no_grad()
def infer(model: Model, images: Tensor) -> Tensor:
    """Logits alone."""
    return model(images)


def peak_flops(size: int = 2048, repetitions: int = 5) -> float:
    """Operations per second of a large float32 matrix product on this core."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    timings = take_turns({"product": lambda: left @ right}, repetitions)
    return 2 * size**3 / timings.best("product")


def forward_flops(spiking: SpikingNetwork) -> float:
    """Multiplications and additions that a forward pass of the batch needs: the first layer and the readout once."""
    shapes, total = spiking.graph.shapes(), 0.0
    weighted = [layer for layer in spiking.graph.layers if layer.kind in ("conv", "linear")]
    for layer in weighted:
        positions = float(np.prod(shapes[layer.name][1:])) if layer.kind == "conv" else 1.0
        once = layer in (weighted[0], weighted[-1])
        total += 2 * spiking.state_dict()[f"layers.{layer.name}.weight"].numel() * positions * (1 if once else STEPS)
    return BATCH * total


def report(title: str, timings: Timings, flops: float, peak: float) -> None:
    """Print one table."""
    print(f"\n{title:34s}{'min ms':>9s}{'median ms':>11s}{'x snnTorch':>12s}{'of sgemm peak':>15s}")
    for name in timings.seconds:
        best, typical = 1e3 * timings.best(name), 1e3 * timings.typical(name)
        share = flops / timings.best(name) / peak
        print(f"  {name:32s}{best:9.1f}{typical:11.1f}{timings.ratio(name):12.2f}{share:15.0%}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    repetitions = parser.parse_args().repetitions
    use_cpu(1)
    torch.manual_seed(0)
    spiking = network()
    folded = FoldedNetwork(spiking)
    images, labels = torch.rand(BATCH, 1, 28, 28), torch.randint(0, CLASSES, (BATCH,))
    _, activity = spiking.record(images[:16])
    print(
        "spikes per chance:", ", ".join(f"{name} {layer.spikes.float().mean():.3f}" for name, layer in activity.items())
    )

    formats = (torch.contiguous_format, torch.channels_last)
    candidates = {format_: partial(attack_step, Stepped(folded, False, format_), images, labels) for format_ in formats}
    trial = take_turns({str(key): work for key, work in candidates.items()}, 3)
    fastest = min(formats, key=lambda format_: trial.best(str(format_)))
    stepped = {
        PLAIN: Stepped(folded, False, fastest),
        "snnTorch, first layer once": Stepped(folded, True, fastest),
    }
    print(f"snnTorch runs with {fastest}")
    models: dict[str, Model] = {**stepped, "training form": spiking, "folded": folded}
    adaptive = {name: AdaptiveSurrogate() for name in folded.neuron_names}
    with_rules: dict[str, Model] = {
        **models,
        "folded, exponential": lambda pixels: folded(pixels, Surrogate("exponential", 1.0)),
        "folded, rate": lambda pixels: folded(pixels, RATE),
        "folded, adaptive": lambda pixels: folded(pixels, adaptive),
    }
    peak = peak_flops()
    print(f"sgemm peak of one core: {peak / 1e9:.0f} GFLOP/s")
    flops = forward_flops(spiking)
    inference = {name: partial(infer, model, images) for name, model in models.items()}
    report("inference", take_turns(inference, repetitions), flops, peak)
    steps = {name: partial(attack_step, model, images, labels) for name, model in with_rules.items()}
    # Backward to the input costs each layer as many operations as forward.
    report("attack step", take_turns(steps, repetitions), 2 * flops, peak)


if __name__ == "__main__":
    main()
