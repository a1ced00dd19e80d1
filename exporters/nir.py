"""Writes a network as NIR, in one of two profiles (see ``hardware.formats.nir_layout``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nir
import numpy as np
from numpy.typing import NDArray

from exporters.magnitudes import float32_violations
from hardware.bounds import FLOAT32_INTEGERS, saturation_is_harmless
from hardware.errors import RuleViolations, Violation
from hardware.files import atomic_path
from hardware.formats.network_file import describe_network
from hardware.formats.nir_layout import (
    METADATA_KEY,
    STEP_SECONDS,
    NirCard,
    NirProfile,
    lay_out,
    neuron_node,
)
from hardware.network import DECAY_UNITY, IntegerNetwork, Population, Synapse


def write_nir(network: IntegerNetwork, path: Path, profile: NirProfile, *, allow_deviations: bool = False) -> None:
    """Write ``network`` to ``path`` as a NIR graph, atomically.

    Args:
        network: populations with reset to zero.
        path: of the HDF5 file.
        profile: "if" for readers of ``IF`` nodes, "cuba" for readers of ``CubaLIF`` nodes.
        allow_deviations: write a network whose membranes may clip or leak, and state that in the metadata; readers
            that do not saturate, or decay in floating point, may then differ.

    Raises:
        RuleViolations: listing everything that NIR cannot hold, or its readers would not compute exactly.
    """
    harmless = saturation_is_harmless(network)
    problems = nir_violations(network)
    if not allow_deviations:
        problems += _deviations(network, harmless)
    if problems:
        raise RuleViolations(f"NIR profile {profile}", problems)
    graph = build_graph(network, profile, "harmless" if harmless else "possible")
    with atomic_path(path) as temporary:
        nir.write(str(temporary), graph)


def nir_violations(network: IntegerNetwork) -> list[Violation]:
    """What NIR cannot hold."""
    problems = float32_violations(network)
    for population in network.populations:
        if population.current_decay != DECAY_UNITY and population.bias.any():
            rule = "bias enters with the synapses, whose current decays"
            remedy = "give it to a neuron that always spikes"
            problems.append(Violation(population.name, rule, "past the current", "no bias", remedy))
        if population.spiking and population.reset != "zero":
            rule = "neuron resets to zero; NIR has no other reset"
            problems.append(Violation(population.name, rule, population.reset, "zero", "quantise with reset zero"))
        if population.spiking and population.threshold >= FLOAT32_INTEGERS // 2:
            limit = f"below {FLOAT32_INTEGERS // 2:,}"
            rule = "threshold + 1/2 is exact in float32"
            problems.append(Violation(population.name, rule, f"{population.threshold:,}", limit, "rescale it"))
        if len(population.shape) == 3 and np.ptp(population.bias, axis=(1, 2)).any():
            rule = "bias of a convolution is one per channel"
            remedy = "carry the bias through a constant input channel"
            problems.append(Violation(population.name, rule, "differs within a channel", "equal", remedy))
    for synapse in network.synapses:
        if synapse.kind == "conv" and synapse.weight.shape[2] != synapse.weight.shape[3]:
            kernel = str(synapse.weight.shape[2:])
            problems.append(Violation(synapse.name, "kernel is square", kernel, "equal sides", "pad the kernel"))
    return problems


def _deviations(network: IntegerNetwork, saturation_is_harmless: bool) -> list[Violation]:
    """What a file holds, but readers in floating point would not compute exactly."""
    problems = []
    for population in network.populations:
        if population.is_leaky:
            decays = f"decays {population.current_decay}, {population.voltage_decay}"
            rule, remedy = "neuron is IF; readers decay in floating point", "use IF neurons, or allow deviations"
            problems.append(Violation(population.name, rule, decays, f"{DECAY_UNITY}, 0", remedy))
    if not saturation_is_harmless:
        rule = "saturation cannot change a spike"
        remedy = "quantise with a smaller scale, or allow deviations"
        problems.append(Violation("network", rule, "not proven", "proven", remedy))
    return problems


def build_graph(network: IntegerNetwork, profile: NirProfile, saturation: str) -> Any:
    """The ``nir.NIRGraph`` of a network that has no violations."""
    record = describe_network(network)
    layout = lay_out(record)
    card = NirCard.model_validate(
        {
            "format": "spikeguard.nir/1",
            "profile": profile,
            "dt": STEP_SECONDS,
            "saturation": saturation,
            "semantics": network.semantics_card(),
            "network": record,
        }
    )
    nodes: dict[str, Any] = {
        layout.input: nir.Input({"input": np.array(network.input.presented_shape)}),
        layout.output: nir.Output({"output": np.array(network.readout.shape)}),
    }
    for population in record.populations:
        if population.name in layout.populations:
            kind, fields = neuron_node(profile, population)
            nodes[layout.populations[population.name]] = getattr(nir, kind)(**fields)
    carries_bias = {network.incoming(p.name)[0].target: network.incoming(p.name)[0] for p in network.populations}
    for synapse, node, flatten in zip(network.synapses, layout.synapses, layout.flattens, strict=True):
        target = network.by_name[synapse.target]
        bias = _channel_bias(target) if carries_bias[target.name] is synapse else None
        nodes[node] = _weight_node(network, synapse, bias)
        if flatten is not None:
            shape = np.array(network.source_shape(synapse))
            nodes[flatten] = nir.Flatten({"input": shape}, start_dim=0, end_dim=-1)
    return nir.NIRGraph(nodes, list(layout.edges), metadata={METADATA_KEY: card.model_dump_json()})


def _channel_bias(population: Population) -> NDArray[np.int64]:
    """Bias per channel, or per neuron of a dense population."""
    return population.bias.reshape(population.shape[0], -1)[:, 0]


def _weight_node(network: IntegerNetwork, synapse: Synapse, bias: NDArray[np.int64] | None) -> Any:
    """The node of one synapse; a population's bias travels with the first synapse that enters it."""
    values = np.zeros(len(synapse.weight), np.int64) if bias is None else bias
    weight, offset = synapse.weight.astype(np.float32), values.astype(np.float32)
    if synapse.kind == "dense":
        return nir.Affine(weight, offset)
    return nir.Conv2d(
        input_shape=network.source_shape(synapse)[1:],
        weight=weight,
        stride=synapse.stride,
        padding=synapse.padding,
        dilation=1,
        groups=1,
        bias=offset,
    )
