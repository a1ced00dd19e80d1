"""What model.net says, in the loader's conventions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from exporters.netx import CARD_ATTRIBUTE, write_netx
from hardware.errors import RuleViolations
from hardware.formats.hdf5_guard import require_plain_hdf5
from hardware.network import IntegerNetwork, Synapse
from hardware.reference import run_reference
from hardware.runtimes.lava import NetxRuntime
from hardware.trace import compare_traces
from tests.hardware.test_lava import codes_for, conv_network


@pytest.fixture
def network() -> IntegerNetwork:
    return conv_network(4, current_decay=2000, voltage_decay=17)


def test_layers_are_written_in_order(network: IntegerNetwork, tmp_path: Path) -> None:
    write_netx(network, tmp_path / "model.net")
    require_plain_hdf5(tmp_path / "model.net")
    with h5py.File(tmp_path / "model.net") as file:
        layers = [file["layer"][str(index)] for index in range(len(file["layer"]))]
        kinds = [layer["type"][()].decode() for layer in layers]
        assert kinds == ["input", "conv", "conv", "flatten", "dense", "dense"]
        assert layers[0]["shape"][()].tolist() == [3, 8, 6]
        running = [layer for layer in layers if "neuron" in layer]
        for layer, population, synapse in zip(running, network.populations, network.synapses, strict=True):
            assert np.array_equal(layer["weight"][()], synapse.weight)
            assert layer["shape"][()].tolist() == list(population.shape)
            neuron = layer["neuron"]
            assert neuron["type"][()] == b"CUBA"
            assert neuron["iDecay"][()] == population.current_decay
            assert neuron["vDecay"][()] == population.voltage_decay
            assert neuron["vThMant"][()] == (population.threshold if population.spiking else 2**17 - 1)
        assert layers[2]["stride"][()].tolist() == [2, 2]
        assert layers[2]["padding"][()].tolist() == [2, 2]


def test_bias_is_per_channel_where_it_can_be_and_else_in_the_loaders_axes(
    network: IntegerNetwork, tmp_path: Path
) -> None:
    write_netx(network, tmp_path / "model.net")
    with h5py.File(tmp_path / "model.net") as file:
        per_neuron, per_channel = file["layer/1/bias"][()], file["layer/2/bias"][()]
    first, second = network.populations[:2]
    assert per_neuron.shape == (6, 8, 4)
    assert per_neuron[5, 2, 3] == first.bias[3, 2, 5]
    assert np.array_equal(per_channel, second.bias[:, 0, 0])


def test_the_file_carries_the_semantics_card_and_is_reproducible(network: IntegerNetwork, tmp_path: Path) -> None:
    write_netx(network, tmp_path / "a.net")
    write_netx(network, tmp_path / "b.net")
    with h5py.File(tmp_path / "a.net") as file:
        assert json.loads(file.attrs[CARD_ATTRIBUTE]) == network.semantics_card()
    assert (tmp_path / "a.net").read_bytes() == (tmp_path / "b.net").read_bytes()


def test_what_netx_cannot_take_is_refused_at_once_and_leaves_no_file(network: IntegerNetwork, tmp_path: Path) -> None:
    first, *others = network.populations
    *kept, last = network.synapses
    residual = Synapse("first", "third", "dense", np.ones((12, 192), np.int32), 8)
    broken = replace(
        network,
        populations=(replace(first, reset="subtract"), *others),
        synapses=(*kept, residual, replace(last, weight=last.weight * np.int32(4), bits=10)),
    )
    with pytest.raises(RuleViolations) as caught:
        write_netx(broken, tmp_path / "model.net")
    assert {violation.rule for violation in caught.value.violations} == {
        "populations form a chain",
        "membranes reset to zero",
        "netx keeps dense weights",
    }
    assert not [*tmp_path.iterdir()]


@pytest.mark.lava
def test_the_loader_reads_what_was_meant(network: IntegerNetwork, tmp_path: Path) -> None:
    write_netx(network, tmp_path / "model.net")
    inputs = codes_for(network, 3)
    actual = NetxRuntime(tmp_path / "model.net", network).run(inputs, "traces")
    assert compare_traces(run_reference(network, inputs), actual).equal
