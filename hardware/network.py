"""The integer network: what is deployed, as frozen values and nothing else.

Meaning of one step t = 1..T, populations in topological order, spikes of step t used within step t
(the arithmetic of Loihi's fixed-point neuron; ``reference.py`` is the executable definition)::

    u <- trunc(u (4096 - current_decay) / 4096) + 64 sum(w s)
    v <- sat24(trunc(v (4096 - voltage_decay) / 4096) + u + 64 b)
    s  = [v > 64 threshold]
    v <- 0 where s   (reset "zero"),   v - 64 threshold where s   (reset "subtract")

The readout never spikes. It answers with ``sum(total + b)`` over all steps in weight units, where the total is
``sum(w s)``; one that leaks with v after the last step.

``sat24`` clips to +-(2**23 - 1). A network whose u could leave the 24-bit range must not be deployed, because hardware
wraps there; bundles prove that it cannot (``bounds.require_no_wrap``). Weights, biases and thresholds are in *weight
units*; u and v carry ``FRACTION_BITS`` more bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hardware.errors import RuleViolations, Violation

FRACTION_BITS = 6
STATE_LIMIT = 2**23 - 1
DECAY_UNITY = 4096
INPUT = "input"
SEMANTICS_VERSION = "spikeguard.semantics/1"

SUMMING_READOUT = "integer sum over steps; logits = sum / (steps * scale)"
LEAKY_READOUT = f"membrane after the last step; logits = membrane / ({1 << FRACTION_BITS} * scale)"

Shape = tuple[int, ...]
IntArray = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class InputSpec:
    """Integer codes presented to the network at every step.

    Attributes:
        shape: of one image as the user holds it, ``(channels, height, width)`` or ``(features,)``.
        max_code: largest code; 255 for 8-bit pixels, 1 for spikes.
        constant_codes: codes of the channels appended to every image. They carry the constant part of the
            first layer (bias, and the border-dependent part of a normalised, zero-padded image) exactly.
    """

    shape: Shape
    max_code: int = 255
    constant_codes: tuple[int, ...] = ()

    @property
    def presented_shape(self) -> Shape:
        """Shape of what the first synapses see: the image and its constant channels."""
        return (self.shape[0] + len(self.constant_codes), *self.shape[1:])

    def present(self, codes: IntArray, steps: int | None = None) -> NDArray[np.int64]:
        """Append the constant channels.

        Args:
            codes: ``(samples, *shape)``, or ``(samples, steps, *shape)`` for inputs that change over time.
            steps: that codes which change over time must have, if it matters.

        Returns:
            int64 ``(samples, [steps,] *presented_shape)``.

        Raises:
            RuleViolations: if the shape, type or range is not this input's.
        """
        leading = codes.ndim - len(self.shape)
        problems = []
        right_steps = leading == 1 or steps is None or codes.shape[1] == steps
        if leading not in (1, 2) or codes.shape[leading:] != self.shape or not right_steps:
            problems.append(
                Violation(
                    "input",
                    "shape is the network's",
                    str(codes.shape),
                    f"(samples, [{steps or 'steps'},] {', '.join(map(str, self.shape))})",
                    "reshape or resize the images",
                )
            )
        if not np.issubdtype(codes.dtype, np.integer):
            problems.append(
                Violation(
                    "input",
                    "codes are integers",
                    str(codes.dtype),
                    f"integers 0..{self.max_code}",
                    "round pixels in [0, 1] to codes first",
                )
            )
        elif codes.size and (codes.min() < 0 or codes.max() > self.max_code):
            problems.append(
                Violation(
                    "input",
                    "codes are in range",
                    f"{codes.min()}..{codes.max()}",
                    f"0..{self.max_code}",
                    "clip the input to its range",
                )
            )
        if problems:
            raise RuleViolations("input", problems)
        channels = np.empty((*codes.shape[:leading], *self.presented_shape), np.int64)
        by_channel = np.moveaxis(channels, leading, 0)
        by_channel[: self.shape[0]] = np.moveaxis(codes, leading, 0)
        for index, code in enumerate(self.constant_codes, start=self.shape[0]):
            by_channel[index] = code
        return channels


@dataclass(frozen=True)
class Population:
    """Neurons that share one threshold.

    Attributes:
        name: unique; letters, digits and underscores.
        shape: ``(channels, height, width)`` or ``(neurons,)``.
        threshold: integer mantissa of the strict comparison v > 64 threshold; unused by a readout.
        bias: int64 of ``shape``, weight units per step.
        current_decay, voltage_decay: twelve-bit shares lost per step; (4096, 0) is the IF neuron.
        reset: "zero", or "subtract" (which stock Loihi neurons cannot do).
        spiking: False for the readout, which only integrates.
        scale: weight units per real unit; membrane in real units is v / (64 scale).
    """

    name: str
    shape: Shape
    threshold: int
    bias: NDArray[np.int64]
    scale: float
    spiking: bool = True
    current_decay: int = DECAY_UNITY
    voltage_decay: int = 0
    reset: Literal["zero", "subtract"] = "zero"

    @property
    def size(self) -> int:
        """Number of neurons."""
        return prod(self.shape)

    @property
    def is_leaky(self) -> bool:
        """Whether any state decays or current carries over (anything but the IF neuron)."""
        return self.current_decay != DECAY_UNITY or self.voltage_decay != 0


@dataclass(frozen=True)
class Synapse:
    """Connection between two populations, as cross-correlation or matrix product.

    Attributes:
        source: name of a population, or "input".
        target: name of a population.
        weight: int32; conv ``(out_channels, in_channels, kernel, kernel)``, dense ``(out, in)`` where ``in``
            runs over the source in C order.
        stride, padding: of a conv, equal in both directions; zeros are padded.
        bits: of the signed mantissa ``weight >> exponent``.
        exponent: every weight is a multiple of ``2**exponent``.
    """

    source: str
    target: str
    kind: Literal["conv", "dense"]
    weight: NDArray[np.int32]
    bits: int
    exponent: int = 0
    stride: int = 1
    padding: int = 0

    @property
    def name(self) -> str:
        """How messages call this synapse."""
        return f"{self.source}->{self.target}"

    def output_shape(self, source_shape: Shape) -> Shape:
        """Shape this synapse produces from a source of ``source_shape``; empty if it does not fit."""
        if self.kind == "dense":
            return (self.weight.shape[0],) if self.weight.shape[1] == int(np.prod(source_shape)) else ()
        if len(source_shape) != 3 or self.weight.shape[1] != source_shape[0]:
            return ()
        kernel = self.weight.shape[2:]
        spatial = tuple(
            (size + 2 * self.padding - k) // self.stride + 1 for size, k in zip(source_shape[1:], kernel, strict=True)
        )
        return (self.weight.shape[0], *spatial) if min(spatial) >= 1 else ()


@dataclass(frozen=True)
class IntegerNetwork:
    """A feed-forward network of integers: all that is deployed, and its meaning.

    Attributes:
        populations: in topological order; the last one, and only it, is the readout.
        synapses: any number per target population.
        steps: T, time steps per inference.
        provenance: plain JSON facts about where it came from (data set, seed, budgets); no meaning hangs on it.

    Raises:
        RuleViolations: on construction, listing everything that is not a well-formed network.
    """

    input: InputSpec
    populations: tuple[Population, ...]
    synapses: tuple[Synapse, ...]
    steps: int
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = _structure_problems(self)
        if problems:
            raise RuleViolations("integer network", problems)

    @cached_property
    def by_name(self) -> dict[str, Population]:
        """Populations by name."""
        return {population.name: population for population in self.populations}

    @property
    def readout(self) -> Population:
        """The population that integrates the answer."""
        return self.populations[-1]

    @property
    def classes(self) -> int:
        """Number of outputs."""
        return self.readout.size

    def incoming(self, population: str) -> tuple[Synapse, ...]:
        """Synapses that enter ``population``."""
        return tuple(synapse for synapse in self.synapses if synapse.target == population)

    def source_shape(self, synapse: Synapse) -> Shape:
        """Shape of what ``synapse`` reads."""
        if synapse.source == INPUT:
            return self.input.presented_shape
        return self.by_name[synapse.source].shape

    def logits(self, readouts: IntArray) -> NDArray[np.float64]:
        """Readouts ``(samples, classes)`` in real units, see :func:`real_readouts`."""
        return real_readouts(self.readout, self.steps, readouts)

    def is_chain(self) -> bool:
        """Whether each population reads exactly the one before it."""
        names = [INPUT, *(p.name for p in self.populations)]
        pairs = [(s.source, s.target) for s in self.synapses]
        return sorted(pairs) == sorted(pairwise(names))

    def semantics_card(self) -> dict[str, Any]:
        """What a reader must know to run this network as it is meant, as plain JSON."""
        return {
            "version": SEMANTICS_VERSION,
            "steps": self.steps,
            "order": "populations in topological order; spikes of a step are used within the step",
            "state_bits": 24,
            "fraction_bits": FRACTION_BITS,
            "saturation": f"membrane clips to +-{STATE_LIMIT}; synaptic sums are proven not to wrap",
            "comparison": "spike where membrane > 64 * threshold (strict)",
            "reset": sorted({p.reset for p in self.populations if p.spiking}),
            "input": {
                "coding": "direct: the same codes at every step",
                "shape": list(self.input.shape),
                "max_code": self.input.max_code,
                "constant_codes": list(self.input.constant_codes),
            },
            "readout": LEAKY_READOUT if self.readout.is_leaky else SUMMING_READOUT,
            "readout_scale": self.readout.scale,
            "weight_bits": {s.name: s.bits for s in self.synapses},
            "scales": {p.name: p.scale for p in self.populations},
            "classes": self.classes,
        }


def readout_unit(readout: Population, steps: int) -> float:
    """Units of the integer answer per real unit: T scale of a sum, 64 scale of a membrane."""
    return (1 << FRACTION_BITS if readout.is_leaky else steps) * readout.scale


def real_readouts(readout: Population, steps: int, readouts: IntArray) -> NDArray[np.float64]:
    """Readouts ``(samples, classes)`` in real units: the mean over the steps, or of a leaky readout the membrane."""
    return readouts / readout_unit(readout, steps)


def _structure_problems(network: IntegerNetwork) -> list[Violation]:
    problems: list[Violation] = []

    def refuse(name: str, rule: str, actual: object, limit: object, remedy: str) -> None:
        problems.append(Violation(name, rule, str(actual), str(limit), remedy))

    if network.steps < 1:
        refuse("network", "runs at least one step", network.steps, "1 or more", "set steps")
    spec = network.input
    if len(spec.shape) not in (1, 3) or min(spec.shape, default=0) < 1:
        refuse("input", "shape is (C, H, W) or (features,)", spec.shape, "1 or 3 positive sizes", "reshape it")
    if not 1 <= spec.max_code <= 255:
        refuse("input", "codes have at most 8 bits", spec.max_code, "1..255", "requantise the input")
    for code in spec.constant_codes:
        if not 1 <= code <= spec.max_code:
            refuse("input", "constant code is a code", code, f"1..{spec.max_code}", "choose another scale")

    shapes: dict[str, Shape] = {INPUT: spec.presented_shape}
    for index, population in enumerate(network.populations):
        name = population.name
        if not name.replace("_", "").isalnum() or name in shapes:
            refuse(name or "''", "name is unique and plain", name, "letters, digits, _", "rename it")
        if population.bias.shape != population.shape or population.bias.dtype != np.int64:
            refuse(
                name,
                "bias is int64 per neuron",
                f"{population.bias.dtype} {population.bias.shape}",
                population.shape,
                "broadcast the bias to the population's shape",
            )
        if population.spiking == (index == len(network.populations) - 1):
            refuse(name, "the last population alone is the readout", population.spiking, "-", "reorder")
        if population.spiking and population.threshold < 0:
            refuse(name, "threshold is not negative", population.threshold, "0 or more", "requantise")
        if not (0 <= population.current_decay <= DECAY_UNITY and 0 <= population.voltage_decay <= DECAY_UNITY):
            refuse(
                name,
                "decays have 12 bits",
                (population.current_decay, population.voltage_decay),
                f"0..{DECAY_UNITY}",
                "requantise the decays",
            )
        if not (np.isfinite(population.scale) and population.scale > 0):
            refuse(name, "scale is positive and finite", population.scale, "> 0", "requantise")
        entering = [s for s in network.synapses if s.target == name]
        if not entering:
            refuse(name, "has a synapse entering it", 0, "1 or more", "connect or remove it")
        for synapse in entering:
            if synapse.source not in shapes:
                refuse(
                    synapse.name,
                    "source comes earlier",
                    synapse.source,
                    sorted(shapes),
                    "order the populations",
                )
                continue
            produced = synapse.output_shape(shapes[synapse.source])
            if produced != population.shape:
                refuse(
                    synapse.name,
                    "shape fits its ends",
                    produced,
                    population.shape,
                    "check kernel and padding",
                )
        shapes[name] = population.shape
    if not network.populations:
        refuse("network", "has a readout", 0, "1 or more populations", "add one")
    for synapse in network.synapses:
        if synapse.target not in shapes or synapse.target == INPUT:
            refuse(synapse.name, "target exists", synapse.target, sorted(shapes), "name a population")
        low, high = (
            -(2 ** (synapse.bits - 1)) << synapse.exponent,
            (2 ** (synapse.bits - 1) - 1) << synapse.exponent,
        )
        if synapse.weight.dtype != np.int32:
            refuse(synapse.name, "weights are int32", synapse.weight.dtype, "int32", "convert them")
        elif synapse.weight.size and (synapse.weight.min() < low or synapse.weight.max() > high):
            refuse(
                synapse.name,
                f"weights fit {synapse.bits} bits",
                f"{synapse.weight.min()}..{synapse.weight.max()}",
                f"{low}..{high}",
                "requantise",
            )
        elif np.any(synapse.weight & ((1 << synapse.exponent) - 1)):
            refuse(
                synapse.name,
                f"weights are multiples of {1 << synapse.exponent}",
                "other weights",
                f"exponent {synapse.exponent}",
                "requantise",
            )
    return problems
