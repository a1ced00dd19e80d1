"""An integer network and its inputs as a job for the Lava worker, and the worker's records as a trace.

Lava's axes are (width, height, channel); everything turns between them and (channel, height, width) here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hardware.errors import SpikeguardError
from hardware.network import (
    FRACTION_BITS,
    INPUT,
    STATE_LIMIT,
    IntArray,
    IntegerNetwork,
    Population,
    Shape,
    Synapse,
)
from hardware.targets.lava import dense_weight_exponent
from hardware.targets.loihi2 import MAX_VTH_MANTISSA
from hardware.trace import PopulationTrace, Record, Trace

Engine = Literal["processes", "netx"]
Arrays = dict[str, NDArray[Any]]
GRADED_MESSAGE_BITS = 8


def describe_network(network: IntegerNetwork, engine: Engine) -> tuple[dict[str, Any], Arrays]:
    """The job's facts and arrays about a network; netx gets shapes only, its numbers come from its file."""
    layers: list[dict[str, Any]] = []
    arrays: Arrays = {}
    depth_of = depths(network)
    for index, population in enumerate(network.populations):
        name = population.name
        facts: dict[str, Any] = {"name": name, "shape": lava_shape(population.shape), "depth": depth_of[name]}
        if engine == "processes":
            facts |= {
                "threshold": lava_threshold(population),
                "current_decay": population.current_decay,
                "voltage_decay": population.voltage_decay,
                "synapses": [_describe_synapse(network, synapse) for synapse in network.incoming(name)],
            }
            arrays[f"bias.{index}"] = to_lava_axes(population.bias, population.shape).astype(np.int32)
            for number, synapse in enumerate(network.incoming(name)):
                weight = lava_kernel(synapse.weight) if synapse.kind == "conv" else synapse.weight
                arrays[f"weight.{index}.{number}"] = weight
        layers.append(facts)
    graded = network.input.max_code > 1
    return {
        "engine": engine,
        "steps": network.steps,
        "message_bits": GRADED_MESSAGE_BITS if graded else 0,
        "layers": layers,
    }, arrays


def _describe_synapse(network: IntegerNetwork, synapse: Synapse) -> dict[str, Any]:
    return {
        "source": synapse.source,
        "kind": synapse.kind,
        "source_shape": lava_shape(network.source_shape(synapse)),
        "stride": synapse.stride,
        "padding": synapse.padding,
        "weight_exponent": dense_weight_exponent(synapse.weight) if synapse.kind == "dense" else 0,
    }


def depths(network: IntegerNetwork) -> dict[str, int]:
    """Synapses on the longest way from the input to each population, each of which takes a step on Lava."""
    depth = {INPUT: 0}
    for population in network.populations:
        depth[population.name] = 1 + max(depth[synapse.source] for synapse in network.incoming(population.name))
    return depth


def describe_input(network: IntegerNetwork, codes: IntArray) -> tuple[dict[str, Any], Arrays]:
    """Frames to present, in Lava's axes, and how many steps each is held.

    Args:
        codes: ``(samples, *shape)``, or ``(samples, steps, *shape)``.

    Raises:
        RuleViolations: if the codes are not this network's.
        SpikeguardError: if a time axis does not have the network's number of steps.
    """
    presented = network.input.present(codes)
    shape = network.input.presented_shape
    hold = network.steps
    if presented.ndim == len(shape) + 2:
        if presented.shape[1] != network.steps:
            raise SpikeguardError(
                f"inputs have {presented.shape[1]} steps, the network {network.steps}; bring as many steps"
            )
        presented, hold = presented.reshape(-1, *shape), 1
    return {"hold": hold}, {"frames": to_lava_axes(presented, shape).astype(np.int32)}


def read_records(network: IntegerNetwork, samples: int, records: Mapping[str, NDArray[Any]], record: Record) -> Trace:
    """Cut the worker's records into samples and steps, undoing the latency of one step per synapse.

    Raises:
        SpikeguardError: if the readout spiked, or saturated so that its membrane is not the sum.
    """
    populations = {}
    depth_of = depths(network)
    for index, population in enumerate(network.populations):
        if record == "readouts" and population.spiking:
            continue
        spikes, membranes = (
            _cut(records[f"{kind}.{index}"], population, depth_of[population.name], samples, network.steps)
            for kind in ("spikes", "membranes")
        )
        if not population.spiking:
            is_clipped_sum = not population.is_leaky and np.any(np.abs(membranes) >= STATE_LIMIT)
            if spikes.any() or is_clipped_sum:
                raise SpikeguardError(
                    f"readout {population.name} left the range of the membrane that integrates it on Lava; "
                    "quantise it at a smaller scale"
                )
            populations[population.name] = PopulationTrace(None, membranes)
        else:
            populations[population.name] = PopulationTrace(spikes, membranes)
    final = populations[network.readout.name].membranes
    assert final is not None
    readouts = final[:, -1].astype(np.int64) >> (0 if network.readout.is_leaky else FRACTION_BITS)
    return Trace(readouts, populations if record == "traces" else {})


def lava_shape(shape: Shape) -> list[int]:
    """Sizes in Lava's order."""
    return list(reversed(shape))


def to_lava_axes(values: IntArray, shape: Shape) -> IntArray:
    """Reverse the last axes, which are ``shape``; leading axes stay."""
    leading = values.ndim - len(shape)
    return values.transpose(*range(leading), *reversed(range(leading, values.ndim)))


def lava_kernel(weight: NDArray[np.int32]) -> NDArray[np.int32]:
    """Cross-correlation kernel (out, in, height, width) as Lava's convolution (out, width, height, in)."""
    return weight[:, :, ::-1, ::-1].transpose(0, 3, 2, 1)


def lava_threshold(population: Population) -> int:
    """Threshold mantissa; a readout gets the largest, which its membrane never exceeds."""
    return population.threshold if population.spiking else MAX_VTH_MANTISSA


def _cut(recorded: NDArray[Any], population: Population, depth: int, samples: int, steps: int) -> NDArray[Any]:
    """(Lava steps, *Lava shape) -> (samples, steps, neurons)."""
    window = recorded[depth : depth + samples * steps]
    ordered = to_lava_axes(window, population.shape)
    return np.ascontiguousarray(ordered).reshape(samples, steps, population.size)
