"""Folded populations in float64, against the same written as loops; on whole numbers, where every bit is the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardware.network import INPUT, IntegerNetwork
from hardware.reference import run_reference
from pipeline import unrounded
from pipeline.folding import RealPopulation, RealSynapse
from pipeline.unrounded import current, run_unrounded
from tests.networks import networks, random_codes

Codes = NDArray[np.uint8]
Float64Array = NDArray[np.float64]
NEVER_SATURATES = 2**50


def as_real(network: IntegerNetwork) -> list[RealPopulation]:
    """An integer network of IF neurons that reset to zero: above its mantissa is at the next number or beyond."""
    channels = network.input.shape[0]
    populations = []
    for population in network.populations:
        bias = population.bias.reshape(population.shape[0], -1)[:, 0].astype(np.float64)
        synapses = []
        for one in network.incoming(population.name):
            weight, constant = one.weight.astype(np.float64), None
            if one.source == INPUT and one.kind == "conv":
                constant = np.einsum("ocij,c->oij", weight[:, channels:], np.array(network.input.constant_codes, float))
                weight = weight[:, :channels]
            elif one.source == INPUT:
                pixels = int(np.prod(network.input.shape))
                each = np.repeat(network.input.constant_codes, pixels // channels).astype(np.float64)
                bias = bias + weight[:, pixels:] @ each
                weight = weight[:, :pixels]
            synapses.append(RealSynapse(one.source, one.kind, weight, constant, one.stride, one.padding))
        threshold = population.threshold + 1.0 if population.spiking else None
        populations.append(RealPopulation(population.name, population.shape, tuple(synapses), bias, threshold))
    return populations


@given(networks(leaky=False, reset="zero", conv_bias="channel", max_code=255), st.integers(0, 2**32 - 1))
def test_whole_numbers_give_the_integer_networks_own_spikes_and_readouts(network: IntegerNetwork, seed: int) -> None:
    """Any graph, kernels beside the border and constant channels included."""
    codes = random_codes(np.random.default_rng(seed), network, 3)
    trace = run_reference(network, codes, state_limit=NEVER_SATURATES)
    spikes, readout = run_unrounded(as_real(network), codes, network.steps)
    assert list(spikes) == [p.name for p in network.populations if p.spiking]
    for name, found in spikes.items():
        assert found.dtype == np.bool_
        assert found.shape == (3, network.steps, *network.by_name[name].shape)
        expected = trace.populations[name].spikes
        assert expected is not None
        assert np.array_equal(found.reshape(expected.shape), expected)
    assert readout.shape == (3, network.classes)
    assert np.array_equal(readout, trace.readouts / network.steps)


def small(seed: int, beta: float, subtract: bool) -> list[RealPopulation]:
    """Two populations and a readout: a strided conv with a constant part, dense neurons that read it and the pixels.

    All numbers are whole, and what halves or quarters them keeps them exact.
    """
    rng = np.random.default_rng(seed)

    def whole(*shape: int) -> Float64Array:
        return rng.integers(-9, 10, shape).astype(np.float64)

    conv = RealSynapse(INPUT, "conv", whole(3, 2, 3, 3), 100 * whole(3, 3, 3), 2, 1)
    first = RealPopulation("first", (3, 3, 2), (conv,), 50 * whole(3), 700.0, beta, subtract)
    seen, pixels = RealSynapse("first", "dense", 200 * whole(4, 18)), RealSynapse(INPUT, "dense", whole(4, 30))
    second = RealPopulation("second", (4,), (seen, pixels), 20 * whole(4), 900.0, beta, subtract)
    readout = RealPopulation("readout", (3,), (RealSynapse("second", "dense", whole(3, 4)),), whole(3), None)
    return [first, second, readout]


def by_loops(populations: list[RealPopulation], codes: Codes, steps: int) -> tuple[dict[str, Codes], Float64Array]:
    """The neuron's three lines, one sample, step and output at a time."""
    spikes = {p.name: np.zeros((len(codes), steps, *p.shape), np.uint8) for p in populations[:-1]}
    total = np.zeros((len(codes), populations[-1].shape[0]))
    for n, image in enumerate(codes):
        membranes = {p.name: np.zeros(p.shape) for p in populations}
        for t in range(steps):
            for p in populations:
                entering = np.zeros(p.shape)
                for where in np.ndindex(p.shape):
                    entering[where] = p.bias[where[0]]
                    for synapse in p.synapses:
                        source = image if synapse.source == INPUT else spikes[synapse.source][n, t]
                        entering[where] += felt(synapse, source, where)
                if p.threshold is None:
                    total[n] += entering
                    continue
                u = p.beta * membranes[p.name] + entering
                fired = u >= p.threshold
                spikes[p.name][n, t] = fired
                membranes[p.name] = u - p.threshold * fired if p.subtract else u * ~fired
    return spikes, total / steps


