"""Speed of one attack step through the differentiable twin against the float network it was quantised from.

Run it as ``python -m tests.benchmarks.bench_twin``.

An attack step is forward and backward to the pixels. The network is that of ``bench_attack_step``, quantised to 8 bits;
both models run on one thread and take turns within each repetition, so that other load on the machine meets both alike.
The leaky twin has the same weights and neurons that decay, which need wider states; its float network does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hardware.network import DECAY_UNITY, IntegerNetwork
from hardware.surrogates import RATE, AdaptiveSurrogate, Surrogate
from hardware.twin import Rules, Twin
from pipeline.compute import use_cpu
from pipeline.models.folded import FoldedNetwork
from pipeline.quantization import quantize
from tests.benchmarks.bench_attack_step import BATCH, CLASSES, Timings, attack_step, infer, network, take_turns

CALIBRATION = 32
PRODUCTS = ("conv", "mm")
"""What the names of torch's matrix products and convolutions contain."""
Work = Callable[[], object]


@dataclass(frozen=True)
class Comparison:
    """One question to both models."""

    name: str
    on_float: Work
    on_twin: Work


def leaky(integer: IntegerNetwork) -> IntegerNetwork:
    """The same with a current that keeps a quarter and a membrane that keeps nine tenths."""
    decays = {"current_decay": DECAY_UNITY * 3 // 4, "voltage_decay": DECAY_UNITY // 10}
    populations = tuple(replace(p, **decays) if p.spiking else p for p in integer.populations)
    return replace(integer, populations=populations)


def comparisons(
    folded: FoldedNetwork, integer: IntegerNetwork, images: Tensor, labels: Tensor
) -> tuple[Comparison, ...]:
    """Steps through every kind of rule, and inference."""
    twin, leaky_twin = Twin(integer), Twin(leaky(integer))

    def step(model: Callable[[Tensor, Rules], Tensor], rules: Rules) -> Work:
        return partial(attack_step, lambda pixels: model(pixels, rules), images, labels)

    def compared(name: str, on_float: Rules, on_twin: Rules, other: Twin = twin) -> Comparison:
        return Comparison(name, step(folded, on_float), step(other, on_twin))

    def adaptive() -> dict[str, AdaptiveSurrogate]:
        return {name: AdaptiveSurrogate() for name in folded.neuron_names}

    triangle, exponential = Surrogate("triangle"), Surrogate("exponential")
    return (
        compared("triangle", triangle, triangle),
        compared("exponential", exponential, exponential),
        compared("rate", RATE, RATE),
        compared("adaptive", adaptive(), adaptive()),
        compared("triangle, leaky twin", triangle, triangle, leaky_twin),
        compared("adaptive, leaky twin", adaptive(), adaptive(), leaky_twin),
        Comparison("inference", partial(infer, folded, images), partial(infer, twin, images)),
    )


def product_share(work: Work) -> float:
    """Share of the time that convolutions and matrix products take."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    own = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    products = sum(
        time for name, time in own.items() if name.startswith("aten::") and any(word in name for word in PRODUCTS)
    )
    return products / sum(own.values())


def report(compared: tuple[Comparison, ...], timings: Timings, shares: Mapping[str, float]) -> None:
    """Print the table: medians, and the median over the repetitions of the quotients within one."""
    print(f"\n{'':24s}{'float ms':>10s}{'twin ms':>10s}{'twin/float':>12s}{'products':>10s}")
    for one in compared:
        on_float, on_twin = (np.array(timings.seconds[f"{one.name} {model}"]) for model in ("float", "twin"))
        medians = f"{1e3 * np.median(on_float):10.1f}{1e3 * np.median(on_twin):10.1f}"
        print(f"  {one.name:22s}{medians}{np.median(on_twin / on_float):12.2f}{shares[one.name]:10.0%}")
    print("products: share of the twin's time in convolutions and matrix products")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    repetitions = parser.parse_args().repetitions
    use_cpu(1)
    torch.manual_seed(0)
    spiking = network()
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (CALIBRATION + BATCH, *spiking.graph.input_shape)).astype(np.uint8)
    integer = quantize(spiking, codes[:CALIBRATION], 8, {}).network
    images, labels = torch.from_numpy(codes[CALIBRATION:]).float() / 255, torch.randint(0, CLASSES, (BATCH,))
    compared = comparisons(FoldedNetwork(spiking), integer, images, labels)
    works = {f"{one.name} float": one.on_float for one in compared}
    works |= {f"{one.name} twin": one.on_twin for one in compared}
    # Side by side: the two of a pair follow each other.
    timings = take_turns(dict(sorted(works.items())), repetitions)
    report(compared, timings, {one.name: product_share(one.on_twin) for one in compared})


if __name__ == "__main__":
    main()
