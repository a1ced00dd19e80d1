"""Where a difference comes from: each row is the float network with one kind of number rounded, and with no other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardware.network import INPUT
from hardware.reference import run_reference
from pipeline.attribution import (
    EVERYTHING,
    HYBRIDS,
    AttributionRow,
    Spikes,
    attribute,
    compare,
    relative_error,
    scaled_population,
)
from pipeline.folding import RealPopulation, RealSynapse, fold
from pipeline.integer_recipe import Grid, RoundedPopulation, assemble, round_population
from pipeline.number_formats import target_format
from pipeline.rounding import InputStatistics
from pipeline.unrounded import run_unrounded
from tests.pipeline.random_networks import zoo_network
from tests.pipeline.samples import NETWORKS, random_images, spiking_network

Codes = NDArray[np.uint8]
Float64Array = NDArray[np.float64]
Shape = tuple[int, ...]
STEPS = 5
BITS = 5


def rounded_at(
    populations: list[RealPopulation], shape: Shape, bits: int = BITS, factor: float = 0.9
) -> list[RoundedPopulation]:
    """All of them at a scale near the largest, those that read pixels at codes that suit all."""
    numbers = target_format(bits)

    def at(real: RealPopulation, codes: tuple[int, ...] | None) -> RoundedPopulation:
        scale = factor * numbers.ceiling(real)
        grid = Grid(scale, numbers, numbers.exponents_at(real, scale), codes)
        return round_population(real, grid, shape)

    alone = [at(real, None) for real in populations]
    codes = max((one.constant_codes for one in alone), default=())
    readers = [any(synapse.source == INPUT for synapse in real.synapses) for real in populations]
    return [at(real, codes if reads else None) for real, reads in zip(populations, readers, strict=True)]


def sample(
    name: str, beta: float = 1.0, factor: float = 0.9
) -> tuple[list[RealPopulation], list[RoundedPopulation], Codes]:
    network = zoo_network(name, 2, beta=beta) if name not in NETWORKS else spiking_network(name, 2)
    populations, shape = fold(network), network.graph.input_shape
    return populations, rounded_at(populations, shape, BITS, factor), random_images(shape, 6, 2)


def rows_of(
    populations: list[RealPopulation], rounded: list[RoundedPopulation], codes: Codes
) -> dict[str, AttributionRow]:
    """Against the float populations' own spikes and logits."""
    spikes, logits = run_unrounded(populations, codes, STEPS)
    return {row.rounded: row for row in attribute(populations, rounded, codes, STEPS, spikes, logits)}


def in_weight_units(real: RealPopulation, scale: float) -> RealPopulation:
    """Nothing rounded, written out."""
    synapses = [
        replace(s, weight=s.weight * scale, constant=None if s.constant is None else s.constant * scale)
        for s in real.synapses
    ]
    threshold = None if real.threshold is None else real.threshold * scale
    return replace(real, synapses=tuple(synapses), bias=real.bias * scale, threshold=threshold)


def with_numbers_of(
    kind: str, real: RealPopulation, one: RoundedPopulation, constant_codes: tuple[int, ...]
) -> RealPopulation:
    """The population in weight units, the numbers of one kind as integers: all from the integers themselves."""
    scale, integer = one.population.scale, one.population
    plain = in_weight_units(real, scale)
    if kind == "weights":
        synapses = [
            replace(s, weight=i.weight[:, : s.weight.shape[1]].astype(float))
            for s, i in zip(plain.synapses, one.synapses, strict=True)
        ]
        return replace(plain, synapses=tuple(synapses), bias=plain.bias - one.mean_error)
    if kind == "thresholds" and real.threshold is not None:
        is_if = real.beta == 1 and not real.subtract
        return replace(plain, threshold=float(integer.threshold + is_if))
    if kind == "decay":
        return replace(plain, beta=(4096 - integer.voltage_decay) / 4096)
    if kind == "bias":
        return replace(plain, bias=plain.bias + one.bias_error)
    if kind == "input":
        synapses = []
        for s, i in zip(plain.synapses, one.synapses, strict=True):
            carried = s
            if s.source == INPUT and s.kind == "conv" and s.constant is not None and constant_codes:
                channels = i.weight[:, s.weight.shape[1] :].astype(float)
                kernel = np.einsum("ocij,c->oij", channels, np.array(constant_codes, float))
                if s.weight.shape[2] >= 2 * s.padding + 1:
                    # The bias makes up for the tap over the pixel itself.
                    kernel[:, s.padding, s.padding] = s.constant[:, s.padding, s.padding]
                carried = replace(s, constant=kernel)
            synapses.append(carried)
        return replace(plain, synapses=tuple(synapses))
    return plain


