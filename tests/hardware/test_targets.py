from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hardware.errors import SpikeguardError
from hardware.network import DECAY_UNITY, InputSpec, IntegerNetwork, Population, Synapse
from hardware.reference import propagate, run_reference
from hardware.targets.loihi2 import LOIHI2, MAX_BIAS, MAX_VTH_MANTISSA, check
from hardware.targets.rules import connections, count_activity, fan_out, placement
from hardware.trace import Trace


def network() -> IntegerNetwork:
    """Convolution, skip connection and dense readout, all within Loihi's limits."""
    rng = np.random.default_rng(0)
    return IntegerNetwork(
        InputSpec((1, 5, 4), 255),
        (
            Population("first", (3, 5, 4), 2000, np.full((3, 5, 4), 5), 1.0),
            Population("second", (2, 3, 2), 40, np.zeros((2, 3, 2), np.int64), 1.0),
            Population("out", (2,), 0, np.zeros(2, np.int64), 1.0, spiking=False),
        ),
        (
            Synapse("input", "first", "conv", rng.integers(-9, 30, (3, 1, 3, 3)).astype(np.int32), 8, padding=1),
            Synapse("first", "second", "conv", rng.integers(-9, 30, (2, 3, 3, 3)).astype(np.int32), 8, 0, 2, 1),
            Synapse("first", "out", "dense", 2 * rng.integers(-9, 30, (2, 60)).astype(np.int32), 8, 1),
            Synapse("second", "out", "dense", 2 * rng.integers(-9, 30, (2, 12)).astype(np.int32), 8, 1),
        ),
        4,
    )


def with_population(index: int, **changes: Any) -> IntegerNetwork:
    base = network()
    changed = [replace(p, **changes) if i == index else p for i, p in enumerate(base.populations)]
    return replace(base, populations=tuple(changed))


def with_weight(index: int, value: int, bits: int, exponent: int = 0) -> IntegerNetwork:
    """One weight set to ``value``, all others zero."""
    base = network()
    weight = np.zeros_like(base.synapses[index].weight)
    weight.reshape(-1)[0] = value
    synapse = replace(base.synapses[index], weight=weight, bits=bits, exponent=exponent)
    synapses = [synapse if i == index else s for i, s in enumerate(base.synapses)]
    return replace(base, synapses=tuple(synapses))


def broken(candidate: IntegerNetwork) -> list[tuple[str, str]]:
    return [(v.object, v.rule) for v in check(candidate, LOIHI2)]


def test_a_network_within_all_limits_breaks_no_rule() -> None:
    assert check(network(), LOIHI2) == []


DENSE_RULE = "dense weights are even and have 8 bits"
CONV_RULE = "conv weights have 8 bits"


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


def test_more_neurons_than_a_chip_holds_are_refused() -> None:
    size = 129 * 8192
    giant = IntegerNetwork(
        InputSpec((1, 1, size)),
        (Population("out", (1, 1, size), 0, np.zeros((1, 1, size), np.int64), 1.0, spiking=False),),
        (Synapse("input", "out", "conv", np.ones((1, 1, 1, 1), np.int32), 8),),
        1,
    )
    assert broken(giant) == [("network", "neurons fit one chip")]


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


def test_placement_adds_up() -> None:
    base = network()
    placed = placement(base, LOIHI2)
    assert [row.population for row in placed.populations] == ["first", "second", "out"]
    assert [row.neurons for row in placed.populations] == [60, 12, 2]
    assert placed.neurons == 74
    out = placed.populations[2]
    assert out.connections == 2 * (60 + 12)
    assert out.weight_bytes == 2 * (60 + 12)
    assert placed.populations[0].weight_bytes == 27
    assert placed.connections == sum(connections(base, s) for s in base.synapses)
    assert placed.minimum_cores == 3


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
