"""Float SNN to integer network: one scale per population, searched under the target's limits.

A population is unchanged when its weights, biases and threshold are scaled together, so the scale is free: the one
whose integer spikes differ least from the float ones on training images is taken. Populations are searched front to
back, each on what the integer populations before it did, which is recorded once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hardware.errors import RuleViolations, Violation
from hardware.network import (
    DECAY_UNITY,
    FRACTION_BITS,
    INPUT,
    STATE_LIMIT,
    InputSpec,
    IntegerNetwork,
    real_readouts,
)
from hardware.targets.loihi2 import (
    LOIHI2,
    MAX_BIAS,
    MAX_VTH_MANTISSA,
    cores_fit_the_largest_system,
    decays_fit_12_bits,
    membranes_reset_to_zero,
)
from hardware.targets.rules import check
from pipeline.attribution import EVERYTHING, AttributionRow, Spikes, attribute, compare, relative_error
from pipeline.constant_channels import shared_codes
from pipeline.folding import RealPopulation, fold
from pipeline.integer_population import RecordedActivity, Response, channels_together, respond, sum_bounds
from pipeline.integer_recipe import (
    Grid,
    RoundedPopulation,
    assemble,
    require_roundable,
    round_population,
    rounding_order,
)
from pipeline.models.graph import PIXEL_LEVELS, Shape
from pipeline.models.spiking import SpikingNetwork
from pipeline.number_formats import target_format
from pipeline.progress import track
from pipeline.rounding import InputStatistics, input_statistics

Rounding = Literal["compensated", "nearest"]
MIN_BITS, MAX_BITS = 2, 8
# Scales tried, relative to the largest the target takes; above 1, large weights are clipped.
CANDIDATES: tuple[float, ...] = tuple(np.geomspace(0.5, 1.35, 24).tolist())
SCALE_STEP = 0.95
SMALLEST_SCALE = 2.0**-12
# Connections times steps times images: for all populations together, for one candidate scale, for one hybrid.
TOTAL_WORK, SEARCH_WORK, ATTRIBUTION_WORK = 10**11, 10**9, 2 * 10**9
MIN_IMAGES, MIN_SEARCH_IMAGES = 16, 4
ACTIVITY_BYTES = 2**29
RECORD_BYTES = 2**26

SCALABLE = replace(
    LOIHI2,
    rules=tuple(
        rule
        for rule in LOIHI2.rules
        if rule not in (membranes_reset_to_zero, decays_fit_12_bits, cores_fit_the_largest_system)
    ),
)
"""The target's rules that a scale can keep; what no scale mends is for `check` to say."""


@dataclass(frozen=True)
class ScaleChoice:
    """What the search found for one population.

    Attributes:
        scale: weight units per real unit.
        disagreement: share of spikes that differ from the float model's on the calibration images; for the readout
            the root mean square error of the logits relative to their own root mean square.
        bits: of its weights.
        exponents: by source of its synapses: weights are multiples of two to this power.
    """

    population: str
    scale: float
    disagreement: float
    bits: int
    exponents: Mapping[str, int]


@dataclass(frozen=True)
class Quantization:
    """An integer network, how its scales were chosen, and what its difference to the float SNN comes from."""

    network: IntegerNetwork
    choices: tuple[ScaleChoice, ...]
    attribution: tuple[AttributionRow, ...]


def quantize(
    network: SpikingNetwork,
    calibration: NDArray[np.uint8],
    bits: int | Mapping[str, int],
    provenance: Mapping[str, Any],
    rounding: Rounding = "compensated",
) -> Quantization:
    """Quantise a float SNN.

    Args:
        network: the float SNN; it is not changed.
        calibration: uint8 ``(samples, [steps,] *shape)`` training images; of large networks the first ones only are
            used.
        bits: of every weight, 2 to 8, or by population, the readout included.
        provenance: plain facts to keep with the network.
        rounding: of the weights: to the nearest, each by itself, or so that their errors cancel in the sums.

    Raises:
        SpikeguardError: if weights are not finite, or a population cannot fit the target at any scale.
    """
    network = copy.deepcopy(network).cpu().eval()
    populations = fold(network)
    require_roundable(populations)
    widths = bits_by_population(populations, bits)
    shapes = {INPUT: network.graph.input_shape, **{population.name: population.shape for population in populations}}
    spec = InputSpec(network.graph.input_shape, network.graph.max_code)
    fitted = fitting_grids(populations, widths, shapes, network.steps, provenance, spec.max_code)

    work = {p.name: network.steps * _connections(p) for p in populations}
    neurons = sum(math.prod(population.shape) for population in populations)
    samples = min(
        _affordable(TOTAL_WORK, sum(work.values()), MIN_IMAGES, len(calibration)),
        _affordable(ACTIVITY_BYTES, 2 * network.steps * neurons, MIN_IMAGES, len(calibration)),
    )
    activity = RecordedActivity(calibration[:samples], network.steps, spec)
    spikes, logits = _record(network, activity.codes)
    search = _Search(activity, shapes, spikes, logits, rounding)
    rounded, choices = [], []
    with track("quantise", len(populations)) as advance:
        for population in populations:
            few = _affordable(SEARCH_WORK, work[population.name], MIN_SEARCH_IMAGES, samples)
            found = search.best(population, fitted[population.name], few)
            if found is None:
                tried = [round_population(p, fitted[p.name], shapes[INPUT]) for p in populations]
                raise _refusal(tried, shapes[INPUT], network.steps, provenance)
            one, choice = found
            rounded.append(one)
            choices.append(choice)
            advance(f"{choice.population}: {choice.disagreement:.2%} differ")
    deployed = assemble(rounded, shapes[INPUT], network.steps, provenance)
    if problems := check(deployed, SCALABLE):
        raise RuleViolations(f"quantised network on {LOIHI2.name}", problems)
    readout = deployed.logits(search.readouts)
    everything = compare(EVERYTHING, activity.spikes, readout, spikes, logits)
    few = _affordable(ATTRIBUTION_WORK, sum(work.values()), MIN_SEARCH_IMAGES, samples)
    some = {name: values[:few] for name, values in spikes.items()}
    parts = attribute(
        populations, rounded, activity.codes[:few], network.steps, some, logits[:few], timed=activity.timed
    )
    return Quantization(deployed, tuple(choices), (*parts, everything))