def the_same(one: RealPopulation, other: RealPopulation) -> bool:
    """Number for number, but for the last bits of floats."""

    def near(a: Float64Array | None, b: Float64Array | None) -> bool:
        if a is None or b is None:
            return a is b
        return bool(np.abs(a - b).max(initial=0) <= 1e-9 * (1 + np.abs(b).max(initial=0)))

    pairs = zip(one.synapses, other.synapses, strict=True)
    return (
        all(near(s.weight, o.weight) and near(s.constant, o.constant) for s, o in pairs)
        and near(one.bias, other.bias)
        and near(np.array(one.threshold or -1.0), np.array(other.threshold or -1.0))
        and (one.beta, one.subtract, one.name, one.shape) == (other.beta, other.subtract, other.name, other.shape)
    )


SAMPLES = [*NETWORKS, "wrn-16-4"]


@pytest.mark.parametrize("kind", HYBRIDS)
@pytest.mark.parametrize("name", SAMPLES)
def test_each_hybrid_has_the_integers_of_its_kind_and_all_else_as_it_was(name: str, kind: str) -> None:
    populations, rounded, _ = sample(name)
    codes = max(one.constant_codes for one in rounded)
    for real, one in zip(populations, rounded, strict=True):
        expected = with_numbers_of(kind, real, one, codes)
        hybrid = HYBRIDS[kind](real, one)
        if hybrid is None:
            assert the_same(in_weight_units(real, one.population.scale), expected)
        else:
            assert the_same(hybrid, expected)


@pytest.mark.parametrize("beta", [0.9, 0.75])
def test_a_leak_that_12_bits_do_not_hold_has_a_row_of_its_own(beta: float) -> None:
    populations, rounded, codes = sample("digits-cnn", beta)
    rows = rows_of(populations, rounded, codes)
    assert ("decay" in rows) == (beta == 0.9)
    for real, one in zip(populations, rounded, strict=True):
        for kind in ("decay", "thresholds"):
            hybrid = HYBRIDS[kind](real, one)
            expected = with_numbers_of(kind, real, one, ())
            plain = in_weight_units(real, one.population.scale)
            assert the_same(hybrid if hybrid is not None else plain, expected)


@pytest.mark.parametrize("name", SAMPLES)
def test_rows_are_of_hybrids_that_run_freely(name: str) -> None:
    """Each by the spikes and logits of the whole hybrid network, flips and their consequences."""
    populations, rounded, codes = sample(name)
    spikes, logits = run_unrounded(populations, codes, STEPS)
    rows = rows_of(populations, rounded, codes)
    constant_codes = max(one.constant_codes for one in rounded)
    assert list(rows)[:3] == ["nothing", "weights", "thresholds"]
    if name in ("conv", "pre-activation", "wrn-16-4"):
        assert list(rows)[3:] == ["bias", "input"]
    assert any(rows["weights"].disagreement.values())
    for kind, row in rows.items():
        mixed = [with_numbers_of(kind, p, one, constant_codes) for p, one in zip(populations, rounded, strict=True)]
        found, readout = run_unrounded(mixed, codes, STEPS)
        expected = compare(kind, found, readout / rounded[-1].population.scale, spikes, logits)
        assert row.disagreement == expected.disagreement
        assert row.argmax_flips == expected.argmax_flips
        assert row.logit_error == pytest.approx(expected.logit_error, rel=1e-6, abs=1e-12)
        assert row.samples == len(codes)


@pytest.mark.parametrize("name", SAMPLES)
def test_with_nothing_rounded_nothing_differs(name: str) -> None:
    populations, rounded, codes = sample(name)
    row = rows_of(populations, rounded, codes)["nothing"]
    assert not any(row.disagreement.values())
    assert list(row.disagreement) == [p.name for p in populations[:-1]]
    assert row.logit_error < 1e-12
    assert row.argmax_flips == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_all_kinds_together_are_the_integer_network(name: str) -> None:
    """The rows leave out nothing: applied one after the other they give its own spikes and readouts."""
    # At a scale at which every constant part has a code.
    populations, rounded, codes = sample(name, factor=0.6)
    constant_codes = max(one.constant_codes for one in rounded)
    together = []
    for real, one in zip(populations, rounded, strict=True):
        weights, thresholds = (with_numbers_of(kind, real, one, ()) for kind in ("weights", "thresholds"))
        inputs = with_numbers_of("input", real, one, constant_codes)
        synapses = [replace(w, constant=i.constant) for w, i in zip(weights.synapses, inputs.synapses, strict=True)]
        bias = weights.bias + one.bias_error
        together.append(replace(weights, synapses=tuple(synapses), bias=bias, threshold=thresholds.threshold))
    shape = codes.shape[1:]
    trace = run_reference(assemble(rounded, shape, STEPS, {}), codes, state_limit=2**50)
    # Half a unit below, lest a float's last bit decide: all that is compared is whole.
    lowered = [p if p.threshold is None else replace(p, threshold=p.threshold - 0.5) for p in together]
    spikes, readout = run_unrounded(lowered, codes, STEPS)
    for key, found in spikes.items():
        expected = trace.populations[key].spikes
        assert expected is not None
        assert np.array_equal(found.reshape(expected.shape), expected)
    assert np.abs(readout * STEPS - trace.readouts).max() < 1e-6


