from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from hardware.bounds import (
    Bounds,
    current_bounds,
    exact_in_float32,
    membrane_bounds,
    prove,
    readout_bounds,
    readout_cannot_saturate,
    require_no_wrap,
    saturation_is_harmless,
    sums_cannot_wrap,
    synaptic_bounds,
    synaptic_magnitudes,
)
from hardware.errors import RuleViolations
from hardware.network import DECAY_UNITY, STATE_LIMIT, InputSpec, IntegerNetwork, Population, Synapse
from hardware.reference import propagate, run_reference
from tests.hardware.strategies import cases

Case = tuple[IntegerNetwork, NDArray[np.uint8]]


def one_neuron(
    weight: int,
    *,
    bias: int = 0,
    threshold: int = 10,
    steps: int = 4,
    max_code: int = 255,
    reset: str = "zero",
    current_decay: int = DECAY_UNITY,
    voltage_decay: int = 0,
    inhibition: int = 0,
) -> IntegerNetwork:
    """Two inputs, one exciting and one inhibiting, into one neuron, into a readout."""
    return IntegerNetwork(
        InputSpec((2,), max_code),
        (
            Population(
                "neuron",
                (1,),
                threshold,
                np.array([bias]),
                1.0,
                current_decay=current_decay,
                voltage_decay=voltage_decay,
                reset=reset,  # type: ignore[arg-type]
            ),
            Population("out", (1,), 0, np.zeros(1, np.int64), 1.0, spiking=False),
        ),
        (
            Synapse("input", "neuron", "dense", np.array([[weight, -inhibition]], np.int32), 24),
            Synapse("neuron", "out", "dense", np.ones((1, 1), np.int32), 8),
        ),
        steps,
    )


def within(bounds: Bounds, values: NDArray[np.int32] | None) -> bool:
    assert values is not None
    return bool((values >= bounds.lower.reshape(-1)).all() and (values <= bounds.upper.reshape(-1)).all())


def unsaturated(network: IntegerNetwork, codes: NDArray[np.uint8]) -> tuple[list[NDArray[np.bool_]], NDArray[np.int64]]:
    """All spikes and the readouts of the same network with membranes of unlimited width (no decay)."""
    activity = {"input": network.input.present(codes)}
    membranes = {p.name: np.zeros((len(codes), *p.shape), np.int64) for p in network.populations}
    spikes = []
    readouts = np.zeros((len(codes), network.classes), np.int64)
    for _ in range(network.steps):
        for p in network.populations:
            total = sum(propagate(s, activity[s.source]) for s in network.incoming(p.name)) + p.bias
            v = membranes[p.name] + total
            if p.spiking:
                fires = v > p.threshold
                membranes[p.name] = np.where(fires, 0 if p.reset == "zero" else v - p.threshold, v)
                activity[p.name] = fires.astype(np.int64)
                spikes.append(fires)
            else:
                readouts += total.reshape(len(codes), -1)
    return spikes, readouts


@settings(max_examples=100, deadline=None)
@given(cases())
def test_bounds_are_sound(case: Case) -> None:
    network, codes = case
    trace = run_reference(network, codes)
    for name, bounds in membrane_bounds(network).items():
        assert within(bounds, trace.populations[name].membranes)
    readout = readout_bounds(network)
    assert (trace.readouts >= readout.lower.reshape(-1)).all()
    assert (trace.readouts <= readout.upper.reshape(-1)).all()


def test_synaptic_bounds_are_attained_border_included() -> None:
    """Every extreme is reached by some of all possible inputs of a small padded convolution."""
    rng = np.random.default_rng(2)
    weight = rng.integers(-5, 6, (2, 2, 3, 3)).astype(np.int32)
    network = IntegerNetwork(
        InputSpec((1, 3, 3), 3, (2,)),
        (Population("out", (2, 2, 2), 0, np.zeros((2, 2, 2), np.int64), 1.0, spiking=False),),
        (Synapse("input", "out", "conv", weight, 8, stride=2, padding=1),),
        1,
    )
    # Sums are linear, so their extremes lie at the corners: each pixel at 0 or at its largest code.
    corners = np.array(list(product([0, 3], repeat=9)), np.uint8).reshape(-1, 1, 3, 3)
    sums = propagate(network.synapses[0], network.input.present(corners))
    bounds = synaptic_bounds(network)["out"]
    assert np.array_equal(bounds.lower, sums.min(axis=0))
    assert np.array_equal(bounds.upper, sums.max(axis=0))


