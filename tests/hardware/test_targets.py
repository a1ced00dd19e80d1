from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hardware.errors import SpikeguardError
from hardware.network import DECAY_UNITY, InputSpec, IntegerNetwork, Population, Synapse
from hardware.reference import propagate, run_reference
from hardware.targets.catalogue import TARGETS
from hardware.targets.generic_int8 import GENERIC_INT8
from hardware.targets.loihi2 import (
    CORES_OF_LARGEST_SYSTEM,
    LOIHI2,
    MAX_BIAS,
    MAX_VTH_MANTISSA,
    MEMORY_PER_CORE,
    NEURON_BYTES,
    NEURONS_PER_CORE,
    cores_fit_the_largest_system,
)
from hardware.targets.rules import Placement, check, connections, count_activity, fan_in, fan_out, placement
from hardware.trace import PopulationTrace, Trace
from tests.hardware.target_samples import network, with_population, with_weight


def broken(candidate: IntegerNetwork) -> list[tuple[str, str]]:
    return [(v.object, v.rule) for v in check(candidate, LOIHI2)]


def test_a_network_within_all_limits_breaks_no_rule() -> None:
    assert check(network(), LOIHI2) == []


DENSE_RULE = "dense weights are even and have 8 bits"
CONV_RULE = "conv weights have 8 bits"
EXPONENT_RULE = "conv weight exponents have 4 bits"


@pytest.mark.parametrize(
    ("allowed", "refused", "place"),
    [
        (
            with_population(0, threshold=MAX_VTH_MANTISSA),
            with_population(0, threshold=MAX_VTH_MANTISSA + 1),
            ("first", "thresholds fit 17 bits"),
        ),
        (
            with_population(2, bias=np.array([MAX_BIAS, -MAX_BIAS])),
            with_population(2, bias=np.array([0, -MAX_BIAS - 1])),
            ("out", "biases fit 13 bits"),
        ),
        (
            with_population(1, current_decay=1),
            with_population(1, current_decay=0),
            ("second", "decays fit 12 bits"),
        ),
        (
            with_population(1, voltage_decay=DECAY_UNITY - 1),
            with_population(1, voltage_decay=DECAY_UNITY),
            ("second", "decays fit 12 bits"),
        ),
        (with_population(0, reset="zero"), with_population(0, reset="subtract"), ("first", "membranes reset to zero")),
        (with_weight(1, -128, 8), with_weight(1, 128, 9), ("first->second", CONV_RULE)),
        (with_weight(1, 254, 8, 1), with_weight(1, -129, 9), ("first->second", CONV_RULE)),
        (with_weight(1, 127 << 7, 8, 7), with_weight(1, 64 << 8, 8, 8), ("first->second", EXPONENT_RULE)),
        (with_weight(1, 7 << 11, 4, 11), with_weight(1, 8 << 11, 5, 11), ("first->second", EXPONENT_RULE)),
        (with_weight(2, 254, 8, 1), with_weight(2, 256, 9, 1), ("first->out", DENSE_RULE)),
        (with_weight(2, -256, 8, 1), with_weight(2, -258, 9, 1), ("first->out", DENSE_RULE)),
        (with_weight(2, 126, 8), with_weight(2, 127, 8), ("first->out", DENSE_RULE)),
        (
            with_weight(0, 127, 8),
            with_weight(0, 127 << 3, 8, 3),
            ("first", "synaptic sums cannot wrap"),
        ),
    ],
)
def test_each_limit_is_sharp(allowed: IntegerNetwork, refused: IntegerNetwork, place: tuple[str, str]) -> None:
    assert broken(allowed) == []
    assert place in broken(refused)


def test_all_broken_rules_are_told_at_once_with_what_is_and_what_may_be() -> None:
    rows = check(with_population(0, threshold=2**18, reset="subtract", bias=np.full((3, 5, 4), 5000)), LOIHI2)
    assert [row.rule for row in rows] == [
        "membranes reset to zero",
        "thresholds fit 17 bits",
        "biases fit 13 bits",
    ]
    assert {row.object for row in rows} == {"first"}
    assert rows[1].actual == "262144"
    assert "131071" in rows[1].limit
    assert all(row.remedy for row in rows)


def wide(neurons: int) -> IntegerNetwork:
    """A readout of so many neurons, each reading one input; it takes no memory itself."""
    shape = (1, 1, neurons)
    bias = np.broadcast_to(np.zeros((), np.int64), shape)
    return IntegerNetwork(
        InputSpec(shape),
        (Population("out", shape, 0, bias, 1.0, spiking=False),),
        (Synapse("input", "out", "conv", np.ones((1, 1, 1, 1), np.int32), 8),),
        1,
    )


