"""Two ways to a running network: stock Lava processes, or lava-dl's netx loader."""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from lava.magma.core.process.ports.ports import AbstractPort
from lava.magma.core.process.process import AbstractProcess
from lava.proc.conv.process import Conv
from lava.proc.dense.process import Dense
from lava.proc.lif.process import LIFReset

STATE_UNIT = 64
BIAS_EXPONENT = 6
# Step s of sample k, both counted from 0, reaches layer l at time step k T + s + l + 1, both counted from 1.
# The layer's state is wiped at s = 0; for the first layer that is time step 2 of each sample.
FIRST_LAYER_OFFSET = 2

Array = np.ndarray[Any, Any]


@dataclass
class Layer:
    """One synapse process, the neuron process behind it, and the parameters they are meant to hold.

    Attributes:
        weight: in the synapse process' own layout, in weight units.
        bias: broadcast to the neuron process' shape, in weight units.
        threshold: integer mantissa.
        decays: shares of 4096 lost per step by current and voltage.
    """

    name: str
    synapse: AbstractProcess
    neuron: AbstractProcess
    weight: Array
    bias: Array
    threshold: int
    decays: tuple[int, int]


def build_processes(job: dict[str, Any], arrays: dict[str, Array]) -> tuple[AbstractPort, list[Layer]]:
    """Chain stock processes as the job describes them.

    Returns:
        (port of the first synapse process that takes the input, layers)
    """
    layers = []
    for index, facts in enumerate(job["layers"]):
        weight, bias = arrays[f"weight.{index}"], arrays[f"bias.{index}"]
        message_bits = job["message_bits"] if index == 0 else 0
        if facts["kind"] == "conv":
            synapse = Conv(
                weight=weight,
                input_shape=tuple(facts["source_shape"]),
                stride=facts["stride"],
                padding=facts["padding"],
                num_message_bits=message_bits,
            )
        else:
            exponent = facts["weight_exponent"]
            mantissas = weight >> exponent if exponent >= 0 else weight << -exponent
            synapse = Dense(weights=mantissas, weight_exp=exponent, num_message_bits=message_bits)
        neuron = LIFReset(
            shape=tuple(facts["shape"]),
            vth=facts["threshold"],
            du=facts["current_decay"] - 1,
            dv=facts["voltage_decay"],
            bias_mant=bias,
            bias_exp=BIAS_EXPONENT,
            reset_interval=job["steps"],
            reset_offset=index + FIRST_LAYER_OFFSET,
        )
        synapse.a_out.connect(neuron.a_in)
        if layers:
            source = layers[-1].neuron.s_out
            if facts["kind"] == "dense" and len(source.shape) == 3:
                source = source.transpose([2, 1, 0]).flatten()
            source.connect(synapse.s_in)
        decays = (facts["current_decay"], facts["voltage_decay"])
        layers.append(Layer(facts["name"], synapse, neuron, weight, bias, facts["threshold"], decays))
    return layers[0].synapse.s_in, layers


def build_netx(job: dict[str, Any], _arrays: dict[str, Array]) -> tuple[AbstractPort, list[Layer]]:
    """Load the job's model.net with lava-dl, and from the file itself what the processes are meant to hold.

    Returns:
        (port of the network that takes the input, layers)
    """
    _stand_in_for_slayer()
    from lava.lib.dl.netx.hdf5 import Network

    with h5py.File(job["net"], "r") as file:
        groups = [file["layer"][str(index)] for index in range(len(file["layer"]))]
        meant = [_meant_by(group) for group in groups if _text(group["type"]) in ("conv", "dense")]
    # netx counts its reset offset from one below the first layer's.
    network = Network(
        net_config=job["net"],
        input_message_bits=job["message_bits"],
        reset_interval=job["steps"],
        reset_offset=FIRST_LAYER_OFFSET - 1,
    )
    if not len(meant) == len(network.layers) == len(job["layers"]):
        raise ValueError(
            f"the file has {len(meant)} layers, netx made {len(network.layers)} of them, "
            f"the network has {len(job['layers'])}"
        )
    layers = []
    for facts, block, (weight, bias, threshold, decays) in zip(job["layers"], network.layers, meant, strict=True):
        shape = tuple(int(size) for size in block.neuron.s_out.shape)
        if shape != tuple(facts["shape"]):
            raise ValueError(f"layer {facts['name']} has shape {shape} in the file, expected {facts['shape']}")
        bias = np.broadcast_to(bias, shape)
        layers.append(Layer(facts["name"], block.synapse, block.neuron, weight, bias, threshold, decays))
    return network.inp, layers


def _meant_by(group: h5py.Group) -> tuple[Array, Array, int, tuple[int, int]]:
    weight = group["weight"][()].astype(np.int64)
    if weight.ndim == 4:
        weight = weight[:, :, ::-1, ::-1].transpose(0, 3, 2, 1)
    bias = group["bias"][()].astype(np.int64) if "bias" in group else np.zeros(1, np.int64)
    neuron = group["neuron"]
    decays = (int(neuron["iDecay"][()]), int(neuron["vDecay"][()]))
    return weight, bias, int(neuron["vThMant"][()]), decays


def _text(dataset: h5py.Dataset) -> str:
    value = dataset[()]
    return (value if isinstance(value, bytes) else value[0]).decode("ascii")


def _stand_in_for_slayer() -> None:
    """Spare an environment of several gigabytes.

    netx imports lava-dl's torch code for one function of resonate-and-fire neurons, and for a module that it
    does not use itself.
    """
    package = importlib.util.find_spec("lava.lib.dl").submodule_search_locations[0]
    for name in ("slayer", "slayer.neuron", "slayer.neuron.rf", "netx.sequential_modules"):
        module = types.ModuleType(f"lava.lib.dl.{name}")
        module.__path__ = []
        # Lava's compiler looks for process models in the folder of every module beside a process' own.
        module.__file__ = str(Path(package, *name.split(".")).with_suffix(".py"))
        sys.modules[module.__name__] = module

    def neuron_params(_: object) -> None:
        raise NotImplementedError("resonate-and-fire neurons are not supported here")

    sys.modules["lava.lib.dl.slayer.neuron.rf"].neuron_params = neuron_params


ENGINES = {"processes": build_processes, "netx": build_netx}