def bits_by_population(populations: Sequence[RealPopulation], bits: int | Mapping[str, int]) -> dict[str, int]:
    """Bits of the weights that enter each population.

    Raises:
        RuleViolations: for every population without bits, bits without a population, and impossible number.
    """
    names = [population.name for population in populations]
    widths = dict.fromkeys(names, bits) if isinstance(bits, int) else dict(bits)
    remedy = f"give bits for {', '.join(names)}"
    problems = [
        *(
            Violation(n, "every population has its bits", "none", "one number", remedy)
            for n in names
            if n not in widths
        ),
        *(Violation(n, "bits are of a population", n, "its name", remedy) for n in widths if n not in names),
        *(
            Violation(n, "weights have 2 to 8 bits", str(width), f"{MIN_BITS}..{MAX_BITS}", "choose within the range")
            for n, width in widths.items()
            if not MIN_BITS <= width <= MAX_BITS
        ),
    ]
    if problems:
        raise RuleViolations("bits of the quantiser", problems)
    return widths


def fitting_grids(
    populations: Sequence[RealPopulation],
    bits: Mapping[str, int],
    shapes: Mapping[str, Shape],
    steps: int,
    provenance: Mapping[str, Any],
    max_code: int = PIXEL_LEVELS,
) -> dict[str, Grid]:
    """For each population the largest scale, in steps of 5 %, at which the target takes it, and its exponents there.

    Where several populations read pixels, they share the codes of the constant input channels: the largest that any of
    them may need at any scale that is tried.

    Raises:
        RuleViolations: if something still does not fit at a tiny scale.
    """
    grids = {p.name: _fitting_grid(p, bits[p.name], shapes, steps, max_code) for p in populations}
    tried = [round_population(p, grids[p.name], shapes[INPUT]) for p in populations if p.name in grids]
    if any(headroom(one, shapes, steps) < 1 for one in tried):
        raise _refusal(tried, shapes[INPUT], steps, provenance)
    readers = [p for p in populations if any(synapse.source == INPUT for synapse in p.synapses)]
    if len(readers) > 1:
        largest = [_scaled(grids[p.name], CANDIDATES[-1]) for p in readers]
        finest = [round_population(p, grid, shapes[INPUT]) for p, grid in zip(readers, largest, strict=True)]
        needed = shared_codes(one.constant for one in finest if one.constant is not None)
        codes = tuple(min(code, max_code) for code in needed)
        grids.update({p.name: replace(grids[p.name], constant_codes=codes) for p in readers})
    return grids


def _fitting_grid(real: RealPopulation, bits: int, shapes: Mapping[str, Shape], steps: int, max_code: int) -> Grid:
    """The first grid that fits, or the one of a tiny scale."""
    numbers = target_format(bits)
    ceiling, shrunk = numbers.ceiling(real), 0
    while True:
        scale = ceiling * SCALE_STEP**shrunk
        grid = Grid(scale, numbers, numbers.exponents_at(real, scale), max_code=max_code)
        room = headroom(round_population(real, grid, shapes[INPUT]), shapes, steps)
        if room >= 1 or scale < SMALLEST_SCALE * ceiling:
            return grid
        # All limits are of what the scale multiplies, so this many steps at least are needed.
        shrunk += max(1, int(np.log(room) / np.log(SCALE_STEP)))


def _scaled(grid: Grid, factor: float) -> Grid:
    return replace(grid, scale=factor * grid.scale)


