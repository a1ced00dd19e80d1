"""Networks at the edges of the semantics: saturation, threshold 0, wide kernels, decays, both resets."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardware.network import DECAY_UNITY, INPUT, InputSpec, IntegerNetwork, Population, Shape, Synapse

Rng = np.random.Generator


@st.composite
def cases(draw: st.DrawFn, leaky: bool | None = None) -> tuple[IntegerNetwork, NDArray[np.uint8]]:
    """A network and codes for it, static or changing over time."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    network = build_network(
        rng,
        spatial=draw(st.booleans()),
        hidden=draw(st.integers(1, 4)),
        leaky=draw(st.booleans()) if leaky is None else leaky,
        reset=draw(st.sampled_from(["zero", "subtract"])),
        saturating=draw(st.booleans()),
        steps=draw(st.integers(1, 8)),
    )
    leading = (3, network.steps) if draw(st.booleans()) else (3,)
    codes = rng.integers(0, network.input.max_code + 1, (*leading, *network.input.shape))
    codes *= rng.random(codes.shape) < 0.8
    return network, codes.astype(np.uint8)


def build_network(
    rng: Rng,
    *,
    spatial: bool,
    hidden: int,
    leaky: bool,
    reset: Literal["zero", "subtract"],
    saturating: bool,
    steps: int,
) -> IntegerNetwork:
    """Random populations in a row, each with skip connections from earlier ones where they fit."""
    shape: Shape = (int(rng.integers(1, 3)), int(rng.integers(3, 8)), int(rng.integers(3, 8)))
    max_code = int(rng.choice([1, 15, 255]))
    constants = tuple(int(c) for c in rng.integers(1, max_code + 1, rng.integers(0, 3)))
    spec = InputSpec(shape if spatial else (shape[1],), max_code, constants)
    shapes: dict[str, Shape] = {INPUT: spec.presented_shape}
    populations: list[Population] = []
    synapses: list[Synapse] = []
    for index in range(hidden + 1):
        name = "out" if index == hidden else f"p{index}"
        source = list(shapes)[-1]
        convolves = len(shapes[source]) == 3 and index < hidden and rng.random() < 0.8
        first = (conv if convolves else dense)(rng, source, name, shapes[source])
        target_shape = first.output_shape(shapes[source])
        entering = [first, *skips(rng, name, target_shape, dict(list(shapes.items())[:-1]))]
        if saturating:
            entering = [amplified(s, max_code) for s in entering]
        typical = sum(int(np.abs(s.weight).max()) * (max_code if s.source == INPUT else 1) for s in entering)
        populations.append(
            Population(
                name=name,
                shape=target_shape,
                threshold=0 if rng.random() < 0.2 else int(rng.integers(0, 2 * typical + 2)),
                bias=rng.integers(-typical // 2, typical // 2 + 1, target_shape),
                scale=float(rng.uniform(0.5, 2 * typical + 2)),
                spiking=index < hidden,
                current_decay=int(rng.integers(0, DECAY_UNITY + 1)) if leaky else DECAY_UNITY,
                voltage_decay=int(rng.integers(0, DECAY_UNITY + 1)) if leaky else 0,
                reset=reset,
            )
        )
        shapes[name] = target_shape
        synapses += entering
    return IntegerNetwork(spec, tuple(populations), tuple(synapses), steps)


def conv(rng: Rng, source: str, target: str, source_shape: Shape) -> Synapse:
    kernel = tuple(int(rng.integers(1, min(size, 6) + 1)) for size in source_shape[1:])
    shape = (int(rng.integers(1, 5)), source_shape[0], *kernel)
    stride, padding = int(rng.integers(1, 4)), int(rng.integers(0, max(kernel)))
    return weighted(rng, Synapse(source, target, "conv", np.zeros(shape, np.int32), 8, 0, stride, padding))


def dense(rng: Rng, source: str, target: str, source_shape: Shape) -> Synapse:
    shape = (int(rng.integers(1, 8)), int(np.prod(source_shape)))
    return weighted(rng, Synapse(source, target, "dense", np.zeros(shape, np.int32), 8))


def skips(rng: Rng, target: str, target_shape: Shape, earlier: dict[str, Shape]) -> list[Synapse]:
    """Synapses from further sources, where a shape that fits is found."""
    found = []
    for source, shape in earlier.items():
        if rng.random() < 0.4:
            continue
        candidate = (
            conv(rng, source, target, shape)
            if len(target_shape) == len(shape) == 3
            else dense(rng, source, target, shape)
        )
        weight = np.resize(candidate.weight, (target_shape[0], *candidate.weight.shape[1:]))
        candidate = replace(candidate, weight=weight)
        if candidate.output_shape(shape) == target_shape:
            found.append(candidate)
    return found


def weighted(rng: Rng, synapse: Synapse) -> Synapse:
    bits, exponent = int(rng.integers(2, 9)), int(rng.integers(0, 3))
    high = 2 ** (bits - 1)
    weight = rng.integers(-high, high, synapse.weight.shape).astype(np.int32) << exponent
    return replace(synapse, weight=weight, bits=bits, exponent=exponent)


def amplified(synapse: Synapse, max_code: int) -> Synapse:
    """Weights so large that few steps fill a 24-bit membrane."""
    largest = np.abs(synapse.weight.astype(np.int64)).reshape(len(synapse.weight), -1).sum(1).max()
    reach = max(1, int(largest) * (max_code if synapse.source == INPUT else 1))
    shift = max(0, int(np.log2(2**17 / reach)))
    return replace(synapse, weight=synapse.weight << shift, exponent=synapse.exponent + shift)