def deep(fan_in: int) -> IntegerNetwork:
    """A readout of two neurons that read so many inputs."""
    return IntegerNetwork(
        InputSpec((fan_in,), 1),
        (Population("out", (2,), 0, np.zeros(2, np.int64), 1.0, spiking=False),),
        (Synapse("input", "out", "dense", np.zeros((2, fan_in), np.int32), 8),),
        1,
    )


def test_a_neuron_with_more_weights_than_a_core_holds_is_refused() -> None:
    room = MEMORY_PER_CORE - NEURON_BYTES
    assert broken(deep(room)) == []
    rows = check(deep(room + 1), LOIHI2)
    assert [(row.object, row.rule) for row in rows] == [("out", "fan in fits one core")]
    assert str(room + 1) in rows[0].actual
    assert "fewer bits" in rows[0].remedy


def test_more_cores_than_were_ever_built_into_one_system_are_refused() -> None:
    most = CORES_OF_LARGEST_SYSTEM * NEURONS_PER_CORE
    assert list(cores_fit_the_largest_system(wide(most))) == []
    (breach,) = cores_fit_the_largest_system(wide(most + 1))
    assert breach.object == "network"
    assert breach.actual == "140545 cores"
    assert breach.remedy


def test_cores_are_what_neurons_or_memory_need() -> None:
    def cores(candidate: IntegerNetwork) -> int | None:
        return placement(candidate, LOIHI2).minimum_cores

    assert [cores(wide(n)) for n in (8192, 8193, 16385)] == [1, 2, 3]
    # Two neurons of 196,600 weights and 8 bytes each fill two cores to the last byte.
    assert [cores(deep(n)) for n in (98_296, 98_297, 196_600, 196_601)] == [1, 2, 2, 3]


def test_chips_are_full_before_another_is_needed() -> None:
    (row,) = placement(wide(8192), LOIHI2).populations
    for cores, chips in ((1, 1), (128, 1), (129, 2), (257, 3)):
        assert Placement("loihi2", (replace(row, minimum_cores=cores),), 128).minimum_chips == chips


def test_without_cores_there_are_none_to_count() -> None:
    placed = placement(network(), GENERIC_INT8)
    assert (placed.minimum_cores, placed.minimum_chips) == (None, None)
    assert placed.weight_bytes == 27 + 54 + 144
    assert placed.memory_bytes == 27 + 54 + 144 + 74 * 13


def test_targets_are_found_by_their_names() -> None:
    assert {name: target.name for name, target in TARGETS.items()} == {
        name: name for name in ("loihi2", "generic-int8", "lava", "netx")
    }


def test_fan_in_is_fan_out_seen_from_the_other_end() -> None:
    """With all weights 1 and all sources active, a neuron's sum is its fan-in; the sum is over all its synapses."""
    base = network()
    for population in base.populations:
        sums = [
            propagate(replace(s, weight=np.ones_like(s.weight)), np.ones((1, *base.source_shape(s)), np.int64))
            for s in base.incoming(population.name)
        ]
        assert np.array_equal(fan_in(base, population), np.sum(sums, axis=0).reshape(-1))


def test_fan_out_counts_every_connection_border_included() -> None:
    """With all weights 1, pushing a lone spike through a synapse reaches as many neurons as it has connections."""
    base = network()
    for synapse in base.synapses:
        shape = base.source_shape(synapse)
        ones = replace(synapse, weight=np.ones_like(synapse.weight))
        lone_spikes = np.eye(int(np.prod(shape)), dtype=np.int64).reshape(-1, *shape)
        reached = propagate(ones, lone_spikes).reshape(len(lone_spikes), -1).sum(axis=1)
        assert np.array_equal(fan_out(base, synapse), reached)
        assert connections(base, synapse) == reached.sum()


