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
from lava.magma.core.process.ports.ports import AbstractPort, OutPort
from lava.magma.core.process.process import AbstractProcess
from lava.proc.conv.process import Conv
from lava.proc.dense.process import Dense
from lava.proc.lif.process import LIFReset

STATE_UNIT = 64
BIAS_EXPONENT = 6
INPUT = "input"
IF_DECAYS = (4096, 0)
# Step s of sample k, both counted from 0, reaches a layer of depth d at time step k T + s + d + 1, counted from 1.
# Its state is wiped at s = 0.
RESET_AFTER_DEPTH = 1

Array = np.ndarray[Any, Any]
Inlets = list[tuple[int, AbstractPort]]
"""Ports that take the input, each with the steps by which its input lags behind."""


@dataclass
class HeldSynapse:
    """A synapse process, and the weights it is meant to hold: in its own layout, in weight units."""

    name: str
    process: AbstractProcess
    weight: Array


@dataclass
class Layer:
    """A neuron process, the synapse processes before it, and the parameters they are meant to hold.

    Attributes:
        index: of its population in the job; None for a relay.
        depth: synapse processes on the way from the input to it.
        bias: broadcast to the neuron process' shape, in weight units.
        threshold: integer mantissa.
        decays: shares of 4096 lost per step by current and voltage.
    """

    name: str
    index: int | None
    depth: int
    synapses: list[HeldSynapse]
    neuron: AbstractProcess
    bias: Array
    threshold: int
    decays: tuple[int, int]


def build_processes(job: dict[str, Any], arrays: dict[str, Array]) -> tuple[Inlets, list[Layer]]:
    """Connect stock processes as the job describes them.

    Every synapse process takes one step. Where branches of unequal length meet, relays hold back the short one: the
    spikes of a population pass a chain of them, which later populations tap where they need to. The input is
    presented once more instead, as late as it is needed.
    """
    steps: int = job["steps"]
    inlets: Inlets = []
    layers: list[Layer] = []
    # Of each population, its spikes and what its relays make of them, each a step later.
    taps: dict[str, list[Layer]] = {}
    for index, facts in enumerate(job["layers"]):
        name, depth = facts["name"], facts["depth"]
        neuron = _neuron(facts, arrays[f"bias.{index}"], depth, steps)
        synapses = []
        for number, about in enumerate(facts["synapses"]):
            source, weight = about["source"], arrays[f"weight.{index}.{number}"]
            synapse = _synapse(about, weight, job["message_bits"] if source == INPUT else 0)
            synapse.a_out.connect(neuron.a_in)
            synapses.append(HeldSynapse(f"{source}->{name}", synapse, weight))
            if source == INPUT:
                inlets.append((depth - 1, synapse.s_in))
                continue
            chain = taps[source]
            while chain[-1].depth < depth - 1:
                chain.append(_relay(chain[-1], source, steps))
                layers.append(chain[-1])
            connect(chain[depth - 1 - chain[0].depth].neuron.s_out, synapse.s_in)
        decays = (facts["current_decay"], facts["voltage_decay"])
        bias, threshold = arrays[f"bias.{index}"], facts["threshold"]
        taps[name] = [Layer(name, index, depth, synapses, neuron, bias, threshold, decays)]
        layers += taps[name]
    return inlets, layers


def connect(source: OutPort, sink: AbstractPort) -> None:
    """Connect two ports; a dense synapse reads an image in C order of (channel, height, width)."""
    if len(source.shape) == 3 and len(sink.shape) == 1:
        source.transpose([2, 1, 0]).flatten().connect(sink)
    else:
        source.connect(sink)


def _synapse(about: dict[str, Any], weight: Array, message_bits: int) -> AbstractProcess:
    if about["kind"] == "conv":
        return Conv(
            weight=weight,
            input_shape=tuple(about["source_shape"]),
            stride=about["stride"],
            padding=about["padding"],
            num_message_bits=message_bits,
        )
    exponent = about["weight_exponent"]
    mantissas = weight >> exponent if exponent >= 0 else weight << -exponent
    return Dense(weights=mantissas, weight_exp=exponent, num_message_bits=message_bits)


def _neuron(facts: dict[str, Any], bias: Array, depth: int, steps: int) -> AbstractProcess:
    return LIFReset(
        shape=tuple(facts["shape"]),
        vth=facts["threshold"],
        du=facts["current_decay"] - 1,
        dv=facts["voltage_decay"],
        bias_mant=bias,
        bias_exp=BIAS_EXPONENT,
        reset_interval=steps,
        reset_offset=depth + RESET_AFTER_DEPTH,
    )


def _relay(before: Layer, source: str, steps: int) -> Layer:
    """Neurons that repeat each spike one step later: weight 1, threshold 0, and no memory beyond the reset."""
    shape, depth = before.neuron.s_out.shape, before.depth + 1
    if len(shape) == 3:
        weight = np.ones((shape[2], 1, 1, 1), np.int32)
        synapse = Conv(weight=weight, input_shape=shape, groups=shape[2])
    else:
        weight = np.eye(shape[0], dtype=np.int32)
        synapse = Dense(weights=weight)
    current_decay, voltage_decay = IF_DECAYS
    facts = {"shape": shape, "threshold": 0, "current_decay": current_decay, "voltage_decay": voltage_decay}
    bias = np.zeros(shape, np.int32)
    neuron = _neuron(facts, bias, depth, steps)
    before.neuron.s_out.connect(synapse.s_in)
    synapse.a_out.connect(neuron.a_in)
    name = f"relay of {source} at depth {depth}"
    return Layer(name, None, depth, [HeldSynapse(name, synapse, weight)], neuron, bias, 0, IF_DECAYS)


def build_netx(job: dict[str, Any], _arrays: dict[str, Array]) -> tuple[Inlets, list[Layer]]:
    """Load the job's model.net with lava-dl, and from the file itself what the processes are meant to hold."""
    _stand_in_for_slayer()
    from lava.lib.dl.netx.hdf5 import Network

    with h5py.File(job["net"], "r") as file:
        groups = [file["layer"][str(index)] for index in range(len(file["layer"]))]
        meant = [_meant_by(group) for group in groups if _text(group["type"]) in ("conv", "dense")]
    # netx adds a layer's number, counted from 1, to the offset; in a chain that is its depth.
    network = Network(
        net_config=job["net"],
        input_message_bits=job["message_bits"],
        reset_interval=job["steps"],
        reset_offset=RESET_AFTER_DEPTH,
    )
    if not len(meant) == len(network.layers) == len(job["layers"]):
        raise ValueError(
            f"the file has {len(meant)} layers, netx made {len(network.layers)} of them, "
            f"the network has {len(job['layers'])}"
        )
    layers = []
    numbered = enumerate(zip(job["layers"], network.layers, meant, strict=True))
    for index, (facts, block, (weight, bias, threshold, decays)) in numbered:
        name, shape = facts["name"], tuple(int(size) for size in block.neuron.s_out.shape)
        if shape != tuple(facts["shape"]):
            raise ValueError(f"layer {name} has shape {shape} in the file, expected {facts['shape']}")
        synapses = [HeldSynapse(name, block.synapse, weight)]
        bias = np.broadcast_to(bias, shape)
        layers.append(Layer(name, index, facts["depth"], synapses, block.neuron, bias, threshold, decays))
    return [(0, network.inp)], layers


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
