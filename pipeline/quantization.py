"""Float SNN to integer network: one scale per population, searched under the target's limits.

An integrate-and-fire population is unchanged when its weights, bias and threshold are scaled together, so the scale
is free: the one whose integer spikes differ least from the float ones on training images is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.emulator import run_emulator
from hardware.errors import RuleViolations, Violation
from hardware.network import INPUT, InputSpec, IntegerNetwork, Population, Synapse
from hardware.targets.loihi2 import LOIHI2, MAX_BIAS, check
from pipeline.attacks.targets import to_images
from pipeline.folding import RealPopulation, fold
from pipeline.models.spiking import SpikingNetwork
from pipeline.progress import track
from pipeline.rounding import MAX_INPUTS, InputStatistics, input_statistics, round_compensated

MAX_CODE = 255
# Loihi keeps only even weights of mixed-sign dense synapses, so their mantissas are shifted by one bit.
EXPONENT = {"conv": 0, "dense": 1}
# Scales tried, relative to the largest the target takes; above 1, large weights are clipped.
CANDIDATES = tuple(np.geomspace(0.5, 1.35, 24))
SMALLEST_SCALE = 2.0**-12


@dataclass(frozen=True)
class ScaleChoice:
    """What the search found for one population.

    Attributes:
        scale: weight units per real unit.
        disagreement: share of spikes that differ from the float model's on the calibration images; for the readout
            the root mean square error of the logits relative to their own root mean square.
    """

    population: str
    scale: float
    disagreement: float


@dataclass(frozen=True)
class Quantization:
    """An integer network and how its scales were chosen."""

    network: IntegerNetwork
    choices: tuple[ScaleChoice, ...]


def quantize(
    network: SpikingNetwork, calibration: NDArray[np.uint8], bits: int, provenance: Mapping[str, Any]
) -> Quantization:
    """Quantise a float SNN.

    Args:
        network: the float SNN; it is not changed.
        calibration: uint8 ``(samples, *shape)`` training images.
        bits: of every weight, 2 to 8.
        provenance: plain facts to keep with the network.

    Raises:
        SpikeguardError: if weights are not finite, or a population cannot fit the target at any scale.
    """
    populations = fold(network)
    require_finite(populations)
    recipe = Recipe(tuple(populations), network.graph.input_shape, network.steps, bits, provenance)
    logits, activity = network.record(to_images(calibration))
    scales = fitting_scales(recipe)
    choices = []
    with track("quantise", len(populations)) as advance:
        for population in populations:
            recipe = recipe.with_statistics(population, scales, calibration)
            float_spikes = activity[population.name].spikes.numpy() if population.name in activity else None
            candidates = [
                choice
                for factor in CANDIDATES
                if (
                    choice := _try_scale(
                        recipe,
                        scales,
                        population.name,
                        factor,
                        calibration,
                        float_spikes,
                        logits.double().numpy(),
                    )
                )
            ]
            best = min(candidates, key=lambda choice: choice.disagreement)
            scales[population.name] = best.scale
            choices.append(best)
            advance(f"{best.population}: {best.disagreement:.2%} differ")
    return Quantization(recipe.assemble(scales), tuple(choices))


def _try_scale(
    recipe: Recipe,
    scales: Mapping[str, float],
    name: str,
    factor: float,
    calibration: NDArray[np.uint8],
    float_spikes: NDArray[np.bool_] | None,
    float_logits: NDArray[np.float64],
) -> ScaleChoice | None:
    """How far one population differs at ``factor`` times its fitting scale; None if the target refuses it there."""
    scale = factor * scales[name]
    try:
        candidate = recipe.assemble({**scales, name: scale})
    except RuleViolations:
        return None
    if check(candidate, LOIHI2):
        return None
    trace = run_emulator(candidate, calibration, record="traces")
    if float_spikes is None:
        error = candidate.logits(trace.readouts) - float_logits
        return ScaleChoice(name, scale, float(np.sqrt(np.mean(error**2) / np.mean(float_logits**2))))
    spikes = trace.populations[name].spikes
    return ScaleChoice(name, scale, float(np.mean(spikes != float_spikes)))


def require_finite(populations: Sequence[RealPopulation]) -> None:
    """Refuse NaN and infinite parameters, naming every population that has them."""
    problems = [
        Violation(
            population.name,
            "parameters are finite",
            "NaN or infinite values",
            "finite numbers",
            "train again with a lower learning rate",
        )
        for population in populations
        if not all(
            values is None or np.isfinite(values).all()
            for values in (population.weight, population.constant, population.bias, population.threshold)
        )
    ]
    if problems:
        raise RuleViolations("float network", problems)


def largest_scale(population: RealPopulation, bits: int) -> float:
    """Scale at which the largest weight just fits its mantissa (without any weight, the threshold)."""
    largest = float(np.abs(population.weight).max()) or population.threshold or 1.0
    mantissa: int = 2 ** (bits - 1) - 1
    return (mantissa << EXPONENT[population.kind]) / largest


def fitting_scales(recipe: Recipe) -> dict[str, float]:
    """For each population the largest scale, in steps of 5 %, at which the target takes it.

    Raises:
        RuleViolations: if something still does not fit at a tiny scale.
    """
    ceilings = {population.name: largest_scale(population, recipe.bits) for population in recipe.populations}
    scales = dict(ceilings)
    while True:
        problems = _problems_at(recipe, scales)
        if not problems:
            return scales
        for name in {problem.object.split("->")[-1] for problem in problems}:
            if name not in scales or scales[name] < SMALLEST_SCALE * ceilings[name]:
                raise RuleViolations(f"quantised network on {LOIHI2.name}", problems)
            scales[name] *= 0.95


def _problems_at(recipe: Recipe, scales: Mapping[str, float]) -> list[Violation]:
    try:
        return check(recipe.assemble(scales), LOIHI2)
    except RuleViolations as refusal:
        return list(refusal.violations)


@dataclass(frozen=True)
class Recipe:
    """All that makes an integer network but the scales.

    Attributes:
        statistics: what populations read, by name; where known, weights are rounded with compensation.
    """

    populations: tuple[RealPopulation, ...]
    input_shape: tuple[int, ...]
    steps: int
    bits: int
    provenance: Mapping[str, Any]
    statistics: Mapping[str, InputStatistics] = field(default_factory=dict)

    def with_statistics(
        self, population: RealPopulation, scales: Mapping[str, float], calibration: NDArray[np.uint8]
    ) -> Recipe:
        """The same recipe, knowing what ``population`` reads from the integer populations before it."""
        if population.weight[0].size > MAX_INPUTS:
            return self
        source: NDArray[Any] = calibration
        if population.source != INPUT:
            trace = run_emulator(self.assemble(scales), calibration, record="traces")
            spikes = trace.populations[population.source].spikes
            shape = next(p.shape for p in self.populations if p.name == population.source)
            source = np.asarray(spikes).reshape(-1, *shape)
        statistics = {**self.statistics, population.name: input_statistics(population, source)}
        return replace(self, statistics=statistics)

    def assemble(self, scales: Mapping[str, float]) -> IntegerNetwork:
        """Round everything at the given scales.

        Raises:
            RuleViolations: if what rounding gives is not a network, or the constant input has no code.
        """
        constant_codes: tuple[int, ...] = ()
        rounded_populations, synapses = [], []
        for real in self.populations:
            scale = scales[real.name]
            weight, bias = round_population(real, scale, self.bits, self.statistics.get(real.name))
            if real.source == INPUT:
                kernel, code, bias = split_constant(real, scale, bias, self.bits, self.input_shape)
                if code:
                    constant_codes = (code,)
                    weight = np.concatenate([weight, kernel], axis=1)
            synapses.append(
                Synapse(
                    real.source,
                    real.name,
                    real.kind,
                    weight.astype(np.int32),
                    self.bits,
                    EXPONENT[real.kind],
                    real.stride,
                    real.padding,
                )
            )
            per_neuron = np.rint(bias).reshape(-1, *([1] * (len(real.shape) - 1)))
            rounded_populations.append(
                Population(
                    real.name,
                    real.shape,
                    0 if real.threshold is None else threshold_mantissa(real.threshold, scale),
                    np.broadcast_to(per_neuron, real.shape).astype(np.int64),
                    scale,
                    spiking=real.threshold is not None,
                )
            )
        return IntegerNetwork(
            InputSpec(self.input_shape, MAX_CODE, constant_codes),
            tuple(rounded_populations),
            tuple(synapses),
            self.steps,
            self.provenance,
        )


def threshold_mantissa(threshold: float, scale: float) -> int:
    """Mantissa of the strict comparison: on the integer grid u >= k is u > k - 1."""
    return max(round(threshold * scale) - 1, 0)


def round_population(
    real: RealPopulation, scale: float, bits: int, statistics: InputStatistics | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights as multiples of ``2**exponent`` that fit ``bits`` (larger ones are clipped), and the bias, not rounded.

    With statistics of the inputs the errors are made to cancel, and the bias takes back their mean.
    """
    step, low, high = 2 ** EXPONENT[real.kind], -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if statistics is None:
        rounded: NDArray[np.float64] = np.clip(np.rint(real.weight * scale / step), low, high) * step
        return rounded, real.bias * scale
    flat = (real.weight * scale).reshape(len(real.weight), -1)
    compensated, mean_error = round_compensated(flat, statistics, low, high, step)
    return compensated.reshape(real.weight.shape), real.bias * scale - mean_error


