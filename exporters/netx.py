"""Writing model.net, the HDF5 layer list that lava-dl's netx loads.

``/layer/<i>`` holds ``type`` (input, conv, flatten, dense) and, where it applies, geometry, weights, bias and
a ``neuron`` group. Everything is in the loader's conventions: kernels are cross-correlations (out, in,
height, width), which it flips itself; a per-neuron bias is (width, height, channel); dense weights read their
source in C order of (channel, height, width); ``iDecay`` is the share of current lost per step, from which
it subtracts one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hardware.files import atomic_path
from hardware.network import IntArray, IntegerNetwork, Population, Shape, Synapse
from hardware.runtimes.lava_job import lava_threshold, to_lava_axes
from hardware.targets.lava import NETX
from hardware.targets.rules import require

CARD_ATTRIBUTE = "spikeguard_semantics"
NEURON_TYPE = "CUBA"


def write_netx(network: IntegerNetwork, path: Path) -> None:
    """Write a chain of populations atomically; the same network gives the same bytes.

    Args:
        network: one synapse per population, conv or dense.
        path: the file, by custom model.net. Its ``spikeguard_semantics`` attribute holds the semantics
            card as JSON.

    Raises:
        RuleViolations: everything about the network that netx cannot load and run exactly.
    """
    require(network, NETX, "netx export")
    with atomic_path(path) as temporary, h5py.File(temporary, "w", track_order=False) as file:
        file.attrs[CARD_ATTRIBUTE] = json.dumps(network.semantics_card(), sort_keys=True)
        layers = [_input_layer(network.input.presented_shape)]
        for population in network.populations:
            (synapse,) = network.incoming(population.name)
            source_shape = network.source_shape(synapse)
            if synapse.kind == "conv":
                layers.append(_conv_layer(synapse, population))
            else:
                if len(source_shape) == 3:
                    layers.append(_layer("flatten"))
                layers.append(_dense_layer(synapse, population))
        for index, layer in enumerate(layers):
            _write_group(file.create_group(f"layer/{index}", track_order=False), layer)


def _input_layer(shape: Shape) -> dict[str, Any]:
    return _layer("input") | {"shape": np.array(shape)}


def _conv_layer(synapse: Synapse, population: Population) -> dict[str, Any]:
    pair = np.ones(2, np.int64)
    return _layer("conv") | {
        "shape": np.array(population.shape),
        "inChannels": synapse.weight.shape[1],
        "outChannels": synapse.weight.shape[0],
        "kernelSize": np.array(synapse.weight.shape[2:]),
        "stride": synapse.stride * pair,
        "padding": synapse.padding * pair,
        "dilation": pair,
        "groups": 1,
        "weight": synapse.weight,
        "bias": _conv_bias(population),
        "neuron": _neuron(population),
    }


def _dense_layer(synapse: Synapse, population: Population) -> dict[str, Any]:
    return _layer("dense") | {
        "shape": np.array(population.shape),
        "inFeatures": synapse.weight.shape[1],
        "outFeatures": synapse.weight.shape[0],
        "weight": synapse.weight,
        "bias": population.bias,
        "neuron": _neuron(population),
    }


def _layer(kind: str) -> dict[str, Any]:
    return {"type": np.bytes_(kind)}


def _neuron(population: Population) -> dict[str, Any]:
    return {
        "type": np.bytes_(NEURON_TYPE),
        "iDecay": population.current_decay,
        "vDecay": population.voltage_decay,
        "vThMant": lava_threshold(population),
        "refDelay": 1,
        "gradedSpike": False,
    }


def _conv_bias(population: Population) -> IntArray:
    """One value per channel where that is enough, else one per neuron in the loader's axes."""
    per_channel = population.bias[:, 0, 0]
    if np.array_equal(population.bias, np.broadcast_to(per_channel[:, None, None], population.shape)):
        return per_channel
    return to_lava_axes(population.bias, population.shape)


def _write_group(group: h5py.Group, content: dict[str, Any]) -> None:
    for name, value in content.items():
        if isinstance(value, dict):
            _write_group(group.create_group(name), value)
        else:
            group.create_dataset(name, data=value)
