"""The ordinary integer machine: every rule at its edge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hardware.bounds import current_bounds, membrane_bounds
from hardware.network import DECAY_UNITY, InputSpec, IntegerNetwork, Population, Synapse
from hardware.targets.generic_int8 import GENERIC_INT8, MAX_INT32
from hardware.targets.rules import check
from tests.hardware.target_samples import network, with_population, with_weight


def broken(candidate: IntegerNetwork) -> list[tuple[str, str]]:
    return [(v.object, v.rule) for v in check(candidate, GENERIC_INT8)]


def one_weight(weight: int, exponent: int, max_code: int, steps: int = 1, **changes: Any) -> IntegerNetwork:
    """One input, one hidden neuron, one readout neuron; ``changes`` are the hidden neuron's."""
    hidden = Population("hidden", (1,), 1, np.zeros(1, np.int64), 1.0)
    return IntegerNetwork(
        InputSpec((1,), max_code),
        (
            replace(hidden, **changes),
            Population("out", (1,), 0, np.zeros(1, np.int64), 1.0, spiking=False),
        ),
        (
            Synapse("input", "hidden", "dense", np.array([[weight << exponent]], np.int32), 8, exponent),
            Synapse("hidden", "out", "dense", np.ones((1, 1), np.int32), 8),
        ),
        steps,
    )


def bias(value: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.full(1, value, np.int64)


def test_a_network_within_all_limits_breaks_no_rule() -> None:
    assert broken(network()) == []


def test_resets_that_a_chip_does_not_have_are_fine_here() -> None:
    assert broken(with_population(0, reset="subtract")) == []


@pytest.mark.parametrize(
    ("allowed", "refused", "place"),
    [
        (with_weight(1, 127, 8), with_weight(1, 128, 9), ("first->second", "weight mantissas fit 8 bits")),
        (with_weight(2, -128, 8), with_weight(2, -129, 9), ("first->out", "weight mantissas fit 8 bits")),
        # 127 * 2**17 * 129 and 127 * 2**17 * 130 lie on either side of 2**31.
        (
            one_weight(127, 17, 129),
            one_weight(127, 17, 130),
            ("hidden", "synaptic sums fit 32 bits"),
        ),
        (
            # State units: 2**23 - 1 of the membrane, 64 * 100 of the current, 64 of each unit of bias.
            one_weight(100, 0, 1, bias=bias((2**31 - 2**23) // 64 - 100)),
            one_weight(100, 0, 1, bias=bias((2**31 - 2**23) // 64 - 99)),
            ("hidden", "states fit 32 bits"),
        ),
        (
            one_weight(1, 0, 1, threshold=2**25 - 1),
            one_weight(1, 0, 1, threshold=2**25),
            ("hidden", "thresholds fit 32 bits"),
        ),
    ],
)
def test_each_limit_is_sharp(allowed: IntegerNetwork, refused: IntegerNetwork, place: tuple[str, str]) -> None:
    assert place not in broken(allowed)
    assert place in broken(refused)
    assert all(row.remedy and row.limit and row.actual for row in check(refused, GENERIC_INT8))


def test_states_just_inside_32_bits_break_nothing() -> None:
    assert broken(one_weight(100, 0, 1, bias=bias((2**31 - 2**23) // 64 - 100))) == []


@pytest.mark.parametrize(("state", "decay"), [("current", "current_decay"), ("membrane", "voltage_decay")])
def test_products_of_decays_are_bounded_by_what_a_state_can_reach(state: str, decay: str) -> None:
    """A state that stays below 2**19 may be multiplied by 4095; a larger one only by less."""

    def leaky(weight: int, lost: int) -> IntegerNetwork:
        return one_weight(weight, 0, 255, 1, threshold=2**20, **{decay: lost})

    def reached(candidate: IntegerNetwork) -> int:
        bounds = current_bounds(candidate) if state == "current" else membrane_bounds(candidate)
        return bounds["hidden"].range[1]

    rule = ("hidden", "decay products fit 32 bits")
    small, large = leaky(32, 1), leaky(33, 1)
    assert reached(small) * 4095 <= MAX_INT32 < reached(large) * 4095
    assert broken(small) == []
    assert broken(large) == [rule]
    (row,) = check(large, GENERIC_INT8)
    assert state in row.actual
    assert "do not leak" in row.remedy
    assert broken(leaky(33, 200)) == []
    # Neither keeping all nor keeping nothing takes a multiplication.
    for lost in (0, DECAY_UNITY):
        assert broken(leaky(127, lost)) == []


def test_readout_sums_may_outgrow_what_a_step_may_not() -> None:
    def summed(steps: int) -> IntegerNetwork:
        base = one_weight(1, 0, 1, steps)
        heavy = Synapse("hidden", "out", "dense", np.full((1, 1), 127 << 17, np.int32), 8, 17)
        return replace(base, synapses=(base.synapses[0], heavy))

    rule = ("out", "readout sums fit 32 bits")
    # 127 * 2**17 * 129 < 2**31 <= 127 * 2**17 * 130, without any limit on a single step.
    assert rule not in broken(summed(129))
    assert rule in broken(summed(130))
    assert ("out", "synaptic sums fit 32 bits") not in broken(summed(130))


def test_all_broken_rules_are_told_at_once() -> None:
    base = one_weight(127, 17, 130, threshold=2**25, bias=bias(2**25))
    assert {rule for _, rule in broken(base)} == {
        "synaptic sums fit 32 bits",
        "states fit 32 bits",
        "thresholds fit 32 bits",
    }