def test_bounds_add_over_synapses_and_see_spikes_as_zero_or_one() -> None:
    network = one_neuron(3, max_code=1)
    network = replace(
        network,
        synapses=(*network.synapses, Synapse("input", "out", "dense", np.array([[-7, 2]], np.int32), 8)),
    )
    assert synaptic_bounds(network)["out"].range == (-7, 1 + 2)
    assert synaptic_magnitudes(network)["out"].tolist() == [1 + 7 + 2]


def test_dense_bounds_read_channels_in_c_order() -> None:
    weight = np.array([[1, 2, 4, 8, 16, 32, 64, 128]], np.int32)
    network = IntegerNetwork(
        InputSpec((1, 2, 2), 10, (3,)),
        (Population("out", (1,), 0, np.zeros(1, np.int64), 1.0, spiking=False),),
        (Synapse("input", "out", "dense", weight, 9),),
        1,
    )
    constant = 3 * (16 + 32 + 64 + 128)
    assert synaptic_bounds(network)["out"].range == (constant, constant + 10 * 15)


def test_membrane_bounds_are_tight_without_decay() -> None:
    network = one_neuron(2, inhibition=3, bias=-1, threshold=300, max_code=1, steps=5)
    # Silent sinking by -3 - 1 per step; rising by 2 - 1, never past the threshold.
    assert membrane_bounds(network)["neuron"].range == (-4 * 5 * 64, 1 * 5 * 64)
    # With a threshold in reach the membrane stays at or below it, or is reset to 0.
    low = replace(network, populations=(replace(network.populations[0], threshold=2), network.populations[1]))
    assert membrane_bounds(low)["neuron"].range == (-4 * 5 * 64, 2 * 64)


def test_a_neuron_that_always_spikes_rests_at_zero() -> None:
    network = one_neuron(0, bias=50, threshold=10)
    assert membrane_bounds(network)["neuron"].range == (0, 0)
    subtracting = one_neuron(0, bias=50, threshold=10, reset="subtract", steps=3)
    assert membrane_bounds(subtracting)["neuron"].range == (40 * 64, 120 * 64)


def test_current_bounds_follow_the_truncated_geometric_sum() -> None:
    network = one_neuron(1, max_code=1, current_decay=1000, steps=6, threshold=10**6)
    u = 0
    for _ in range(6):
        u = int(u * 3096 / 4096) + 64
    assert current_bounds(network)["neuron"].range == (0, u)
    trace = run_reference(replace(network, populations=network.populations), np.array([[1, 0]], np.uint8))
    membranes = trace.populations["neuron"].membranes
    assert membranes is not None
    assert int(np.diff(membranes[0, :, 0])[-1]) == u


