"""Speed of the emulator against stock Lava and plain snnTorch inference, and how it scales.

Run it as ``python -m tests.benchmarks.bench_emulator``.

All run the same network with the same spikes, conv16 - conv32/2 - conv32/2 - dense10 on 28x28 with 20,394 neurons,
and take turns within each repetition, so that other load on the machine meets all alike. The emulator and snnTorch
have one thread; Lava's processes take what cores there are. snnTorch is fed in the memory format in which it is
faster. Lava's start-up is reported apart from its steps, and the ratio is of the steps alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray

from hardware.emulator import Emulator, run_emulator
from hardware.network import IntegerNetwork
from hardware.runtimes.lava import LavaRuntime
from hardware.targets.rules import count_activity
from pipeline.compute import use_cpu
from tests.benchmarks.bench_attack_step import peak_flops, take_turns
from tests.benchmarks.emulator_networks import (
    CALIBRATION,
    STEPS,
    SnnTorch,
    dense_operations,
    event_operations,
    neurons,
    random_images,
    random_network,
)

BATCHES = (1, 128, 1024)
ALL_STEPS = (1, 2, 4, 8, 16, 32, 64)
ALL_BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
ALL_WIDENINGS = (0.5, 1.0, 2.0, 4.0)
SCALING_BATCH = 128
SHORTEST = 128
Images = NDArray[np.uint8]
Work = Callable[[], object]


def in_batches(run: Callable[[Images], object], images: Images, batch: int) -> Work:
    """Run one batch, or at least ``SHORTEST`` images in batches: few are too short to time, and soon known by heart."""

    def work() -> None:
        for first in range(0, max(batch, SHORTEST), batch):
            run(images[first : first + batch])

    return work


def faster_format(network: IntegerNetwork, images: Images) -> SnnTorch:
    """snnTorch's network in the faster of two memory formats, after a check that it answers like the emulator."""
    codes = torch.from_numpy(images).float()
    models = {str(one): SnnTorch(network, one) for one in (torch.contiguous_format, torch.channels_last)}
    expected = run_emulator(network, images).readouts
    for name, model in models.items():
        if not np.array_equal(model(codes).numpy(), expected):
            raise SystemExit(f"snnTorch ({name}) and the emulator answer differently: there is nothing to compare")
    trial = take_turns({name: partial(model, codes) for name, model in models.items()}, 3)
    name = min(models, key=trial.best)
    print(f"snnTorch runs with {name}")
    return models[name]


def against_snntorch(network: IntegerNetwork, model: SnnTorch, images: Images, repetitions: int) -> float:
    """Print samples per second by batch; the emulator's at the largest batch."""
    runs: dict[str, Callable[[Images], object]] = {
        "emulator": Emulator(network).run,
        "snnTorch": lambda some: model(torch.from_numpy(some).float()),
    }
    works = {f"{name} {batch}": in_batches(run, images, batch) for batch in BATCHES for name, run in runs.items()}
    timings = take_turns(works, repetitions)
    print(
        f"\n{'samples/s':>10s}{'emulator':>12s}{'snnTorch':>12s}{'ratio':>9s}   (medians; of the ratios within a turn)"
    )
    for batch in BATCHES:
        ours, theirs = (np.array(timings.seconds[f"{name} {batch}"]) for name in ("emulator", "snnTorch"))
        speeds = (max(batch, SHORTEST) / np.median(seconds) for seconds in (ours, theirs))
        print(f"{f'batch {batch}':>10s}" + "".join(f"{speed:12,.0f}" for speed in speeds), end="")
        print(f"{np.median(theirs / ours):9.2f}")
    return BATCHES[-1] / timings.typical(f"emulator {BATCHES[-1]}")


def against_lava(network: IntegerNetwork, images: Images, samples: int, repetitions: int) -> None:
    """Print the samples per second of both, in turns."""
    lava, emulator = LavaRuntime(network), Emulator(network)
    expected, ours, steps, starts = emulator.run(images).readouts, [], [], []
    for _ in range(repetitions):
        ours.append(take_turns({"emulator": partial(emulator.run, images)}, 3).typical("emulator") / len(images))
        if not np.array_equal(lava.run(images[:samples]).readouts, expected[:samples]):
            raise SystemExit("Lava and the emulator answer differently: there is nothing to compare")
        assert lava.last_run is not None
        steps.append(lava.last_run.stepping / samples)
        starts.append(lava.last_run.startup)
    ratios = np.array(steps) / np.array(ours)
    print(f"\nstock Lava ({lava.version}), {samples} samples a run, {repetitions} runs:")
    print(
        f"  Lava {1 / np.median(steps):,.1f} samples/s (best {1 / min(steps):,.1f}), start-up {np.median(starts):.1f} s"
    )
    print(f"  emulator {1 / np.median(ours):,.0f} samples/s at batch {len(images)}")
    print(f"  ratio {np.median(ratios):,.0f} (smallest {ratios.min():,.0f}, largest {ratios.max():,.0f})")


