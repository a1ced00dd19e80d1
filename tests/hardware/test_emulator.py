from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import numba.core.caching
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from hardware import emulator as emulator_module
from hardware import kernels, proof_checks
from hardware.bounds import Bounds, prove
from hardware.emulator import Emulator, count_saturations, run_emulator, run_strictly
from hardware.errors import RuleViolations
from hardware.network import (
    FRACTION_BITS,
    STATE_LIMIT,
    InputSpec,
    IntegerNetwork,
    Population,
    Synapse,
)
from hardware.reference import run_reference
from hardware.trace import Trace
from tests.hardware.strategies import build_network, cases

Case = tuple[IntegerNetwork, NDArray[np.uint8]]


def assert_same(expected: Trace, actual: Trace) -> None:
    """Every value of every population, and the very same types and shapes."""
    assert np.array_equal(expected.readouts, actual.readouts)
    assert actual.readouts.dtype == np.int64
    assert list(expected.populations) == list(actual.populations)
    for name, population in expected.populations.items():
        other = actual.populations[name]
        for left, right in ((population.membranes, other.membranes), (population.spikes, other.spikes)):
            assert (left is None) == (right is None)
            if left is not None:
                assert np.array_equal(left, right)
                assert left.dtype == right.dtype


def conv_network(threshold: int = 300, bias: int = 7) -> IntegerNetwork:
    """A small asymmetric network on which every planted error shows."""
    rng = np.random.default_rng(5)
    weight = rng.integers(-20, 30, (4, 1, 3, 3)).astype(np.int32)
    return IntegerNetwork(
        InputSpec((1, 6, 6), 15),
        (
            Population("conv", (4, 6, 6), threshold, np.full((4, 6, 6), bias), 10.0),
            Population("out", (3,), 0, np.array([1, -2, 3]), 10.0, spiking=False),
        ),
        (
            Synapse("input", "conv", "conv", weight, 8, padding=1),
            Synapse("conv", "out", "dense", rng.integers(-9, 9, (3, 144)).astype(np.int32), 8),
        ),
        5,
    )


def test_random_networks_are_alive() -> None:
    """The property means something only if the drawn networks spike, reset and saturate."""
    spiking = saturated = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        network = build_network(rng, spatial=True, hidden=2, leaking=0, resets=("zero",), saturating=True, steps=6)
        codes = rng.integers(0, network.input.max_code + 1, (3, *network.input.shape)).astype(np.uint8)
        recorded = run_reference(network, codes).populations.values()
        rates = [p.spikes.mean() for p in recorded if p.spikes is not None]
        spiking += 0.01 < np.mean(rates) < 0.99
        saturated += sum(count_saturations(network, codes).values()) > 0
    assert spiking >= 20
    assert saturated >= 10


def test_blocks_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network = conv_network()
    codes = np.random.default_rng(1).integers(0, 16, (23, 1, 6, 6)).astype(np.uint8)
    whole = run_emulator(network, codes, "traces")
    monkeypatch.setattr(emulator_module, "BLOCK_BYTES", 20_000)
    small = Emulator(network)
    assert 1 <= small.block < 23
    assert_same(whole, small.run(codes, "traces"))
    assert_same(whole, small.run(codes, "traces", threads=2))


def test_no_samples_give_an_empty_trace() -> None:
    network = conv_network()
    codes = np.zeros((0, 1, 6, 6), np.uint8)
    assert_same(run_reference(network, codes), run_emulator(network, codes, "traces"))


def test_saturations_are_counted_where_the_reference_clips() -> None:
    deep = np.array([[-(2**9)]], np.int32)
    network = IntegerNetwork(
        InputSpec((1,), 255),
        (
            Population("sink", (1,), 10, np.zeros(1, np.int64), 1.0),
            Population("out", (1,), 0, np.zeros(1, np.int64), 1.0, spiking=False),
        ),
        (
            Synapse("input", "sink", "dense", deep, 10),
            Synapse("sink", "out", "dense", np.ones((1, 1), np.int32), 8),
        ),
        4,
    )
    codes = np.array([[255], [100]], np.uint8)
    # 255 * 512 * 64 = 8,355,840 per step: clipped from the second step on; 100 * 512 * 64 from the third on.
    assert count_saturations(network, codes) == {"sink": 3 + 2, "out": 0}
    membranes = run_emulator(network, codes, "traces").populations["sink"].membranes
    assert membranes is not None
    assert membranes[0, :, 0].tolist() == [-(255 * 512) << FRACTION_BITS] + 3 * [-STATE_LIMIT]


@settings(max_examples=60, deadline=None)
@given(cases())
def test_strict_runs_find_no_wrong_proof_and_compute_the_same(case: Case) -> None:
    network, codes = case
    strict = run_strictly(network, codes, "traces")
    assert_same(run_reference(network, codes), strict.trace)
    assert {name for name, count in strict.saturations.items() if count} <= {
        row.population for row in prove(network) if row.can_saturate
    }


