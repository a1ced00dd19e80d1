"""Counted operations and published costs, multiplied by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hardware.errors import RuleViolations, SpikeguardError
from hardware.network import InputSpec, IntegerNetwork, Population, Synapse
from hardware.reference import run_reference
from hardware.targets.energy import Operations, count_operations, estimate_energy
from hardware.trace import Trace


def network() -> IntegerNetwork:
    """Two inputs and a constant one, two neurons that spike at every step, one readout; three steps."""
    return IntegerNetwork(
        InputSpec((2,), 255, (1,)),
        (
            Population("hidden", (2,), 0, np.zeros(2, np.int64), 1.0),
            Population("out", (1,), 0, np.zeros(1, np.int64), 1.0, spiking=False),
        ),
        (
            Synapse("input", "hidden", "dense", np.ones((2, 3), np.int32), 8),
            Synapse("hidden", "out", "dense", np.ones((1, 2), np.int32), 8),
        ),
        3,
    )


CODES = np.array([[3, 0], [1, 2]], np.uint8)


def counted(candidate: IntegerNetwork, codes: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Operations:
    return count_operations(candidate, codes, run_reference(candidate, codes))


def test_operations_are_what_one_counts_by_hand() -> None:
    assert counted(network(), CODES) == Operations(
        synaptic=2 * 3 * 1,
        input=3 * (2 + 3) * 2 / 2,  # three steps, two and three codes that are not zero, two neurons; two images
        updates=3 * 3,
        decays=0,
        dense=3 * 2 + 2 * 1,
    )


def test_inputs_that_change_are_counted_as_they_change() -> None:
    codes = np.array([[[3, 0], [0, 0], [1, 1]]], np.uint8)
    assert counted(network(), codes).input == (2 + 1 + 3) * 2
    still = np.repeat(CODES[:, None], 3, axis=1)
    assert counted(network(), still) == counted(network(), CODES)


@pytest.mark.parametrize(
    ("current_decay", "voltage_decay", "states"), [(4096, 0, 0), (4096, 9, 1), (9, 0, 1), (9, 9, 2), (0, 4096, 0)]
)
def test_only_shares_between_nothing_and_all_are_multiplied(
    current_decay: int, voltage_decay: int, states: int
) -> None:
    base = network()
    hidden = replace(base.populations[0], current_decay=current_decay, voltage_decay=voltage_decay)
    assert counted(replace(base, populations=(hidden, base.populations[1])), CODES).decays == 3 * 2 * states


def test_energies_are_counts_times_published_costs() -> None:
    operations = Operations(synaptic=6, input=15, updates=9, decays=6, dense=8)
    found = {row.name: row.nanojoules for row in estimate_energy(operations)}
    expected = {
        "Loihi, 14 nm": ((6 + 15) * 23.6 + 9 * 52, (6 + 15) * 23.6 + 9 * 81),
        "45 nm CMOS, int8": (6 * 0.1 + 15 * 0.3 + 9 * 0.3 + 6 * 3.1,) * 2,
        "45 nm CMOS, float32": (6 * 0.9 + 15 * 4.6 + 9 * 2.7 + 6 * 3.7,) * 2,
        "without spikes, 45 nm CMOS, int8": (8 * 0.3,) * 2,
        "without spikes, 45 nm CMOS, float32": (8 * 4.6,) * 2,
    }
    assert found.keys() == expected.keys()
    for name, picojoules in expected.items():
        assert found[name] == pytest.approx(tuple(value / 1000 for value in picojoules))
    assert found["Loihi, 14 nm"] == pytest.approx((0.9636, 1.2246))


def test_every_estimate_says_where_its_costs_come_from() -> None:
    sources = {row.name: row.source for row in estimate_energy(counted(network(), CODES))}
    assert "Davies et al., IEEE Micro 38(1), 2018" in sources["Loihi, 14 nm"]
    assert "simulated" in sources["Loihi, 14 nm"]
    assert all("Horowitz, ISSCC 2014" in source for name, source in sources.items() if "CMOS" in name)


def test_codes_and_trace_belong_together() -> None:
    base = network()
    trace = run_reference(base, CODES)
    with pytest.raises(SpikeguardError, match="1 images and 2 samples"):
        count_operations(base, CODES[:1], trace)
    with pytest.raises(RuleViolations, match="shape"):
        count_operations(base, np.zeros((2, 5), np.uint8), trace)
    with pytest.raises(SpikeguardError, match="record traces"):
        count_operations(base, CODES, run_reference(base, CODES, "readouts"))
    with pytest.raises(SpikeguardError, match="at least one image"):
        count_operations(base, CODES[:0], Trace(np.zeros((0, 1), np.int64)))
