"""From a float network to a checked integer one: seconds and memory of each stage, and where the network would lie.

Run it as ``python -m tests.benchmarks.bench_quantize``, with ``--full`` for VGG-11 at its published width too.

The networks are the zoo's, for 32x32 colour images and 10 classes, their channels reduced by the factor in the table.
They have fresh weights, which cost what trained ones do, and see blurred noise. Each network is converted, quantised
to 8 bits, held against the rules of Loihi 2 and of a plain integer accelerator, proven, and run; emulator and reference
must then agree on every spike and membrane. Each runs in a process of its own, so that the peak memory is its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from hardware.bounds import prove
from hardware.emulator import run_emulator
from hardware.network import IntegerNetwork
from hardware.reference import run_reference
from hardware.targets.generic_int8 import GENERIC_INT8
from hardware.targets.loihi2 import LOIHI2
from hardware.targets.rules import check, placement
from hardware.trace import compare_traces
from pipeline.attacks.targets import to_images
from pipeline.compute import use_cpu
from pipeline.conversion import calibrate, convert, later_in_block
from pipeline.models.spiking import RateNetwork, SpikingNetwork, rebuild
from pipeline.models.tracing import trace_network
from pipeline.models.zoo import build
from pipeline.quantization import quantize

IMAGE, CLASSES, STEPS, BITS = (3, 32, 32), 10, 8, 8
REDUCED = {"vgg11": 0.25, "wrn-16-4": 0.25}
FULL = {"vgg11": 1.0}
PERCENTILE, SCALE = 99.7, 0.3
Codes = NDArray[np.uint8]


def blurred_noise(samples: int) -> Codes:
    """Codes ``(samples, 3, 32, 32)`` of neighbouring pixels that are alike, as in photographs."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(samples, IMAGE[0], 8, 8, generator=generator)
    fine = F.interpolate(coarse, IMAGE[1:], mode="bicubic") + 0.1 * torch.randn(samples, *IMAGE, generator=generator)
    codes: Codes = (255 * fine.clamp(0, 1)).round().numpy().astype(np.uint8)
    return codes


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Print the seconds of a stage, those of the processor, and the most memory that this process held so far."""
    began, began_working = time.perf_counter(), time.process_time()
    yield
    taken, worked = time.perf_counter() - began, time.process_time() - began_working
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  {stage:32s}{taken:8.1f} s{worked:8.1f} s of CPU{peak:8.2f} GiB", flush=True)


def converted(name: str, width: float, options: argparse.Namespace) -> SpikingNetwork:
    """The spiking network, thresholds calibrated."""
    rate = rebuild(trace_network(build(name, "cifar10", CLASSES, width, IMAGE), IMAGE), STEPS)
    assert isinstance(rate, RateNetwork)
    spiking = convert(rate, STEPS)
    later = options.batches if later_in_block(spiking.graph) else 0
    batches = to_images(blurred_noise((options.batches + later) * options.batch)).split(options.batch)
    calibrate(
        spiking,
        batches[: options.batches],
        percentile=PERCENTILE,
        calibration_steps=options.calibration_steps,
        scale=SCALE,
        second_batches=batches[options.batches :],
    )
    return spiking


def show_placement(network: IntegerNetwork) -> None:
    """Print what each target says, and what the network takes there."""
    for target in (LOIHI2, GENERIC_INT8):
        broken, placed = check(network, target), placement(network, target)
        widest = {name: max(getattr(p, name) for p in placed.populations) for name in ("fan_in", "fan_out")}
        print(
            f"  {target.name}: {placed.neurons:,} neurons, {placed.connections:,} connections, "
            f"{placed.memory_bytes / 2**20:.1f} MiB, fan-in up to {widest['fan_in']:,}, fan-out {widest['fan_out']:,}"
        )
        if placed.minimum_cores is not None:
            print(f"    at least {placed.minimum_cores:,} cores on {placed.minimum_chips} chips")
        for row in broken:
            print(f"    {row.object}: {row.rule}: {row.actual}, limit {row.limit}; {row.remedy}")


def measure(name: str, width: float, options: argparse.Namespace) -> None:
    """All stages of one network."""
    use_cpu(1)
    torch.manual_seed(0)
    print(f"\n{name}, width {width:g}, {options.batches} x {options.batch} images, {options.images} to calibrate on:")
    began = time.perf_counter()
    with timed("convert"):
        spiking = converted(name, width, options)
    codes = blurred_noise(options.images)
    with timed(f"quantise to {BITS} bits"):
        network = quantize(spiking, codes, BITS, {}).network
    with timed("check the rules of two targets"):
        broken = [*check(network, LOIHI2), *check(network, GENERIC_INT8)]
    with timed("prove"):
        rows = prove(network)
    print(f"  float to checked: {time.perf_counter() - began:.1f} s, {len(broken)} rules broken")
    shown = codes[: options.shown]
    with timed(f"emulate {len(shown)} images, traces"):
        emulated = run_emulator(network, shown, "traces")
    with timed(f"reference, {len(shown)} images"):
        expected = run_reference(network, shown)
    if not compare_traces(expected, emulated).equal:
        raise SystemExit(f"{name}: emulator and reference differ")
    if any(row.can_wrap for row in rows):
        raise SystemExit(f"{name}: a sum can wrap")
    rates = [p.spikes.mean() for p in emulated.populations.values() if p.spikes is not None]
    print(f"  every spike and membrane equal; spikes per neuron and step {min(rates):.3f} to {max(rates):.3f}")
    show_placement(network)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="VGG-11 at its published width too")
    parser.add_argument("--only-full", action="store_true", help="and nothing else")
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--calibration-steps", type=int, default=100)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--shown", type=int, default=2)
    options = parser.parse_args()
    networks = [] if options.only_full else list(REDUCED.items())
    networks += FULL.items() if options.full or options.only_full else []
    for name, width in networks:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(name, width, options))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