def split_constant(
    real: RealPopulation, scale: float, bias: NDArray[np.float64], bits: int, input_shape: tuple[int, ...]
) -> tuple[NDArray[np.float64], int, NDArray[np.float64]]:
    """The constant part of the first layer as a constant input channel plus what is left for the bias.

    The channel's code is the smallest whose kernel fits the weights' bits. Where one tap meets every output
    position (the tap over the pixel itself), it carries the bias too, to the nearest multiple of the code, because
    a chip's bias has too few bits for it.

    Returns:
        Kernel ``(out, 1, ...)`` with the geometry of the weights, the code (0 if no channel is needed), and the bias
        ``(out,)`` that is left, all in weight units.

    Raises:
        RuleViolations: if no code is large enough at this scale.
    """
    exponent = EXPONENT[real.kind]
    if real.kind == "conv":
        taps = real.weight.shape[2]
        needed = np.zeros((len(bias), taps, taps)) if real.constant is None else real.constant * scale
        anchor: tuple[Any, ...] | None = (slice(None), real.padding, real.padding)
        if taps < 2 * real.padding + 1:
            anchor = None
    else:
        needed = np.zeros((len(bias), int(np.prod(input_shape[1:]))))
        anchor = (slice(None), 0)
    if not needed.any() and np.abs(bias).max(initial=0) <= MAX_BIAS:
        return needed[:, None], 0, bias
    if anchor is not None:
        needed[anchor] += bias
        bias = np.zeros_like(bias)
    step = 2**exponent
    code = max(1, int(np.ceil(np.abs(needed).max() / ((2 ** (bits - 1) - 1) * step))))
    if code > MAX_CODE:
        raise RuleViolations(
            "quantised network",
            [Violation(real.name, "constant input has 8 bits", str(code), str(MAX_CODE), "use a lower scale")],
        )
    kernel = np.rint(needed / (code * step)) * step
    if anchor is not None:
        bias = needed[anchor] - kernel[anchor] * code
    shaped = kernel[:, None] if real.kind == "conv" else kernel
    return shaped, code, bias
