"""Reference, emulator and twin are one and the same function of the integers; and a comparison would tell if not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardware.bounds import require_no_wrap
from hardware.emulator import Emulator, run_emulator
from hardware.errors import RuleViolations
from hardware.network import InputSpec, IntegerNetwork, Population, Shape, Synapse
from hardware.planted.networks import NETWORK_ERRORS
from hardware.planted.runtimes import INTEGRATION_ERRORS, PROPAGATION_ERRORS, integrate, run_wrongly
from hardware.reference import propagate, run_reference
from hardware.surrogates import ENSEMBLE, RATE, AdaptiveSurrogate
from hardware.trace import PopulationTrace, Trace, compare_traces
from hardware.twin import Twin
from tests.hardware.strategies import cases
from tests.hardware.test_emulator import assert_same
from tests.hardware.test_twin import computed, image_gradient, images_of

Case = tuple[IntegerNetwork, NDArray[np.uint8]]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@settings(max_examples=80, deadline=None)
@given(
    case=cases(samples=None),
    block=st.integers(1, 10),
    wide=st.booleans(),
    threads=st.sampled_from([1, 2]),
    compiled=st.booleans(),
)
def test_reference_emulator_and_twin_are_one(case: Case, block: int, wide: bool, threads: int, compiled: bool) -> None:
    """Every spike, membrane and readout, whatever the samples are split into."""
    network, codes = case
    expected = run_reference(network, codes)
    emulator = Emulator(network, wide)
    emulator.block = block
    assert_same(expected, emulator.run(codes, "traces", threads))
    assert_same(Trace(expected.readouts), emulator.run(codes, "readouts", threads))
    assert_same(without_membranes(expected), emulator.run(codes, "spikes", threads))
    twin = Twin(network)
    with computed(compiled, group=block * network.steps):
        assert_same(expected, twin.trace(codes))
        logits = twin(images_of(network, codes))
    assert logits.dtype == torch.float32
    assert np.array_equal(logits.numpy(), network.logits(expected.readouts).astype(np.float32))


def without_membranes(trace: Trace) -> Trace:
    spiking = {name: p for name, p in trace.populations.items() if p.spikes is not None}
    return Trace(trace.readouts, {name: PopulationTrace(p.spikes, None) for name, p in spiking.items()})


def damageable(leaky: bool = False, strong: bool = False) -> IntegerNetwork:
    """A legal network in which every error shows: borders, odd weights, a folded pool, skips, deep inhibition.

    Args:
        leaky: spiking populations decay.
        strong: the first convolution's sums leave 24 bits, which is not legal.
    """
    rng = np.random.default_rng(11)

    def weights(*shape: int) -> NDArray[np.int32]:
        drawn = rng.integers(-60, 80, shape).astype(np.int32)
        drawn.reshape(-1)[::25] = -128
        return drawn

    shapes: dict[str, Shape] = {"conv1": (3, 8, 8), "conv2": (4, 8, 8), "pool": (4, 4, 4), "dense": (12,), "out": (5,)}
    pooled = np.broadcast_to(weights(4, 4, 1, 1), (4, 4, 2, 2)).copy()
    synapses = (
        Synapse("input", "conv1", "conv", weights(3, 3, 3, 3) << (4 if strong else 0), 8, 4 * strong, padding=1),
        Synapse("conv1", "conv2", "conv", weights(4, 3, 3, 3), 8, padding=1),
        Synapse("conv2", "pool", "conv", pooled, 8, stride=2),
        Synapse("conv1", "pool", "conv", weights(4, 3, 3, 3), 8, stride=2, padding=1),
        Synapse("pool", "dense", "dense", weights(12, 64), 8),
        Synapse("dense", "out", "dense", weights(5, 12), 8),
        Synapse("pool", "out", "dense", weights(5, 64), 8),
    )
    thresholds = {"conv1": 15_000, "conv2": 130, "pool": 160, "dense": 200, "out": 0}
    populations = []
    for name, shape in shapes.items():
        bias = rng.integers(-40, 41, shape)
        # Some neurons sink to the clip.
        bias.reshape(-1)[3::7] -= 30_000 if name != "out" else 0
        decays = {"current_decay": 3000, "voltage_decay": 200} if leaky and name != "out" else {}
        # A threshold of one real unit, as the surrogates' widths are meant for.
        scale = float(thresholds[name] or 100)
        populations.append(Population(name, shape, thresholds[name], bias, scale, name != "out", **decays))
    return IntegerNetwork(InputSpec((2, 8, 8), 127, (3,)), tuple(populations), synapses, 6)


IMAGES = np.random.default_rng(3).integers(0, 128, (48, 2, 8, 8)).astype(np.uint8)

CONVOLUTIONS, SPIKING = ["conv1", "conv2", "pool"], ["conv1", "conv2", "pool", "dense"]
EVERY = [*SPIKING, "out"]
CHANGES: dict[str, list[str]] = {
    "flipped_kernels": CONVOLUTIONS,
    "transposed_kernels": CONVOLUTIONS,
    "swapped_source_channels": EVERY,
    "swapped_output_channels": EVERY,
    "channels_last_flattening": ["dense", "out"],
    "even_weights": EVERY,
    "clipped_weights": EVERY,
    "average_pooling": ["pool"],
    "lost_skip": ["pool", "out"],
    "dropped_bias": EVERY,
    "bias_of_first_neuron": CONVOLUTIONS,
    "wrapped_bias": SPIKING,
    "skipped_normalization": ["conv1"],
    "scale_of_a_neighbour": EVERY,
    "raised_threshold": ["conv2", "pool", "dense"],  # of the first layer's many sums hardly one meets it exactly
    "other_reset": SPIKING,
    "no_decay": SPIKING,
    "swapped_decays": SPIKING,
    "one_step_late": EVERY,
    "one_step_early": ["conv2", "pool", "dense", "out"],  # the first layer sees the same codes at every step
    "bias_one_step_late": EVERY,
    "bias_one_step_early": EVERY,
    "fires_at_the_threshold": ["conv2", "pool", "dense"],
    "membranes_never_saturate": SPIKING,
    "membranes_wrap": SPIKING,
    "sums_wrap": ["conv1"],
    "states_kept_between_samples": EVERY,
    "decays_rounded_down": SPIKING,
    "padded_with_ones": CONVOLUTIONS,
    "padded_behind": CONVOLUTIONS,
    "strides_from_the_second_pixel": ["pool"],
}
"""What each planted error can damage."""


def network_for(error: str) -> IntegerNetwork:
    """Where the error shows."""
    return damageable(leaky="decay" in error, strong=error == "sums_wrap")


def planted(errors: Iterable[str]) -> list[tuple[str, str]]:
    return [(error, population) for error in errors for population in CHANGES[error]]


def test_every_planted_error_is_looked_for() -> None:
    assert {*NETWORK_ERRORS, *INTEGRATION_ERRORS, *PROPAGATION_ERRORS} == set(CHANGES)


def test_the_damageable_network_could_be_deployed() -> None:
    for leaky in (False, True):
        require_no_wrap(damageable(leaky))
    with pytest.raises(RuleViolations, match="conv1"):
        require_no_wrap(damageable(strong=True))


@pytest.mark.parametrize("error", ["none", "leaky: decay", "sums_wrap"])
def test_without_an_error_nothing_differs(error: str) -> None:
    network = network_for(error)
    expected = run_reference(network, IMAGES)
    for actual in (run_wrongly(network, IMAGES, "conv2"), run_emulator(network, IMAGES, "traces")):
        assert compare_traces(expected, actual).equal


@pytest.mark.parametrize(("error", "population"), planted(NETWORK_ERRORS))
def test_a_wrong_network_differs_first_where_it_was_damaged(error: str, population: str) -> None:
    network = network_for(error)
    wrong = NETWORK_ERRORS[error](network, population)
    expected = run_reference(network, IMAGES)
    for actual in (run_emulator(wrong, IMAGES, "traces"), Twin(wrong).trace(IMAGES)):
        first = compare_traces(expected, actual).first
        assert first is not None
        assert first[0] == population


@pytest.mark.parametrize(("error", "population"), planted([*INTEGRATION_ERRORS, *PROPAGATION_ERRORS]))
def test_a_wrong_runtime_differs_first_where_it_errs(error: str, population: str) -> None:
    network = network_for(error)
    actual = run_wrongly(
        network,
        IMAGES,
        population,
        wrong_integration=INTEGRATION_ERRORS.get(error, integrate),
        wrong_propagation=PROPAGATION_ERRORS.get(error, propagate),
    )
    first = compare_traces(run_reference(network, IMAGES), actual).first
    assert first is not None
    assert first[0] == population


RULES = [*ENSEMBLE, RATE, AdaptiveSurrogate]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: getattr(rule, "name", "adaptive"))
@pytest.mark.parametrize("leaky", [False, True])
def test_every_rule_brings_gradients_to_the_pixels(device: str, rule: Any, leaky: bool) -> None:
    network = damageable(leaky)
    rules = {name: rule() if rule is AdaptiveSurrogate else rule for name in SPIKING}
    gradient = image_gradient(Twin(network).to(device), IMAGES[:8], rules)
    assert gradient.isfinite().all()
    assert (gradient != 0).flatten(1).any(1).all()
