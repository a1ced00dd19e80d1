"""Networks at the edges of the semantics: saturation, threshold 0, wide kernels, decays, both resets."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardware.network import DECAY_UNITY, INPUT, STATE_LIMIT, InputSpec, IntegerNetwork, Population, Shape, Synapse

Rng = np.random.Generator


@st.composite
def cases(
    draw: st.DrawFn, leaky: bool | None = None, samples: int | None = 3
) -> tuple[IntegerNetwork, NDArray[np.uint8]]:
    """A network and codes for it, static or changing over time.

    Args:
        leaky: whether all populations are leaky; some, all or none if not given.
        samples: how many; drawn from 0 to 9 if not given.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    network = build_network(
        rng,
        spatial=draw(st.booleans()),
        hidden=draw(st.integers(1, 4)),
        leaking=draw(st.sampled_from([0.0, 0.5, 1.0])) if leaky is None else float(leaky),
        resets=draw(st.sampled_from([("zero",), ("subtract",), ("zero", "subtract")])),
        saturating=draw(st.booleans()),
        steps=draw(st.integers(1, 8) | st.integers(9, 24)),
    )
    count = draw(st.integers(0, 9)) if samples is None else samples
    leading = (count, network.steps) if draw(st.booleans()) else (count,)
    codes = rng.integers(0, network.input.max_code + 1, (*leading, *network.input.shape))
    codes *= rng.random(codes.shape) < 0.8
    return network, codes.astype(np.uint8)


def build_network(
    rng: Rng,
    *,
    spatial: bool,
    hidden: int,
    leaking: float,
    resets: tuple[Literal["zero", "subtract"], ...],
    saturating: bool,
    steps: int,
) -> IntegerNetwork:
    """Random populations in a row, each with skip connections from earlier ones where they fit.

    Args:
        rng: where all randomness comes from.
        spatial: whether the input has pixels; else it has features.
        hidden: spiking populations.
        leaking: share of populations whose current, membrane or both decay.
        resets: that populations may have.
        saturating: whether weights are so large that membranes are clipped.
        steps: T.
    """
    shape: Shape = (int(rng.integers(1, 4)), int(rng.integers(1, 9)), int(rng.integers(3, 9)))
    max_code = int(rng.choice([1, 15, 255]))
    constants = tuple(int(c) for c in rng.integers(1, max_code + 1, rng.integers(0, 3)))
    spec = InputSpec(shape if spatial else (shape[2],), max_code, constants)
    shapes: dict[str, Shape] = {INPUT: spec.presented_shape}
    populations: list[Population] = []
    synapses: list[Synapse] = []
    for index in range(hidden + 1):
        name = "out" if index == hidden else f"p{index}"
        source = list(shapes)[-1]
        convolves = len(shapes[source]) == 3 and index < hidden and rng.random() < 0.8
        first = (conv if convolves else dense)(rng, source, name, shapes[source])
        target_shape = first.output_shape(shapes[source])
        # A second synapse from the same source is as good as one from an earlier population.
        entering = [first, *skips(rng, name, target_shape, shapes)]
        if saturating:
            entering = [amplified(s, max_code) for s in entering]
        typical = sum(int(np.abs(s.weight).max()) * (max_code if s.source == INPUT else 1) for s in entering)
        current_decay, voltage_decay = decays(rng) if rng.random() < leaking else (DECAY_UNITY, 0)
        populations.append(
            Population(
                name=name,
                shape=target_shape,
                threshold=threshold(rng, typical),
                bias=bias(rng, target_shape, typical),
                scale=float(rng.uniform(0.5, 2 * typical + 2)),
                spiking=index < hidden,
                current_decay=current_decay,
                voltage_decay=voltage_decay,
                reset=resets[int(rng.integers(len(resets)))],
            )
        )
        shapes[name] = target_shape
        synapses += entering
    order = rng.permutation(len(synapses))
    return IntegerNetwork(spec, tuple(populations), tuple(synapses[i] for i in order), steps)