def felt(synapse: RealSynapse, source: NDArray[np.uint8], where: tuple[int, ...]) -> float:
    if synapse.kind == "dense":
        return float(synapse.weight[where[0]] @ source.ravel())
    out, y, x = where
    total = 0.0
    for i, j in np.ndindex(synapse.weight.shape[2:]):
        row, column = y * synapse.stride + i - synapse.padding, x * synapse.stride + j - synapse.padding
        if 0 <= row < source.shape[1] and 0 <= column < source.shape[2]:
            total += float(synapse.weight[out, :, i, j] @ source[:, row, column])
            total += 0.0 if synapse.constant is None else float(synapse.constant[out, i, j])
    return total


def images(seed: int, samples: int = 3) -> Codes:
    return np.random.default_rng(seed).integers(0, 256, (samples, 2, 5, 3)).astype(np.uint8)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("beta", [1.0, 0.75, 0.5, 0.0])
def test_leaks_and_resets_are_those_of_the_neuron(beta: float, subtract: bool, steps: int) -> None:
    for seed in range(2):
        populations = small(seed, beta, subtract)
        expected, total = by_loops(populations, images(seed), steps)
        spikes, readout = run_unrounded(populations, images(seed), steps)
        assert all(np.array_equal(spikes[name], expected[name]) for name in expected)
        assert np.array_equal(readout, total)
        if steps > 1:
            assert all(0.02 < spikes[name].mean() < 0.98 for name in spikes)


@pytest.mark.parametrize("power", [-30, 7])
def test_units_are_each_populations_own(power: int) -> None:
    populations = small(1, 0.75, True)
    first = populations[0]
    factor = 2.0**power
    assert first.threshold is not None
    synapses = tuple(synapse.scaled(np.array([factor])) for synapse in first.synapses)
    scaled = replace(first, synapses=synapses, bias=first.bias * factor, threshold=first.threshold * factor)
    spikes, readout = run_unrounded(populations, images(1), 5)
    found, found_readout = run_unrounded([scaled, *populations[1:]], images(1), 5)
    assert all(np.array_equal(spikes[name], found[name]) for name in spikes)
    assert np.array_equal(readout, found_readout)


def test_a_membrane_at_the_threshold_spikes() -> None:
    synapse = RealSynapse(INPUT, "dense", np.ones((1, 1)))
    neuron = RealPopulation("p", (1,), (synapse,), np.zeros(1), 6.0)
    readout = RealPopulation("readout", (1,), (RealSynapse("p", "dense", np.ones((1, 1))),), np.zeros(1), None)
    spikes, rates = run_unrounded([neuron, readout], np.array([[2], [3], [6]], np.uint8), 6)
    assert spikes["p"][..., 0].astype(int).tolist() == [[0, 0, 1, 0, 0, 1], [0, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1]]
    assert np.array_equal(rates[:, 0] * 6, [2, 3, 6])


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_images_in_groups_are_images_alone(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    populations = small(2, 1.0, False)
    codes = images(2, samples)
    spikes, readout = run_unrounded(populations, codes, 4)
    # The largest population has 18 neurons: two images at a time.
    monkeypatch.setattr(unrounded, "CHUNK_BYTES", 2 * 8 * 18 * 4)
    found, found_readout = run_unrounded(populations, codes, 4)
    assert all(np.array_equal(spikes[name], found[name]) for name in spikes)
    assert np.array_equal(readout, found_readout)
    monkeypatch.setattr(unrounded, "CHUNK_BYTES", 1)
    assert np.array_equal(run_unrounded(populations, codes, 4)[1], readout)


def test_currents_of_what_never_changes_are_computed_once() -> None:
    first, second, _ = small(3, 1.0, False)
    pixels = torch.from_numpy(images(3)).double()[None]
    still = current(first, {INPUT: pixels})
    assert still.shape == (1, 3, 3, 3, 2)
    moving = current(second, {INPUT: pixels, "first": torch.ones(4, 3, 3, 3, 2, dtype=torch.float64)})
    assert moving.shape == (4, 3, 4)
    assert torch.equal(moving, moving[:1].expand_as(moving))


def test_a_network_without_readout_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="the last population is the readout"):
        run_unrounded(small(0, 1.0, False)[:-1], images(0), 2)


def test_nothing_that_was_given_is_changed() -> None:
    populations, untouched = small(4, 0.5, True), small(4, 0.5, True)
    codes = images(4)
    run_unrounded(populations, codes, 3)
    assert np.array_equal(codes, images(4))
    for one, same in zip(populations, untouched, strict=True):
        assert np.array_equal(one.bias, same.bias)
        for synapse, other in zip(one.synapses, same.synapses, strict=True):
            assert np.array_equal(synapse.weight, other.weight)
            if synapse.constant is not None and other.constant is not None:
                assert np.array_equal(synapse.constant, other.constant)