def test_placement_is_what_one_counts_by_hand() -> None:
    """3x3 kernels with padding 1: over 5x4 pixels 13 x 10 of 15 x 12 taps lie inside; at stride 2 a pixel meets
    two rows and two columns of outputs at most, and 7 x 5 of 9 x 6 taps lie inside."""
    placed = placement(network(), LOIHI2)
    first, second, out = placed.populations
    assert [row.population for row in placed.populations] == ["first", "second", "out"]
    assert [row.neurons for row in placed.populations] == [60, 12, 2]
    assert [row.connections for row in placed.populations] == [13 * 10 * 3, 7 * 5 * 3 * 2, 2 * 72]
    assert [row.fan_in for row in placed.populations] == [9, 9 * 3, 60 + 12]
    assert [row.fan_out for row in placed.populations] == [2 * 2 * 2 + 2, 2, 0]
    assert [row.axons_in for row in placed.populations] == [20, 60, 60 + 12]
    assert [row.axons_out for row in placed.populations] == [60 + 60, 12, 0]
    assert [row.weight_bytes for row in placed.populations] == [27, 54, 144]
    assert [row.state_bytes for row in placed.populations] == [60 * 8, 12 * 8, 2 * 8]
    assert [first.minimum_cores, second.minimum_cores, out.minimum_cores] == [1, 1, 1]
    assert (placed.neurons, placed.connections) == (74, 390 + 210 + 144)
    assert (placed.weight_bytes, placed.memory_bytes) == (225, 225 + 74 * 8)
    assert (placed.minimum_cores, placed.minimum_chips) == (3, 1)


def test_axons_carry_only_what_is_read() -> None:
    """A 1x1 kernel at stride 2 reads every other pixel."""
    sparse = IntegerNetwork(
        InputSpec((1, 4, 4)),
        (Population("out", (1, 2, 2), 0, np.zeros((1, 2, 2), np.int64), 1.0, spiking=False),),
        (Synapse("input", "out", "conv", np.ones((1, 1, 1, 1), np.int32), 8, stride=2),),
        1,
    )
    (row,) = placement(sparse, LOIHI2).populations
    assert (row.axons_in, row.connections, row.fan_in, row.fan_out) == (4, 4, 1, 0)


def test_weights_of_few_bits_are_packed() -> None:
    narrow = with_weight(2, 2, 3, 1)
    # 120 three-bit weights beside 24 of eight bits.
    assert placement(narrow, LOIHI2).populations[2].weight_bytes == 45 + 24


def test_activity_is_what_the_trace_shows() -> None:
    base = network()
    codes = np.random.default_rng(1).integers(0, 256, (6, 1, 5, 4)).astype(np.uint8)
    trace = run_reference(base, codes)
    activity = count_activity(base, trace)
    first, second = trace.populations["first"].spikes, trace.populations["second"].spikes
    assert first is not None
    assert second is not None
    assert first.any()
    assert second.any()
    assert activity.spikes == {"first": first.sum() / 6, "second": second.sum() / 6}
    # Each operation is one spike on one connection: what all-ones weights would add up to.
    ones = replace(base.synapses[1], weight=np.ones_like(base.synapses[1].weight))
    arrived = propagate(ones, first.reshape(-1, 3, 5, 4).astype(np.int64)).sum() / 6
    assert activity.synaptic_operations["first->second"] == pytest.approx(arrived)
    assert activity.synaptic_operations["second->out"] == pytest.approx(2 * second.sum() / 6)
    assert set(activity.synaptic_operations) == {"first->second", "first->out", "second->out"}
    assert activity.spikes_per_image == pytest.approx((first.sum() + second.sum()) / 6)
    assert activity.synaptic_operations_per_image == pytest.approx(sum(activity.synaptic_operations.values()))


def test_activity_needs_spikes_and_samples() -> None:
    base = network()
    codes = np.zeros((1, 1, 5, 4), np.uint8)
    with pytest.raises(SpikeguardError, match="no spikes of population first"):
        count_activity(base, run_reference(base, codes, "readouts"))
    with pytest.raises(SpikeguardError, match="without samples"):
        count_activity(base, Trace(np.zeros((0, 2), np.int64)))


def test_activity_needs_the_spikes_of_this_network() -> None:
    base = network()
    trace = run_reference(base, np.zeros((2, 1, 5, 4), np.uint8))
    foreign = PopulationTrace(np.zeros((2, 4, 61), bool), None)
    with pytest.raises(SpikeguardError, match=r"\(2, 4, 61\) for population first.*\(2, 4, 60\)"):
        count_activity(base, Trace(trace.readouts, {**trace.populations, "first": foreign}))


def test_a_readout_that_could_saturate_is_refused() -> None:
    """72 spikes of weight 254 reach 18,288 weight units in a step; the eighth step passes 2**17."""
    base = network()
    heavy = tuple(
        replace(s, weight=np.full_like(s.weight, 254), bits=8, exponent=1) if s.kind == "dense" else s
        for s in base.synapses
    )
    assert broken(replace(base, synapses=heavy, steps=7)) == []
    refused = replace(base, synapses=heavy, steps=8)
    (row,) = check(refused, LOIHI2)
    assert (row.object, row.rule) == ("out", "readout sum fits the membrane")
    assert (row.actual, row.remedy) == ("0..146304", "lower the readout's scale, or run fewer steps")