def decays(rng: Rng) -> tuple[int, int]:
    """Of current and membrane: one of them, or both."""
    current, voltage = (int(share) for share in rng.integers(0, DECAY_UNITY + 1, 2))
    return ((current, voltage), (current, 0), (DECAY_UNITY, voltage))[int(rng.integers(3))]


def threshold(rng: Rng, typical: int) -> int:
    """Often within reach, sometimes 0, sometimes where no clipped membrane passes it."""
    kind = rng.random()
    if kind < 0.15:
        return 0
    if kind < 0.25:
        return int(rng.integers(STATE_LIMIT // 64 - 1, STATE_LIMIT // 64 + 2))
    return int(rng.integers(0, 2 * typical + 2))


def bias(rng: Rng, shape: Shape, typical: int) -> NDArray[np.int64]:
    """Of both signs, one per neuron or per channel; sometimes none."""
    each = shape if rng.random() < 0.5 else (shape[0], *(1 for _ in shape[1:]))
    drawn = rng.integers(-typical // 2, typical // 2 + 1, each) * (rng.random() < 0.9)
    return np.broadcast_to(drawn, shape).copy()


def conv(rng: Rng, source: str, target: str, source_shape: Shape) -> Synapse:
    """Any kernel, stride and padding; or a kernel that pools, and so has a stride as large."""
    kernel = tuple(int(rng.integers(1, min(size, 6) + 1)) for size in source_shape[1:])
    stride, padding = int(rng.integers(1, 4)), int(rng.integers(0, max(kernel)))
    shape = (few_or_many(rng), source_shape[0], *kernel)
    if rng.random() < 0.25 and min(source_shape[1:]) >= 2:
        return pool(rng, source, target, source_shape)
    return weighted(rng, Synapse(source, target, "conv", np.zeros(shape, np.int32), 8, 0, stride, padding))


def pool(rng: Rng, source: str, target: str, source_shape: Shape) -> Synapse:
    """Sums over squares, folded into the kernel: each channel alone with weight 1, or into a further convolution."""
    size = int(rng.integers(2, min(3, *source_shape[1:]) + 1))
    channels = source_shape[0]
    outputs = channels if rng.random() < 0.5 else few_or_many(rng)
    convolved = weighted(rng, Synapse(source, target, "conv", np.zeros((outputs, channels, 1, 1), np.int32), 8))
    if outputs == channels:
        convolved = replace(convolved, weight=np.eye(channels, dtype=np.int32)[:, :, None, None], exponent=0)
    weight = np.broadcast_to(convolved.weight, (outputs, channels, size, size)).copy()
    return replace(convolved, weight=weight, stride=size)


def dense(rng: Rng, source: str, target: str, source_shape: Shape) -> Synapse:
    shape = (few_or_many(rng), int(np.prod(source_shape)))
    return weighted(rng, Synapse(source, target, "dense", np.zeros(shape, np.int32), 8))


def few_or_many(rng: Rng) -> int:
    """Outputs: mostly few, sometimes more than are summed at a time."""
    return int(rng.integers(1, 8)) if rng.random() < 0.9 else int(rng.integers(8, 80))


def skips(rng: Rng, target: str, target_shape: Shape, earlier: dict[str, Shape]) -> list[Synapse]:
    """Synapses from any source before, where a shape that fits is found."""
    found = []
    for source, shape in earlier.items():
        if rng.random() < 0.4:
            continue
        if len(target_shape) == 3 and len(shape) != 3:
            continue
        for _ in range(8):
            candidate = (conv if len(target_shape) == 3 else dense)(rng, source, target, shape)
            weight = np.resize(candidate.weight, (target_shape[0], *candidate.weight.shape[1:]))
            candidate = replace(candidate, weight=weight)
            if candidate.output_shape(shape) == target_shape:
                found.append(candidate)
                break
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
