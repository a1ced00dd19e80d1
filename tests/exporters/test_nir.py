"""NIR writer: both profiles hold the network exactly, and what NIR readers cannot do is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nir
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from exporters.nir import write_nir
from hardware.bounds import saturation_is_harmless
from hardware.errors import RuleViolations
from hardware.formats.nir_file import read_nir
from hardware.formats.nir_layout import NirProfile
from hardware.network import DECAY_UNITY, InputSpec, IntegerNetwork, Population, Synapse
from tests.networks import networks, random_network, same_network


@given(network=networks(reset="zero"))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("profile", ["if", "cuba"])
def test_written_files_read_back_as_the_same_network(
    network: IntegerNetwork, tmp_path: Path, profile: NirProfile
) -> None:
    path = tmp_path / "model.nir"
    uneven = any(len(p.shape) == 3 and np.ptp(p.bias, axis=(1, 2)).any() for p in network.populations)
    if uneven or any(p.current_decay != DECAY_UNITY and p.bias.any() for p in network.populations):
        with pytest.raises(RuleViolations, match="one per channel" if uneven else "whose current decays"):
            write_nir(network, path, profile, allow_deviations=True)
    else:
        write_nir(network, path, profile, allow_deviations=True)
        assert same_network(read_nir(path), network)


@pytest.mark.parametrize(("profile", "neuron", "dtype"), [("if", "IF", np.float32), ("cuba", "CubaLIF", np.float64)])
def test_neurons_have_full_shape_and_a_threshold_between_integers(
    tmp_path: Path, profile: NirProfile, neuron: str, dtype: type
) -> None:
    network = random_network(np.random.default_rng(2), hidden=2)
    write_nir(network, tmp_path / "m.nir", profile)
    graph = nir.read(tmp_path / "m.nir")
    for population in network.populations[:-1]:
        node = graph.nodes[population.name]
        assert type(node).__name__ == neuron
        assert node.v_threshold.shape == population.shape
        assert node.v_threshold.dtype == dtype
        assert np.unique(node.v_threshold).tolist() == [population.threshold + 0.5]


def test_metadata_is_one_json_string_with_all_nir_has_no_field_for(tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(4), constant_channels=2)
    write_nir(network, tmp_path / "m.nir", "if")
    metadata = nir.read(tmp_path / "m.nir").metadata
    assert set(metadata) == {"spikeguard"}
    card = json.loads(metadata["spikeguard"])
    assert card["profile"] == "if"
    assert card["semantics"] == json.loads(json.dumps(network.semantics_card()))
    assert [p["scale"] for p in card["network"]["populations"]] == [p.scale for p in network.populations]


def test_a_population_may_be_called_output(tmp_path: Path) -> None:
    network = _dense([[1, -1]], [[3]], threshold=0, middle="output")
    write_nir(network, tmp_path / "m.nir", "if")
    assert same_network(read_nir(tmp_path / "m.nir"), network)


def test_everything_nir_readers_cannot_do_is_named_at_once(tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(0), hidden=2, conv_bias="neuron")
    first, second, readout = network.populations
    changed = replace(
        network,
        populations=(
            replace(first, current_decay=100),
            replace(second, reset="subtract", threshold=2**23),
            readout,
        ),
        steps=60_000,
    )
    with pytest.raises(RuleViolations) as caught:
        write_nir(changed, tmp_path / "m.nir", "if", allow_deviations=True)
    text = str(caught.value)
    for rule in ("resets to zero", "threshold + 1/2", "one per channel", "exact in float32"):
        assert rule in text
    assert "neuron is IF" not in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("profile", ["if", "cuba"])
def test_leaky_neurons_are_refused_or_written_with_eulers_time_constants(tmp_path: Path, profile: NirProfile) -> None:
    network = random_network(np.random.default_rng(3), kind="dense", hidden=1)
    first, readout = network.populations
    decays, silent = {"current_decay": 1024, "voltage_decay": 512}, {"bias": np.zeros_like(first.bias)}
    leaky = replace(network, populations=(replace(first, **decays, **silent), readout))
    with pytest.raises(RuleViolations, match="neuron is IF; readers decay in floating point"):
        write_nir(leaky, tmp_path / "m.nir", profile)
    write_nir(leaky, tmp_path / "m.nir", profile, allow_deviations=True)
    node = nir.read(tmp_path / "m.nir").nodes[first.name]
    dt = json.loads(nir.read(tmp_path / "m.nir").metadata["spikeguard"])["dt"]
    assert type(node).__name__ == "CubaLIF"
    np.testing.assert_array_equal(1 - dt / node.tau_syn, np.full(first.shape, 1 - 1024 / 4096))
    np.testing.assert_array_equal(1 - dt / node.tau_mem, np.full(first.shape, 1 - 512 / 4096))
    np.testing.assert_array_equal(node.r * dt / node.tau_mem, np.ones(first.shape))
    np.testing.assert_array_equal(node.w_in * dt / node.tau_syn, np.ones(first.shape))
    np.testing.assert_array_equal(node.v_threshold, np.full(first.shape, float(first.threshold)))


def test_unproven_saturation_is_refused_or_stated(tmp_path: Path) -> None:
    # Far enough down to clip in one step, and back up over the threshold in the following ones.
    network = _dense([[500, -500]], [[1]], threshold=10, steps=8)
    assert not saturation_is_harmless(network)
    with pytest.raises(RuleViolations, match="saturation"):
        write_nir(network, tmp_path / "m.nir", "if")
    write_nir(network, tmp_path / "m.nir", "if", allow_deviations=True)
    assert json.loads(nir.read(tmp_path / "m.nir").metadata["spikeguard"])["saturation"] == "possible"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("profile", ["if", "cuba"])
def test_leaky_networks_and_their_readouts_read_back_as_they_are(
    tmp_path: Path, profile: NirProfile, seed: int
) -> None:
    network = random_network(np.random.default_rng(seed), leaky=True, dag=seed % 2 == 1, conv_bias="none")
    network = replace(network, populations=tuple(replace(p, bias=np.zeros_like(p.bias)) for p in network.populations))
    assert network.readout.is_leaky
    write_nir(network, tmp_path / "m.nir", profile, allow_deviations=True)
    assert same_network(read_nir(tmp_path / "m.nir"), network)
    assert type(nir.read(tmp_path / "m.nir").nodes[network.readout.name]).__name__ == "CubaLI"


def _dense(
    first: list[list[int]], second: list[list[int]], *, threshold: int, middle: str = "hidden", steps: int = 2
) -> IntegerNetwork:
    """Two features -> ``middle`` -> readout."""
    a, b = np.array(first, np.int32), np.array(second, np.int32)
    return IntegerNetwork(
        InputSpec((a.shape[1],)),
        (
            Population(middle, (len(a),), threshold, np.zeros(len(a), np.int64), 1.0),
            Population("readout", (len(b),), 0, np.zeros(len(b), np.int64), 1.0, spiking=False),
        ),
        (Synapse("input", middle, "dense", a, 16), Synapse(middle, "readout", "dense", b, 8)),
        steps,
    )
