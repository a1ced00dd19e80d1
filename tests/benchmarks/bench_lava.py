"""Speed of certification on Lava: samples back to back in one run against a run for each, start-up told apart.

Run it as ``python -m tests.benchmarks.bench_lava``. Both ways take turns within each repetition, so that other load on
the machine meets both alike, and every spike and membrane of both is compared with the reference's. Rates are of the
whole runs, start-up included; what a sample takes once Lava steps, and what it takes to get there, stand beside them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from numpy.typing import NDArray

from hardware.network import InputSpec, IntegerNetwork, Population, Shape, Synapse
from hardware.reference import run_reference
from hardware.runtimes.lava import LavaRuntime
from hardware.trace import compare_traces
from tests.benchmarks import emulator_networks
from tests.benchmarks.emulator_networks import neurons

STEPS = 8
Images = NDArray[np.uint8]


@dataclass
class Measured:
    """Seconds of each repetition: altogether, in start-ups, and in time steps."""

    total: list[float] = field(default_factory=list)
    startup: list[float] = field(default_factory=list)
    stepping: list[float] = field(default_factory=list)


def digits_network() -> IntegerNetwork:
    """conv8 - conv16/2 - dense10 on 8x8, with random 8-bit weights."""
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> NDArray[np.int32]:
        return rng.integers(-60, 61, shape).astype(np.int32)

    def population(name: str, shape: Shape, threshold: int, *, spiking: bool = True) -> Population:
        return Population(name, shape, threshold, rng.integers(-20, 21, shape), 1.0, spiking=spiking)

    return IntegerNetwork(
        InputSpec((1, 8, 8)),
        (
            population("conv1", (8, 8, 8), 4000),
            population("conv2", (16, 4, 4), 150),
            population("dense", (10,), 0, spiking=False),
        ),
        (
            Synapse("input", "conv1", "conv", weights(8, 1, 3, 3), 8, padding=1),
            Synapse("conv1", "conv2", "conv", weights(16, 8, 3, 3), 8, stride=2, padding=1),
            Synapse("conv2", "dense", "dense", weights(10, 256), 8),
        ),
        STEPS,
    )


def random_images(network: IntegerNetwork, samples: int) -> Images:
    """Codes ``(samples, *shape)``."""
    return np.random.default_rng(1).integers(0, 256, (samples, *network.input.shape)).astype(np.uint8)


def run_apart(runtime: LavaRuntime, images: Images, measured: Measured) -> int:
    """A run for each image; returns how many spikes and membranes are wrong."""
    return measure(runtime, [images[row : row + 1] for row in range(len(images))], measured)


def run_together(runtime: LavaRuntime, images: Images, measured: Measured) -> int:
    """One run for all; returns how many spikes and membranes are wrong."""
    return measure(runtime, [images], measured)


def measure(runtime: LavaRuntime, batches: list[Images], measured: Measured) -> int:
    """Run the batches one after the other."""
    wrong, seconds, startup, stepping = 0, 0.0, 0.0, 0.0
    for batch in batches:
        begun = time.perf_counter()
        trace = runtime.run(batch, "traces")
        seconds += time.perf_counter() - begun
        assert runtime.last_run is not None
        startup, stepping = startup + runtime.last_run.startup, stepping + runtime.last_run.stepping
        difference = compare_traces(run_reference(runtime.network, batch), trace)
        assert difference.spikes is not None
        assert difference.membranes is not None
        wrong += difference.spikes + difference.membranes
    measured.total.append(seconds)
    measured.startup.append(startup)
    measured.stepping.append(stepping)
    return wrong


WAYS: dict[str, Callable[[LavaRuntime, Images, Measured], int]] = {
    "a run for each": run_apart,
    "back to back": run_together,
}


def compare(name: str, network: IntegerNetwork, samples: int, repetitions: int) -> None:
    """Print both ways' rates, their ratio, and the mismatches."""
    runtime, images = LavaRuntime(network), random_images(network, samples)
    results, wrong = {way: Measured() for way in WAYS}, 0
    for _ in range(repetitions):
        for way, run in WAYS.items():
            wrong += run(runtime, images, results[way])
    size = f"{neurons(network):,} neurons, T = {network.steps}"
    print(f"\n{name}, {size}: {samples} samples, {repetitions} repetitions, {wrong} mismatches")
    print(f"{'':16}{'samples/s':>10}{'start-up':>10}{'stepping':>16}")
    for way, measured in results.items():
        rate, startup = samples / median(measured.total), median(measured.startup)
        print(f"{way:16}{rate:10.2f}{startup:9.2f}s{samples / median(measured.stepping):12.2f}/s")
    apart, together = (measured.total for measured in results.values())
    ratios = [before / after for before, after in zip(apart, together, strict=True)]
    print(f"back to back is {median(ratios):.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f})")


def main() -> None:
    """Measure both sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    compare("8x8", digits_network(), options.samples, options.repetitions)
    compare("28x28", emulator_networks.random_network(steps=STEPS), options.samples, options.repetitions)


if __name__ == "__main__":
    main()
