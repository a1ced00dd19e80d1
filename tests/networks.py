"""Random integer networks for property tests: every shape of graph the formats and runtimes must carry.

Weights are drawn so that no step's sum can leave 2**17 weight units, and thresholds near the typical sum, so
that the populations are neither silent nor always on.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardware.network import DECAY_UNITY, INPUT, InputSpec, IntegerNetwork, Population, Shape, Synapse

Rng = np.random.Generator
SUM_LIMIT = 2**15

ConvBias = Literal["none", "channel", "neuron"]


def random_network(
    rng: Rng,
    *,
    kind: Literal["conv", "dense"] = "conv",
    dag: bool = False,
    conv_bias: ConvBias = "channel",
    constant_channels: int = 0,
    leaky: bool = False,
    reset: Literal["zero", "subtract"] = "zero",
    max_code: int = 255,
    steps: int | None = None,
    hidden: int | None = None,
) -> IntegerNetwork:
    """A small well-formed network.

    Args:
        rng: where all randomness comes from.
        kind: "conv" puts convolutions before a dense part, "dense" has dense populations only.
        dag: let populations read further sources besides the one before them.
        conv_bias: what bias convolutional populations get.
        constant_channels: number of constant input channels.
        leaky: draw current and voltage decays.
        reset: of every spiking population.
        max_code: largest input code.
        steps: T, drawn from 1..6 if not given.
        hidden: number of spiking populations, drawn from 1..4 if not given.
    """
    shape: Shape = (int(rng.integers(1, 3)), 6, 6) if kind == "conv" else (int(rng.integers(3, 9)),)
    codes = tuple(int(c) for c in rng.integers(1, max_code + 1, constant_channels))
    spec = InputSpec(shape, max_code, codes)
    shapes: dict[str, Shape] = {INPUT: spec.presented_shape}
    populations: list[Population] = []
    synapses: list[Synapse] = []
    count = int(rng.integers(1, 5)) if hidden is None else hidden
    previous = INPUT
    for index in range(count + 1):
        last = index == count
        name = "out" if last else f"pop{index}"
        convolves = kind == "conv" and not last and (len(shapes[previous]) == 3) and (index == 0 or rng.random() < 0.7)
        first = _random_conv(rng, previous, name) if convolves else _random_dense(rng, previous, name)
        entering = [first(shapes[previous])]
        target_shape = entering[0].output_shape(shapes[previous])
        if dag:
            entering += _extra_synapses(rng, name, target_shape, shapes)
        entering = _within_limit(rng, entering, max_code)
        shapes[name] = target_shape
        synapses += entering
        populations.append(
            Population(
                name=name,
                shape=target_shape,
                threshold=0 if last else _threshold(rng, entering, max_code),
                bias=_bias(rng, target_shape, conv_bias),
                scale=float(rng.uniform(0.5, 300.0)),
                spiking=not last,
                current_decay=int(rng.integers(1000, DECAY_UNITY + 1)) if leaky else DECAY_UNITY,
                voltage_decay=int(rng.integers(0, 2000)) if leaky else 0,
                reset="zero" if last else reset,
            )
        )
        previous = name
    order = rng.permutation(len(synapses)) if dag else np.arange(len(synapses))
    return IntegerNetwork(
        spec,
        tuple(populations),
        tuple(synapses[i] for i in order),
        int(rng.integers(1, 7)) if steps is None else steps,
        {"seed": 7, "note": "drawn for a test"},
    )


def random_codes(rng: Rng, network: IntegerNetwork, samples: int = 4, *, timed: bool = False) -> NDArray[np.uint8]:
    """Input codes ``(samples, [steps,] *shape)``."""
    leading = (samples, network.steps) if timed else (samples,)
    return rng.integers(0, network.input.max_code + 1, (*leading, *network.input.shape)).astype(np.uint8)


@st.composite
def networks(draw: st.DrawFn, /, **fixed: Any) -> IntegerNetwork:
    """Hypothesis strategy over :func:`random_network`; ``fixed`` options are not drawn."""
    options: dict[str, Any] = {
        "kind": draw(st.sampled_from(["conv", "dense"])),
        "dag": draw(st.booleans()),
        "conv_bias": draw(st.sampled_from(["none", "channel", "neuron"])),
        "constant_channels": draw(st.integers(0, 2)),
        "leaky": draw(st.booleans()),
        "reset": draw(st.sampled_from(["zero", "subtract"])),
        "max_code": draw(st.sampled_from([1, 255])),
    }
    return random_network(np.random.default_rng(draw(st.integers(0, 2**32 - 1))), **{**options, **fixed})


def same_network(left: IntegerNetwork, right: IntegerNetwork) -> bool:
    """Whether every field of two networks is equal, arrays bit for bit and of one type."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, np.ndarray):
            return bool(a.dtype == b.dtype and np.array_equal(a, b))
        if isinstance(a, (InputSpec, Population, Synapse)):
            return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
        if isinstance(a, tuple):
            return len(a) == len(b) and all(map(same, a, b))
        return bool(a == b)

    return all(same(getattr(left, f.name), getattr(right, f.name)) for f in fields(IntegerNetwork))