def whole_network() -> tuple[list[RealPopulation], Shape]:
    """All numbers are integers of few bits already."""
    rng = np.random.default_rng(0)

    def even(*shape: int) -> Float64Array:
        return 2 * rng.integers(-60, 61, shape).astype(np.float64)

    first, second = RealSynapse(INPUT, "dense", even(4, 3)), RealSynapse("first", "dense", even(3, 4))
    first.weight[0, 0] = second.weight[0, 0] = 254
    neurons = RealPopulation("first", (4,), (first,), even(4), 5000.0)
    return [neurons, RealPopulation("readout", (3,), (second,), rng.integers(-9, 10, 3).astype(float), None)], (3,)


def test_where_there_is_nothing_to_round_there_is_no_row() -> None:
    """But for weights and thresholds, whose rows then say that nothing differs."""
    populations, shape = whole_network()
    rounded = rounded_at(populations, shape, 8, 1.0)
    assert [one.population.scale for one in rounded] == [1.0, 1.0]
    rows = rows_of(populations, rounded, random_images(shape, 9, 1))
    assert list(rows) == ["nothing", "weights", "thresholds"]
    for row in rows.values():
        assert row == AttributionRow(row.rounded, {"first": 0.0}, 0.0, 0, 9)


def test_a_networks_readout_alone_has_neither_thresholds_nor_spikes() -> None:
    populations, _ = whole_network()
    (synapse,) = populations[1].synapses
    readout = replace(populations[1], synapses=(replace(synapse, source=INPUT, weight=synapse.weight[:, :3]),))
    rows = rows_of([readout], rounded_at([readout], (3,), 4), random_images((3,), 5))
    assert "thresholds" not in rows
    assert all(row.disagreement == {} for row in rows.values())


@given(st.integers(0, 2**32 - 1))
def test_the_row_of_weights_has_their_mean_error_taken_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    synapse = RealSynapse("x", "dense", rng.normal(size=(4, 6)))
    real = RealPopulation("p", (4,), (synapse,), rng.normal(size=4), 0.7)
    mean = rng.uniform(size=6)
    statistics = InputStatistics(mean, (np.eye(6),))
    one = round_population(real, Grid(9.0, target_format(4), (1,)), (1,), statistics)
    hybrid = HYBRIDS["weights"](real, one)
    assert hybrid is not None
    felt = hybrid.synapses[0].weight @ mean + hybrid.bias
    assert felt == pytest.approx(9.0 * (synapse.weight @ mean + real.bias), abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(-8, 8))
def test_a_scaled_population_is_the_same_in_weight_units(seed: int, power: int) -> None:
    populations, _, codes = sample("wide kernel")
    scale = 2.0**power
    rng = np.random.default_rng(seed)
    scaled = []
    for real in populations:
        own = scale * 2.0 ** int(rng.integers(-3, 4))
        one = round_population(real, Grid(own, target_format(8), (1,)), (2, 8, 8))
        scaled.append(scaled_population(real, one))
        assert the_same(scaled[-1], in_weight_units(real, own))
    spikes, logits = run_unrounded(populations, codes, STEPS)
    found, readout = run_unrounded(scaled, codes, STEPS)
    assert all(np.array_equal(spikes[name], found[name]) for name in spikes)
    assert np.array_equal(readout, logits * own)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_comparing_counts_what_differs(seed: int, samples: int) -> None:
    rng = np.random.default_rng(seed)
    shapes: dict[str, Shape] = {"a": (2, 3, 3), "b": (4,)}
    spikes: Spikes = {name: rng.random((samples, 3, *shape)) < 0.5 for name, shape in shapes.items()}
    flat: Spikes = {name: (rng.random((samples, 3, int(np.prod(s)))) < 0.5) for name, s in shapes.items()}
    logits, readout = rng.normal(size=(2, samples, 3))
    row = compare(EVERYTHING, flat, readout, spikes, logits)
    assert row.rounded == EVERYTHING
    assert row.samples == samples
    for name, values in spikes.items():
        pairs = list(zip(values.ravel().tolist(), flat[name].ravel().tolist(), strict=True))
        assert row.disagreement[name] == sum(a != b for a, b in pairs) / len(pairs)
    classes = [[max(range(3), key=list(one).__getitem__) for one in both] for both in (logits, readout)]
    assert row.argmax_flips == sum(a != b for a, b in zip(*classes, strict=True))
    assert row.logit_error == relative_error(readout, logits)
    same = compare("nothing", spikes, logits, spikes, logits)
    assert same == AttributionRow("nothing", {"a": 0.0, "b": 0.0}, 0.0, 0, samples)


def test_errors_are_relative_to_what_was_expected() -> None:
    expected = np.array([[3.0, -4.0], [0.0, 5.0]])
    assert relative_error(expected, expected) == 0
    assert relative_error(2 * expected, expected) == 1
    assert relative_error(expected + 5.0, expected) == np.sqrt(2)
    assert relative_error(expected, expected * 1e-3) == pytest.approx(999)
    assert relative_error(np.zeros((1, 2)), np.zeros((1, 2))) == 0
    assert np.isfinite(relative_error(np.ones((1, 2)), np.zeros((1, 2))))
