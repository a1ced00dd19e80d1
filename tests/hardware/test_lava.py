"""Lava, by both ways into it, does exactly what the reference does."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.netx import write_netx
from hardware.errors import RuleViolations, SpikeguardError
from hardware.network import DECAY_UNITY, STATE_LIMIT, InputSpec, IntegerNetwork, Population, Shape, Synapse
from hardware.reference import run_reference
from hardware.runtimes import lava
from hardware.runtimes.lava import LavaRuntime, NetxRuntime, locate_lava_python
from hardware.runtimes.protocol import Runtime
from hardware.targets.lava import LAVA, NETX, dense_weight_exponent
from hardware.targets.rules import check
from hardware.trace import compare_traces
from tests.networks import random_codes, random_network

needs_lava = pytest.mark.lava
both_engines = pytest.mark.parametrize("engine", ["lava", "netx"])


def population(rng: np.random.Generator, name: str, shape: Shape, threshold: int, **facts: Any) -> Population:
    return Population(name, shape, threshold, rng.integers(-40, 41, shape), 1.0, **facts)


def weights(rng: np.random.Generator, *shape: int, limit: int = 127) -> np.ndarray[Any, np.dtype[np.int32]]:
    return rng.integers(-limit - 1, limit + 1, shape).astype(np.int32)


def conv_network(steps: int, **neurons: Any) -> IntegerNetwork:
    """Conv, strided conv, dense, readout; height and width differ; biases per neuron and per channel."""
    rng = np.random.default_rng(steps)
    first = population(rng, "first", (4, 8, 6), 4000, **neurons)
    second = population(rng, "second", (6, 4, 3), 250, **neurons)
    per_channel = np.broadcast_to(second.bias[:, :1, :1], second.shape).copy()
    return IntegerNetwork(
        InputSpec((2, 8, 6), constant_codes=(200,)),
        (
            first,
            replace(second, bias=per_channel),
            population(rng, "third", (12,), 200, **neurons),
            population(rng, "out", (5,), 0, spiking=False),
        ),
        (
            Synapse("input", "first", "conv", weights(rng, 4, 3, 3, 3, limit=18), 8, padding=1),
            Synapse("first", "second", "conv", weights(rng, 6, 4, 6, 6), 8, stride=2, padding=2),
            Synapse("second", "third", "dense", weights(rng, 12, 72), 8),
            Synapse("third", "out", "dense", weights(rng, 5, 12), 8),
        ),
        steps,
    )


def residual_network(steps: int, **neurons: Any) -> IntegerNetwork:
    """Shortcuts past one, two and three populations, with and without a stride, from images, vectors and the input."""
    rng = np.random.default_rng(steps + 1)
    shapes: dict[str, tuple[Shape, int]] = {
        "stem": ((4, 8, 6), 4000),
        "first": ((4, 8, 6), 260),
        "second": ((4, 8, 6), 420),
        "third": ((6, 4, 3), 220),
        "fourth": ((6, 4, 3), 420),
        "fifth": ((12,), 200),
        "sixth": ((8,), 120),
    }
    return IntegerNetwork(
        InputSpec((2, 8, 6), constant_codes=(200,)),
        (
            *(population(rng, name, shape, threshold, **neurons) for name, (shape, threshold) in shapes.items()),
            population(rng, "out", (5,), 0, spiking=False),
        ),
        (
            Synapse("input", "stem", "conv", weights(rng, 4, 3, 3, 3, limit=18), 8, padding=1),
            Synapse("stem", "first", "conv", weights(rng, 4, 4, 3, 3), 8, padding=1),
            Synapse("stem", "second", "conv", weights(rng, 4, 4, 1, 1), 8),
            Synapse("first", "second", "conv", weights(rng, 4, 4, 3, 3), 8, padding=1),
            Synapse("second", "third", "conv", weights(rng, 6, 4, 3, 3), 8, stride=2, padding=1),
            Synapse("third", "fourth", "conv", weights(rng, 6, 6, 3, 3), 8, padding=1),
            Synapse("second", "fourth", "conv", weights(rng, 6, 4, 1, 1), 8, stride=2),
            Synapse("stem", "fourth", "conv", weights(rng, 6, 4, 1, 1), 8, stride=2),
            Synapse("input", "fourth", "conv", weights(rng, 6, 3, 1, 1, limit=2), 8, stride=2),
            Synapse("fourth", "fifth", "dense", weights(rng, 12, 72), 8),
            Synapse("third", "fifth", "dense", weights(rng, 12, 72), 8),
            Synapse("fifth", "sixth", "dense", weights(rng, 8, 12), 8),
            Synapse("sixth", "out", "dense", weights(rng, 5, 8), 8),
            Synapse("fifth", "out", "dense", weights(rng, 5, 12), 8),
            Synapse("input", "out", "dense", np.eye(5, 144, dtype=np.int32) * np.int32(-3), 8),
        ),
        steps,
    )


def saturating_network() -> IntegerNetwork:
    """Inhibition drives membranes into the lower limit of 24 bits, from where excitation lifts them."""
    rng = np.random.default_rng(3)
    kernel = np.array([[-127, 13], [-90, 80], [120, -127]], np.int32)[:, :, None, None] * np.int32(4)
    return IntegerNetwork(
        InputSpec((2, 3, 3)),
        (population(rng, "deep", (3, 3, 3), 100_000), population(rng, "out", (4,), 0, spiking=False)),
        (
            Synapse("input", "deep", "conv", kernel, 10),
            Synapse("deep", "out", "dense", weights(rng, 4, 27), 8),
        ),
        steps=6,
    )


def codes_for(network: IntegerNetwork, samples: int, *, timed: bool = False) -> np.ndarray[Any, Any]:
    return random_codes(np.random.default_rng(11), network, samples, timed=timed)


def make_runtime(engine: str, network: IntegerNetwork, folder: Path, **options: Any) -> LavaRuntime | NetxRuntime:
    if engine == "lava":
        return LavaRuntime(network, **options)
    write_netx(network, folder / "model.net")
    return NetxRuntime(folder / "model.net", network, **options)


def assert_exact(engine: str, network: IntegerNetwork, inputs: np.ndarray[Any, Any], folder: Path) -> None:
    expected = run_reference(network, inputs)
    actual = make_runtime(engine, network, folder).run(inputs, "traces")
    comparison = compare_traces(expected, actual)
    assert comparison.equal, comparison
    assert (comparison.spikes, comparison.membranes) == (0, 0)
    for name, part in expected.populations.items():
        same = actual.populations[name]
        assert part.membranes is not None
        assert same.membranes is not None
        assert same.membranes.dtype == np.int32
        assert same.membranes.shape == part.membranes.shape
        assert (same.spikes is None) == (part.spikes is None)
        assert same.spikes is None or same.spikes.dtype == np.bool_


def assert_lively(network: IntegerNetwork, inputs: np.ndarray[Any, Any]) -> None:
    for name, part in run_reference(network, inputs).populations.items():
        assert part.spikes is None or 0.02 < part.spikes.mean() < 0.98, name


@needs_lava
@both_engines
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_conv_network_is_exact(engine: str, steps: int, tmp_path: Path) -> None:
    network = conv_network(steps)
    inputs = codes_for(network, 4)
    assert_lively(network, inputs)
    assert_exact(engine, network, inputs, tmp_path)


@needs_lava
@both_engines
@pytest.mark.parametrize(("steps", "current_decay", "voltage_decay"), [(6, 1200, 4095), (64, 1500, 301)])
def test_leaky_network_is_exact(
    engine: str, steps: int, current_decay: int, voltage_decay: int, tmp_path: Path
) -> None:
    network = conv_network(steps, current_decay=current_decay, voltage_decay=voltage_decay)
    *spiking, readout = network.populations
    network = replace(network, populations=(*spiking, replace(readout, current_decay=3000, voltage_decay=200)))
    inputs = codes_for(network, 2)
    assert_lively(network, inputs)
    assert_exact(engine, network, inputs, tmp_path)


@needs_lava
@pytest.mark.parametrize(("steps", "neurons"), [(4, {}), (16, {"current_decay": 2500, "voltage_decay": 301})], ids=str)
def test_branches_of_unequal_length_are_exact(steps: int, neurons: dict[str, int], tmp_path: Path) -> None:
    network = residual_network(steps, **neurons)
    inputs = codes_for(network, 2)
    assert_lively(network, inputs)
    assert_exact("lava", network, inputs, tmp_path)


@needs_lava
@both_engines
def test_images_are_flattened_in_the_networks_order(engine: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    network = IntegerNetwork(
        InputSpec((2, 4, 3), constant_codes=(9,)),
        (population(rng, "hidden", (7,), 3000), population(rng, "out", (3,), 0, spiking=False)),
        (
            Synapse("input", "hidden", "dense", weights(rng, 7, 36, limit=20), 8),
            Synapse("hidden", "out", "dense", weights(rng, 3, 7), 8),
        ),
        steps=3,
    )
    assert_exact(engine, network, codes_for(network, 3), tmp_path)


@needs_lava
@both_engines
def test_saturating_network_is_exact(engine: str, tmp_path: Path) -> None:
    network = saturating_network()
    inputs = np.random.default_rng(0).integers(0, 256, (3, 2, 3, 3))
    membranes = run_reference(network, inputs).populations["deep"].membranes
    assert membranes is not None
    assert (membranes == -STATE_LIMIT).any()
    assert_exact(engine, network, inputs, tmp_path)


@needs_lava
@both_engines
@pytest.mark.parametrize(
    ("kind", "bias", "max_code", "timed"),
    [("conv", "neuron", 255, False), ("dense", "none", 255, True), ("conv", "channel", 1, True)],
)
def test_random_network_is_exact(
    engine: str,
    kind: Literal["conv", "dense"],
    bias: Literal["none", "channel", "neuron"],
    max_code: int,
    timed: bool,
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(max_code)
    while True:
        network = random_network(rng, kind=kind, conv_bias=bias, max_code=max_code, constant_channels=1)
        if not check(network, NETX):
            break
    assert_exact(engine, network, random_codes(rng, network, 5, timed=timed), tmp_path)


@needs_lava
def test_dense_weights_with_an_exponent_are_exact(tmp_path: Path) -> None:
    network = conv_network(3)
    *rest, last = network.synapses
    scaled = replace(last, weight=last.weight * np.int32(8), exponent=3)
    assert dense_weight_exponent(scaled.weight) == 2
    changed = replace(network, synapses=(*rest, scaled))
    assert_exact("lava", changed, codes_for(changed, 3), tmp_path)


@needs_lava
@both_engines
def test_readouts_alone_are_the_same(engine: str, tmp_path: Path) -> None:
    network = conv_network(3)
    inputs = codes_for(network, 6)
    runtime: Runtime = make_runtime(engine, network, tmp_path)
    trace = runtime.run(inputs)
    assert not trace.populations
    assert np.array_equal(trace.readouts, run_reference(network, inputs, "readouts").readouts)
    assert runtime.name == engine
    assert runtime.version.split()[0] == {"lava": "lava-nc", "netx": "lava-dl"}[engine]


@needs_lava
def test_netx_takes_its_numbers_from_the_file(tmp_path: Path) -> None:
    network = conv_network(3)
    inputs = codes_for(network, 2)
    runtime = make_runtime("netx", network, tmp_path)
    with h5py.File(tmp_path / "model.net", "r+") as file:
        file["layer/1/neuron/vThMant"][...] = 100
    changed = replace(network.populations[0], threshold=100)
    meant = replace(network, populations=(changed, *network.populations[1:]))
    assert compare_traces(run_reference(meant, inputs), runtime.run(inputs, "traces")).equal
    assert not compare_traces(run_reference(network, inputs), runtime.run(inputs, "traces")).equal


@needs_lava
def test_weights_that_netx_corrupts_are_noticed(tmp_path: Path) -> None:
    network = conv_network(3)
    runtime = make_runtime("netx", network, tmp_path)
    with h5py.File(tmp_path / "model.net", "r+") as file:
        file["layer/5/weight"][...] = -128
    with pytest.raises(SpikeguardError, match="60 of 60 weights of out differ, the first is 0 instead of -128"):
        runtime.run(codes_for(network, 1))


@needs_lava
def test_a_readout_that_leaves_its_range_is_an_error() -> None:
    rng = np.random.default_rng(0)
    network = IntegerNetwork(
        InputSpec((1, 1, 1)),
        (population(rng, "one", (1, 1, 1), 0), population(rng, "out", (2,), 0, spiking=False)),
        (
            Synapse("input", "one", "conv", np.full((1, 1, 1, 1), 100, np.int32), 8),
            Synapse("one", "out", "dense", np.array([[127 << 8], [1 << 8]], np.int32), 16),
        ),
        steps=5,
    )
    with pytest.raises(SpikeguardError, match="readout out left the range"):
        LavaRuntime(network).run(np.full((1, 1, 1, 1), 255))


def test_everything_lava_cannot_do_is_told_at_once(tmp_path: Path) -> None:
    network = conv_network(3)
    first, second, third, out = network.populations
    into_first, into_second, into_third, into_out = network.synapses
    broken = replace(
        network,
        populations=(
            replace(first, reset="subtract", threshold=2**17),
            replace(second, bias=np.full(second.shape, -5000)),
            replace(third, current_decay=0, voltage_decay=DECAY_UNITY),
            out,
        ),
        synapses=(
            replace(into_first, weight=into_first.weight * np.int32(16), bits=13),
            into_second,
            replace(into_third, weight=into_third.weight * np.int32(3), bits=10),
            into_out,
            Synapse("second", "out", "dense", -np.ones((5, 72), np.int32), 8),
        ),
    )
    with pytest.raises(RuleViolations) as caught:
        LavaRuntime(broken)
    rules = {violation.rule for violation in caught.value.violations}
    assert rules == {rule.__name__.replace("_", " ") for rule in LAVA.rules}
    with pytest.raises(RuleViolations) as caught:
        NetxRuntime(tmp_path / "model.net", broken)
    rules = {violation.rule for violation in caught.value.violations}
    assert rules == {rule.__name__.replace("_", " ") for rule in NETX.rules}


@given(
    st.lists(st.integers(-130, 130), min_size=1, max_size=6),
    st.integers(0, 9),
)
def test_dense_weight_exponent_gives_numbers_that_dense_keeps(values: list[int], shift: int) -> None:
    weight = (np.array([values]) << shift).astype(np.int32)
    exponent = dense_weight_exponent(weight)
    if exponent is None:
        assert weight.max() > 127 or weight.min() < -128
        return
    held = weight.astype(np.float64) * 2.0**-exponent
    mixed = weight.min() < 0 < weight.max()
    assert np.array_equal(held % (2 if mixed else 1), np.zeros_like(held))
    assert held.max() <= (254 if mixed else 255)
    assert held.min() >= (-256 if mixed else -255)


def test_a_missing_environment_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lava.PYTHON_VARIABLE, "/nowhere/python")
    with pytest.raises(SpikeguardError, match=r"no Lava environment at /nowhere/python; run `make setup`"):
        locate_lava_python()


def test_an_environment_without_lava_says_so() -> None:
    with pytest.raises(SpikeguardError, match=r"lava-nc.*make setup"):
        LavaRuntime(conv_network(1), python=Path(sys.executable))


def test_nothing_to_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lava, "lava_versions", lambda _: {"lava-nc": "0"})
    network = conv_network(1)
    runtime = LavaRuntime(network, python=Path(sys.executable))
    with pytest.raises(SpikeguardError, match="at least one sample"):
        runtime.run(codes_for(network, 0))
    with pytest.raises(SpikeguardError, match="2 steps, the network 1"):
        runtime.run(np.zeros((1, 2, 2, 8, 6), np.int64))


def test_the_time_limit_grows_with_the_work() -> None:
    small, large = (lava.default_time_limit(conv_network(steps), samples) for steps, samples in ((1, 1), (8, 64)))
    assert lava.STARTUP_LIMIT_SECONDS < small < large < 600
