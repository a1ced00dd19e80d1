"""A converted SNN in other units: the same spikes and decisions, better to learn from. Not from the paper.

An SNN learns with a surrogate of absolute width and one learning rate for all. Calibration leaves thresholds of any
size, and a readout whose weights are the ANN's although rates are at most 1 where activations are larger: a network
that is right without confidence, whose fine-tuning begins by undoing what was learned. What enters a layer of neurons
can be multiplied by any factor if its threshold is, and so can the logits; by powers of two, nothing is even rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hardware.errors import RuleViolations, SpikeguardError, Violation
from pipeline.models.graph import NEURONS, WEIGHTED, LayerGraph, LayerKind
from pipeline.models.layers import Scale
from pipeline.models.spiking import RateNetwork, SpikingNetwork

_SCALABLE: tuple[LayerKind, ...] = (*WEIGHTED, "batch_norm", "scale")
_PASSING: tuple[LayerKind, ...] = ("add", "dropout", "flatten")


@torch.no_grad()
def rescale(network: SpikingNetwork, source: RateNetwork, batches: Sequence[Tensor]) -> None:
    """Bring thresholds as near to 1, and logits as near to the ANN's, as powers of two can, in place.

    The factor of the logits z is the least-squares fit, over images and classes, of logits centred image by image:
    ``sum(z_ann z_snn) / sum(z_snn^2)``.

    Args:
        network: converted from ``source`` and calibrated.
        source: the ANN.
        batches: of training images ``(samples, *shape)`` in [0, 1].

    Raises:
        RuleViolations: as :func:`require_rescalable` does.
        SpikeguardError: if the logits run against the ANN's.
    """
    layers = require_rescalable(network.graph)
    factors = {name: 1 / float(neuron.effective_threshold) for name, neuron in network.neurons()}
    factors[network.graph.layers[-1].name] = _factor_of_logits(network, source, batches)
    for name, neuron in network.neurons():
        neuron.threshold.copy_(neuron.effective_threshold * _power_of_two(factors[name]))
    for name, multiplied in layers.items():
        for layer in multiplied:
            module = network.layers[layer]
            for values in [module.value] if isinstance(module, Scale) else module.parameters():
                values.mul_(_power_of_two(factors[name]))


def require_rescalable(graph: LayerGraph) -> dict[str, list[str]]:
    """By layer of neurons, and by the last layer, the layers to multiply so that what they sum up is multiplied.

    Raises:
        RuleViolations: for every sum that holds what cannot be multiplied.
    """
    last = graph.layers[-1].name
    currents = {layer.name: graph.sources[layer.name][0] for layer in graph.layers if layer.kind in NEURONS}
    found = {name: _multiplied(graph, current) for name, current in [*currents.items(), (last, last)]}
    if refused := [name for name, layers in found.items() if not all(layers)]:
        rule, actual = "what enters has weights of its own", "a term that others read, or plain spikes"
        remedy = "leave conversion.weights copied"
        paths = [graph.by_name[name].path or name for name in refused]
        raise RuleViolations(
            "conversion.weights=rescaled", [Violation(path, rule, actual, "weights", remedy) for path in paths]
        )
    return found


def _power_of_two(factor: float) -> float:
    return 2.0 ** round(math.log2(factor))


def _multiplied(graph: LayerGraph, current: str) -> list[str]:
    """The layers to multiply so that a current is; an empty name for a term that cannot be."""
    kind = graph.by_name[current].kind if current in graph.by_name else ""
    if len(graph.readers(current)) > 1 or kind not in (*_SCALABLE, *_PASSING):
        return [""]
    if kind in _SCALABLE:
        return [current]
    # A term may be added twice.
    return list(dict.fromkeys(layer for term in graph.sources[current] for layer in _multiplied(graph, term)))


def _factor_of_logits(network: SpikingNetwork, source: RateNetwork, batches: Sequence[Tensor]) -> float:
    source.eval()
    agreement = power = 0.0
    for batch in batches:
        wanted, found = (_centred(model(batch)) for model in (source, network))
        agreement += float((wanted * found).sum())
        power += float(found.square().sum())
    if agreement <= 0:
        raise SpikeguardError(
            "logits of the converted network run against the ANN's, so that no factor fits them; "
            "leave conversion.weights copied, or train the ANN for longer"
        )
    return agreement / power


def _centred(logits: Tensor) -> Tensor:
    logits = logits.double()
    return logits - logits.mean(1, keepdim=True)