def report_operations(network: IntegerNetwork, images: Images, speed: float) -> None:
    """Print what the synaptic work amounts to, of the peak of a float32 matrix product on this core."""
    peak = peak_flops()
    print(f"\nof one core's peak in a float32 matrix product, {peak / 1e9:.0f} GFLOP/s, at {speed:,.0f} samples/s:")
    for name, operations in (
        ("dense equivalent", dense_operations(network)),
        ("event-driven", event_operations(network, images)),
    ):
        rate = operations * speed
        print(f"  {name:17s}{operations / 1e6:7.2f} M operations/sample{rate / 1e9:8.1f} G/s{rate / peak:8.0%}")


@dataclass(frozen=True)
class Scaling:
    """Samples per second over one quantity.

    Attributes:
        costs: names of what might cost a fixed time each, and how many of them each point has.
    """

    quantity: str
    values: Sequence[float]
    speeds: Sequence[float]
    costs: Mapping[str, Sequence[float]]

    def show(self) -> None:
        """Print one table."""
        print(f"\n{self.quantity:>24s}{'samples/s':>12s}{'us/sample':>12s}")
        for value, speed in zip(self.values, self.speeds, strict=True):
            print(f"{value:24,.0f}{speed:12,.0f}{1e6 / speed:12.1f}")

    def draw(self, axes: Axes) -> None:
        """Draw the measured line, and through its middle what fixed costs would give."""
        axes.loglog(self.values, self.speeds, "o-", color="#1f5fa8", label="measured")
        middle = len(self.values) // 2
        for style, (name, costs) in zip(("--", ":"), self.costs.items(), strict=False):
            fixed = [self.speeds[middle] * costs[middle] / cost for cost in costs]
            axes.loglog(self.values, fixed, style, color="#888888", label=f"fixed time per {name}")
        axes.set_xticks(list(self.values), [f"{value:,.0f}" for value in self.values])
        axes.minorticks_off()
        axes.set_xlabel(self.quantity)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower left")


def scaling(images: Images, repetitions: int) -> list[Scaling]:
    """Speed over steps, batch and neurons, each point the median of several runs."""

    def speed(network: IntegerNetwork, batch: int) -> float:
        emulator = Emulator(network)
        work = in_batches(emulator.run, images, batch)
        return max(batch, SHORTEST) / take_turns({"emulator": work}, repetitions).typical("emulator")

    by_steps = [speed(random_network(steps=steps), SCALING_BATCH) for steps in ALL_STEPS]
    network = random_network()
    by_batch = [speed(network, batch) for batch in ALL_BATCHES]
    networks = [random_network(widening) for widening in ALL_WIDENINGS]
    by_neurons = [speed(one, SCALING_BATCH) for one in networks]
    sizes = [neurons(one) for one in networks]
    return [
        Scaling("steps T", ALL_STEPS, by_steps, {"step": ALL_STEPS}),
        Scaling("batch", ALL_BATCHES, by_batch, {}),
        Scaling(
            "neurons", sizes, by_neurons, {"neuron": sizes, "synapse": [dense_operations(one) for one in networks]}
        ),
    ]


def plot(measured: Sequence[Scaling], path: Path) -> None:
    """One panel for each quantity."""
    figure, panels = plt.subplots(1, len(measured), figsize=(12, 4.2), sharey=True, layout="constrained")
    for one, axes in zip(measured, panels, strict=True):
        one.draw(axes)
    panels[0].set_ylabel("samples per second, one thread")
    speeds = [speed for one in measured for speed in one.speeds]
    ticks = [t for e in range(7) for t in (10**e, 2 * 10**e, 5 * 10**e) if min(speeds) / 2 < t < max(speeds) * 2]
    panels[0].set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    panels[0].set_ylim(min(speeds) / 1.5, max(speeds) * 1.5)
    figure.suptitle(f"Emulator: conv16 – conv32/2 – conv32/2 – dense10 on 28×28; T = {STEPS}, batch {SCALING_BATCH}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"\nplot written to {path}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--lava-samples", type=int, default=16)
    parser.add_argument("--plot", type=Path, default=Path("runs/bench/emulator_scaling.png"))
    options = parser.parse_args()
    use_cpu(1)
    network, images = random_network(), random_images(max(ALL_BATCHES))
    activity = count_activity(network, run_emulator(network, images[:CALIBRATION], "spikes"))
    rates = {p.name: activity.spikes[p.name] / (p.size * network.steps) for p in network.populations[:-1]}
    print(f"{neurons(network):,} neurons, T = {network.steps}; spikes per neuron and step:", end=" ")
    print(", ".join(f"{name} {rate:.3f}" for name, rate in rates.items()))
    model = faster_format(network, images[: BATCHES[1]])
    speed = against_snntorch(network, model, images, options.repetitions)
    report_operations(network, images[: BATCHES[1]], speed)
    against_lava(network, images[: BATCHES[1]], options.lava_samples, options.repetitions)
    measured = scaling(images, options.repetitions)
    for one in measured:
        one.show()
    plot(measured, options.plot)


if __name__ == "__main__":
    main()