def headroom(rounded: RoundedPopulation, shapes: Mapping[str, Shape], steps: int) -> float:
    """How many times larger everything could be before it breaks a rule of the target; below 1 it does.

    Args:
        rounded: the population; its weights are within their bits already.
        shapes: of its sources.
        steps: T.
    """
    population = rounded.population
    kept = 1 - population.current_decay / DECAY_UNITY
    outlasting = sum(kept**step for step in range(steps))
    if rounded.constant is not None and rounded.constant.room < 1:
        return rounded.constant.room
    state_limit = STATE_LIMIT / 2**FRACTION_BITS
    sums, bias = sum_bounds(rounded, shapes), population.bias
    reached = [
        (MAX_BIAS, np.abs(bias).max()),
        (state_limit, outlasting * max(-sums.lower.min(), sums.upper.max())),
    ]
    if population.spiking:
        reached.append((MAX_VTH_MANTISSA, population.threshold))
    else:
        largest = max(-(sums.lower + bias).min(), (sums.upper + bias).max())
        reached.append((state_limit / steps, outlasting * largest))
    return min(float(limit) / max(float(actual), 1e-300) for limit, actual in reached)


def _refusal(
    tried: Sequence[RoundedPopulation], input_shape: Shape, steps: int, provenance: Mapping[str, Any]
) -> RuleViolations:
    """What the target says to populations that fit at no scale (if it is not refused before it is a network)."""
    try:
        problems = check(assemble(tried, input_shape, steps, provenance), SCALABLE)
    except RuleViolations as refusal:
        return refusal
    return RuleViolations(f"quantised network on {LOIHI2.name}", problems)


@dataclass
class _Search:
    """Populations searched front to back; what each did is kept for those that read it.

    Attributes:
        activity: of the populations before, on the calibration images; grown by each search.
        shapes: of all populations and the input.
        spikes, logits: of the float SNN on the same images.
        rounding: of the weights.
        readouts: of the integer network, once the readout was searched.
    """

    activity: RecordedActivity
    shapes: Mapping[str, Shape]
    spikes: Spikes
    logits: NDArray[np.float64]
    rounding: Rounding
    readouts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    def best(self, real: RealPopulation, fitting: Grid, samples: int) -> tuple[RoundedPopulation, ScaleChoice] | None:
        """The population at its best scale, judged on the first ``samples``; None if the target takes none."""
        steps, input_shape = self.activity.steps, self.shapes[INPUT]
        statistics = self._statistics(real, fitting) if self.rounding == "compensated" else None
        found: tuple[float, RoundedPopulation, Response, Grid] | None = None
        for factor in CANDIDATES:
            grid = _scaled(fitting, factor)
            rounded = round_population(real, grid, input_shape, statistics)
            if headroom(rounded, self.shapes, steps) < 1:
                continue
            response = respond(rounded, self.activity, samples)
            disagreement = self._disagreement(rounded, response)
            if found is None or disagreement < found[0]:
                found = disagreement, rounded, response, grid
        if found is None:
            return None
        disagreement, rounded, response, grid = found
        if samples < len(self.activity.codes):
            response = respond(rounded, self.activity, len(self.activity.codes))
            disagreement = self._disagreement(rounded, response)
        if rounded.population.spiking:
            self.activity.record(real.name, response.spikes)
        else:
            self.readouts = response.readouts
        exponents = {s.source: exponent for s, exponent in zip(real.synapses, grid.exponents, strict=True)}
        return rounded, ScaleChoice(real.name, grid.scale, disagreement, grid.format.bits, exponents)

    def _statistics(self, real: RealPopulation, grid: Grid) -> InputStatistics:
        ordered = [real.synapses[i] for i in rounding_order(grid.exponents)]
        read = {synapse.source: self.activity[synapse.source] for synapse in ordered}
        return input_statistics(ordered, read, timed=self.activity.timed)

    def _disagreement(self, rounded: RoundedPopulation, response: Response) -> float:
        population, samples = rounded.population, len(response.spikes)
        if population.spiking:
            return float(np.mean(response.spikes != self.spikes[population.name][:samples]))
        found = real_readouts(population, self.activity.steps, response.readouts)
        return relative_error(found, self.logits[:samples])


def _record(network: SpikingNetwork, codes: NDArray[np.uint8]) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """Spikes ``(samples, steps, *shape)`` by spiking layer, and logits, a few images at a time."""
    shapes = network.graph.shapes()
    largest = max(math.prod(shape) for shape in shapes.values())
    group = max(1, RECORD_BYTES // (4 * largest * network.steps))
    logits, spikes = [], []
    for start in range(0, len(codes), group):
        answer, activity = network.record(network.images(codes[start : start + group]))
        logits.append(answer.double().numpy())
        spikes.append({name: one.spikes.numpy() for name, one in activity.items()})
    joined = {name: np.concatenate([part[name] for part in spikes]) for name in spikes[0]}
    shaped = {
        name: channels_together(values.reshape(*values.shape[:2], *shapes[name])) for name, values in joined.items()
    }
    return shaped, np.concatenate(logits)


def _connections(real: RealPopulation) -> int:
    inputs: int = sum(synapse.weight[0].size for synapse in real.synapses)
    return math.prod(real.shape) * inputs


def _affordable(budget: int, each: int, least: int, available: int) -> int:
    """How many of the available ones, at a cost each, a budget pays for; at least ``least`` of them."""
    return min(available, max(least, budget // each))