def shrunk(proofs: dict[str, Bounds]) -> dict[str, Bounds]:
    return {name: Bounds(0 * bounds.lower, 0 * bounds.upper) for name, bounds in proofs.items()}


@pytest.mark.parametrize(
    ("function", "wrong", "objects", "rule"),
    [
        ("synaptic_bounds", shrunk, ["conv", "out"], "sum of one step is within its bounds"),
        (
            "synaptic_magnitudes",
            lambda proofs: {name: magnitude // 4 for name, magnitude in proofs.items()},
            ["conv"],
            "sum of one step is within its magnitude",
        ),
        ("current_bounds", shrunk, ["conv", "out"], "current is within its bounds"),
        ("membrane_bounds", shrunk, ["conv", "out"], "membrane is within its bounds"),
        ("readout_bounds", lambda bounds: Bounds(0 * bounds.lower, 0 * bounds.upper), ["out"], "readout is within its"),
    ],
)
def test_strict_runs_catch_wrong_bounds(
    function: str, wrong: Callable[..., object], objects: list[str], rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = conv_network()
    codes = np.random.default_rng(0).integers(0, 16, (9, 1, 6, 6)).astype(np.uint8)
    right = getattr(proof_checks, function)
    monkeypatch.setattr(proof_checks, function, lambda given: wrong(right(given)))
    with pytest.raises(RuleViolations) as refused:
        run_strictly(network, codes)
    found = [violation for violation in refused.value.violations if violation.rule.startswith(rule)]
    assert [violation.object for violation in found] == objects
    assert len(found) == len(refused.value.violations)


def test_strict_runs_catch_wrong_proofs_of_saturation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice strongly inhibited, a membrane is clipped, and then climbs to the threshold sooner than it should."""
    network = IntegerNetwork(
        InputSpec((2,), 255),
        (
            Population("neuron", (1,), 10, np.zeros(1, np.int64), 1.0),
            Population("out", (1,), 0, np.zeros(1, np.int64), 1.0, spiking=False),
        ),
        (
            Synapse("input", "neuron", "dense", np.array([[500, -500]], np.int32), 24),
            Synapse("neuron", "out", "dense", np.ones((1, 1), np.int32), 8),
        ),
        4,
    )
    codes = np.array([[[0, 255], [0, 255], [255, 0], [255, 0]]], np.uint8)
    assert run_strictly(network, codes).saturations == {"neuron": 1, "out": 0}

    def wrong(given: IntegerNetwork) -> list[object]:
        return [replace(row, can_saturate=False, saturation_is_harmless=True) for row in prove(given)]

    monkeypatch.setattr(proof_checks, "prove", wrong)
    with pytest.raises(RuleViolations) as refused:
        run_strictly(network, codes)
    assert [v.rule for v in refused.value.violations] == ["membrane is not clipped", "clipping changes no spike"]


def test_the_first_of_many_contradictions_is_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    network = conv_network()
    codes = np.random.default_rng(0).integers(1, 16, (9, 1, 6, 6)).astype(np.uint8)
    right = proof_checks.synaptic_bounds(network)
    upper = right["conv"].upper.copy()
    upper[2, 3, 4] = right["conv"].lower[2, 3, 4]
    monkeypatch.setattr(
        proof_checks, "synaptic_bounds", lambda _: {**right, "conv": Bounds(right["conv"].lower, upper)}
    )
    with pytest.raises(RuleViolations, match=rf"45 outside, the first -?\d+ at neuron {2 * 36 + 3 * 6 + 4},"):
        run_strictly(network, codes)


def test_codes_of_another_shape_or_length_are_refused() -> None:
    network = conv_network()
    for shape in [(2, 1, 6, 5), (2, 4, 1, 6, 6), (2, 6, 1, 6, 6)]:
        with pytest.raises(RuleViolations, match="shape is the network's"):
            run_emulator(network, np.zeros(shape, np.uint8))
        with pytest.raises(RuleViolations, match="shape is the network's"):
            run_reference(network, np.zeros(shape, np.uint8))


def test_kernels_compile_where_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with a read-only root and no home."""
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])

    def doubled(value: int) -> int:
        return 2 * value

    assert kernels.compiled(doubled)(21) == 42


def test_preparation_is_shared_and_dies_with_its_network() -> None:
    network = conv_network()
    codes = np.zeros((1, 1, 6, 6), np.uint8)
    run_emulator(network, codes)
    prepared = emulator_module._prepared[id(network)]
    run_emulator(network, codes)
    assert emulator_module._prepared[id(network)] is prepared
    key, alive = id(network), weakref.ref(network)
    del network
    gc.collect()
    assert alive() is None
    assert key not in emulator_module._prepared