@pytest.mark.parametrize(("weight", "wraps"), [(2**17 // 255, False), (2**17 // 255 + 1, True)])
def test_a_sum_that_can_wrap_is_refused(weight: int, wraps: bool) -> None:
    for network in (one_neuron(weight), one_neuron(0, inhibition=weight)):
        assert sums_cannot_wrap(network) is not wraps
        if wraps:
            with pytest.raises(RuleViolations) as refused:
                require_no_wrap(network)
            (violation,) = refused.value.violations
            assert violation.object == "neuron"
            assert violation.rule == "synaptic sum cannot wrap"
            assert "131072" in violation.limit
        else:
            require_no_wrap(network)


def test_currents_that_accumulate_can_wrap_where_one_sum_cannot() -> None:
    assert sums_cannot_wrap(one_neuron(300))
    assert not sums_cannot_wrap(one_neuron(300, current_decay=10))


def test_every_wrapping_population_is_named() -> None:
    network = one_neuron(600)
    huge = replace(network.synapses[1], weight=np.full((1, 1), 2**17, np.int32), bits=20)
    with pytest.raises(RuleViolations) as refused:
        require_no_wrap(replace(network, synapses=(network.synapses[0], huge)))
    assert [v.object for v in refused.value.violations] == ["neuron", "out"]


@pytest.mark.parametrize(
    ("network", "harmless"),
    [
        # Rising beyond the clip only means a spike and a reset.
        (one_neuron(500, steps=8), True),
        # After a subtractive reset the membrane remembers how far it overshot.
        (one_neuron(500, steps=8, reset="subtract", threshold=100_000), False),
        # A threshold at the clip is never passed by a clipped membrane, yet by an unlimited one.
        (one_neuron(500, steps=8, threshold=2**17), False),
        (one_neuron(500, steps=8, threshold=2**17 - 1), True),
        # Sinking to the clip takes two steps; climbing back beyond the threshold takes two more.
        (one_neuron(500, inhibition=500, steps=3), True),
        (one_neuron(500, inhibition=500, steps=4), False),
        # A neuron that can only sink never comes back.
        (one_neuron(0, inhibition=500, steps=8), True),
    ],
)
def test_harmless_saturation_is_told_from_harmful(network: IntegerNetwork, harmless: bool) -> None:
    assert saturation_is_harmless(network) is harmless
    levels = np.array([[255, 0], [0, 255]], np.uint8)
    sequences = np.array(list(product(levels, repeat=network.steps)))
    differs = False
    for sequence in sequences:
        # run_reference takes changing inputs; the unlimited model is fed the same ones step by step.
        expected = run_reference(network, sequence[None]).populations["neuron"].spikes
        assert expected is not None
        v, unlimited = 0, []
        for codes in sequence.astype(np.int64):
            v += int(network.synapses[0].weight[0] @ codes) + int(network.populations[0].bias[0])
            fires = v > network.populations[0].threshold
            unlimited.append(fires)
            if fires:
                v = 0 if network.populations[0].reset == "zero" else v - network.populations[0].threshold
        differs |= unlimited != expected[0, :, 0].tolist()
    assert differs is not harmless


@settings(max_examples=60, deadline=None)
@given(cases(leaky=False))
def test_where_saturation_is_harmless_unlimited_integers_agree(case: Case) -> None:
    network, codes = case
    if codes.ndim == len(network.input.shape) + 2:
        codes = codes[:, 0]
    if not saturation_is_harmless(network):
        return
    spikes, readouts = unsaturated(network, codes)
    trace = run_reference(network, codes)
    assert np.array_equal(readouts, trace.readouts)
    order = [p.name for p in network.populations if p.spiking]
    for index, fires in enumerate(spikes):
        recorded = trace.populations[order[index % len(order)]].spikes
        assert recorded is not None
        assert np.array_equal(fires.reshape(len(codes), -1), recorded[:, index // len(order)])


def test_a_readout_can_be_read_from_its_membrane_only_below_the_clip() -> None:
    network = one_neuron(1)
    limit = STATE_LIMIT // 64 // network.steps
    for weight, safe in [(limit, True), (limit + 1, False)]:
        heavy = replace(network.synapses[1], weight=np.full((1, 1), weight, np.int32), bits=20)
        assert readout_cannot_saturate(replace(network, synapses=(network.synapses[0], heavy))) is safe


@pytest.mark.parametrize(
    ("network", "exact"),
    [
        (one_neuron(2**24 // 255), True),
        (one_neuron(2**24 // 255 + 1), False),
        (one_neuron(2**23 // 255, inhibition=2**23 // 255 + 2), False),
        (one_neuron(2**24 // 255, bias=-(2**24 % 255) - 1), False),
        (one_neuron(1, voltage_decay=1), False),
    ],
)
def test_float32_holds_sums_below_24_bits(network: IntegerNetwork, exact: bool) -> None:
    assert exact_in_float32(network) is exact


def test_readout_sums_count_all_steps_for_float32() -> None:
    network = one_neuron(1, steps=4)
    for weight, exact in [(2**22 - 1, True), (2**22, False)]:
        heavy = replace(network.synapses[1], weight=np.full((1, 1), weight, np.int32), bits=24)
        assert exact_in_float32(replace(network, synapses=(network.synapses[0], heavy))) is exact


def test_the_table_has_a_row_per_population_and_agrees_with_the_predicates() -> None:
    network = one_neuron(600, inhibition=600, steps=8)
    rows = prove(network)
    assert [row.population for row in rows] == ["neuron", "out"]
    neuron, readout = rows
    assert neuron.sum_range == (-153_000, 153_000)
    assert neuron.can_wrap
    assert neuron.can_saturate
    assert not neuron.saturation_is_harmless
    assert neuron.membrane_range == (-STATE_LIMIT, 10 * 64)
    assert not readout.can_wrap
    assert not readout.can_saturate
    assert readout.membrane_range == (0, 8 * 64)
    assert all(row.exact_in_float32 for row in rows)