def _random_conv(rng: Rng, source: str, target: str) -> Any:
    def build(source_shape: Shape) -> Synapse:
        kernel = int(rng.choice([1, 2, 3])) if min(source_shape[1:]) >= 3 else 1
        padding = int(rng.integers(0, (kernel + 1) // 2 + 1)) if kernel > 1 else 0
        shape = (int(rng.integers(1, 4)), source_shape[0], kernel, kernel)
        return _synapse(rng, source, target, "conv", shape, stride=int(rng.integers(1, 3)), padding=padding)

    return build


def _random_dense(rng: Rng, source: str, target: str) -> Any:
    def build(source_shape: Shape) -> Synapse:
        outputs = int(rng.integers(2, 6))
        return _synapse(rng, source, target, "dense", (outputs, int(np.prod(source_shape))))

    return build


def _extra_synapses(rng: Rng, target: str, target_shape: Shape, shapes: dict[str, Shape]) -> list[Synapse]:
    """Further synapses into a population, from any earlier source that fits."""
    extra = []
    for source, source_shape in shapes.items():
        if rng.random() < 0.5:
            continue
        if len(target_shape) == 1:
            extra.append(_synapse(rng, source, target, "dense", (target_shape[0], int(np.prod(source_shape)))))
        elif len(source_shape) == 3:
            candidate = _synapse(
                rng,
                source,
                target,
                "conv",
                (target_shape[0], source_shape[0], 1, 1),
                stride=int(rng.integers(1, 4)),
            )
            if candidate.output_shape(source_shape) == target_shape:
                extra.append(candidate)
    return extra


def _synapse(
    rng: Rng,
    source: str,
    target: str,
    kind: Literal["conv", "dense"],
    shape: Shape,
    *,
    stride: int = 1,
    padding: int = 0,
) -> Synapse:
    bits = int(rng.choice([4, 8, 9]))
    high = 2 ** (bits - 1) - 1
    weight = rng.integers(-high - 1, high + 1, shape).astype(np.int32)
    return Synapse(source, target, kind, weight, bits, stride=stride, padding=padding)


def _within_limit(rng: Rng, entering: list[Synapse], max_code: int) -> list[Synapse]:
    """The same synapses with weights scaled down until their sums fit, and now and then on an even grid."""
    total = sum(_largest_sum(s, max_code) for s in entering)
    shrink = max(1, -(-total // SUM_LIMIT))
    result = []
    for synapse in entering:
        exponent = int(rng.integers(0, 2))
        values = (np.sign(synapse.weight) * (np.abs(synapse.weight) // shrink)).astype(np.int64)
        grid = (values >> exponent) << exponent
        result.append(
            Synapse(
                synapse.source,
                synapse.target,
                synapse.kind,
                grid.astype(np.int32),
                synapse.bits,
                exponent,
                synapse.stride,
                synapse.padding,
            )
        )
    return result


def _largest_sum(synapse: Synapse, max_code: int) -> int:
    largest = max_code if synapse.source == INPUT else 1
    return int(np.abs(synapse.weight.astype(np.int64)).reshape(len(synapse.weight), -1).sum(1).max()) * largest


def _threshold(rng: Rng, entering: list[Synapse], max_code: int) -> int:
    largest = sum(_largest_sum(s, max_code) for s in entering)
    return int(rng.integers(0, max(2, largest // 6)))


def _bias(rng: Rng, shape: Shape, conv_bias: ConvBias) -> NDArray[np.int64]:
    if len(shape) == 1:
        return rng.integers(-20, 21, shape)
    if conv_bias == "neuron":
        return rng.integers(-20, 21, shape)
    if conv_bias == "channel":
        return np.ascontiguousarray(np.broadcast_to(rng.integers(-20, 21, (shape[0], 1, 1)), shape))
    return np.zeros(shape, np.int64)
