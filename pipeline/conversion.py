"""ANN to SNN: weights and batch-norm affine copied, one threshold per layer from a percentile of its input
(Özdenizci & Legenstein, TMLR 2024).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.models.graph import INPUT, LayerGraph
from pipeline.models.spiking import RateNetwork, SpikingNetwork
from pipeline.neurons import MIN_THRESHOLD, Leaky

PackedSpikes = tuple[NDArray[np.uint8], tuple[int, ...]]
Norm = nn.BatchNorm1d | nn.BatchNorm2d


def convert(network: RateNetwork, steps: int, *, beta: float = 1.0, subtract: bool = False) -> SpikingNetwork:
    """An SNN of the same topology and weights; ReLUs become neurons, weighted layers gain zero biases.

    Batch norm's running statistics are not carried over (they are re-estimated by :func:`calibrate`), and
    thresholds are 1 until then. The caller's network is untouched. In networks with residual sums only layers after
    the last sum gain a bias.

    Args:
        network: with ReLUs.
        steps: T.
        beta, subtract: of the neurons, see :class:`pipeline.neurons.Leaky` for what they cost.
    """
    spiking = SpikingNetwork(network.graph.spiking(beta, subtract), steps)
    for name, module in network.layers.items():
        target = spiking.layers[name]
        if isinstance(target, Leaky):
            continue
        state = {key: value for key, value in module.state_dict().items() if not key.startswith("running_")}
        missing = set(target.state_dict()) - set(state)
        if "bias" in missing:
            state["bias"] = torch.zeros_like(target.state_dict()["bias"])
        target.load_state_dict(copy.deepcopy(state), strict=False)
    return spiking.to(next(network.parameters()).device)


@torch.no_grad()
def calibrate(
    network: SpikingNetwork,
    batches: Sequence[Tensor],
    *,
    percentile: float,
    calibration_steps: int,
    scale: float,
    second_batches: Sequence[Tensor] = (),
    advance: Callable[..., None] = lambda *_: None,
) -> None:
    """Set every threshold in place, front to back, then scale all of them and re-estimate batch norm.

    A layer's threshold is the largest, over the mini-batches, of the ``percentile``-th percentile of its input
    current over all steps, images and features (the k-th smallest of N values, k = 1 + round(q (N - 1))). Earlier
    layers spike with their unscaled thresholds meanwhile, and batch norm uses the statistics of the mini-batch.

    In a residual block the first neurons are calibrated on ``batches`` and the later ones on ``second_batches``, as
    where one pass over all of them sets both thresholds.

    Between layers only spikes are held, one bit each; what lies between two layers of neurons is computed again.

    Args:
        network: as :func:`convert` made it.
        batches: of training images ``(samples, *shape)`` in [0, 1].
        percentile: in (0, 100].
        calibration_steps: steps of constant input during calibration.
        scale: factor on all thresholds at the end (kappa of the method).
        second_batches: of more training images; empty: residual blocks use ``batches`` throughout.
        advance: called with the layer's name after each layer of neurons.
    """
    running_steps, network.steps = network.steps, calibration_steps
    stores: list[dict[str, PackedSpikes]] = [{} for _ in (*batches, *second_batches)]
    everything = [*batches, *second_batches]
    second = later_in_block(network.graph) if second_batches else frozenset()
    with _batch_statistics(network, momentum=0.0):
        for name, neuron in network.neurons():
            deciding = slice(len(batches), None) if name in second else slice(0, len(batches))
            found = max(
                kth_percentile(_current(network, name, batch, store), percentile, calibration_steps)
                for batch, store in zip(everything[deciding], stores[deciding], strict=True)
            )
            neuron.threshold.fill_(max(found, MIN_THRESHOLD))
            needed = _spikes_needed_after(network.graph, name)
            for batch, store in zip(everything, stores, strict=True):
                spikes = neuron.sequence(_current(network, name, batch, store), calibration_steps)
                store[name] = _pack(spikes)
                for done in set(store) - needed:
                    del store[done]
            advance(name)
    for _, neuron in network.neurons():
        neuron.threshold.mul_(scale)
        neuron.clamp_threshold()
    network.steps = running_steps
    estimate_batch_norm(network, batches)


def later_in_block(graph: LayerGraph) -> frozenset[str]:
    """Names of the neurons that are not the first ones of their residual block."""
    seen: set[str] = set()
    later = set()
    for layer in graph.layers:
        if layer.kind == "spike" and layer.block:
            if layer.block in seen:
                later.add(layer.name)
            seen.add(layer.block)
    return frozenset(later)


def kth_percentile(values: Tensor, percentile: float, steps: int = 1) -> float:
    """The k-th smallest value, k = 1 + round(q (N - 1)), q = percentile / 100.

    Args:
        values: ``(steps, ...)``, or ``(1, ...)`` where each stands for ``steps`` equal ones.
        percentile: in (0, 100].
        steps: that were counted.
    """
    copies = steps if len(values) == 1 else 1
    k = 1 + round(percentile / 100 * (copies * values.numel() - 1))
    index = -(-k // copies) - 1
    # numpy's selection is several times faster than torch's and needs no indices, each as wide as two values.
    return float(np.partition(values.detach().cpu().numpy(), index, axis=None)[index])


@torch.no_grad()
def estimate_batch_norm(network: SpikingNetwork, batches: Sequence[Tensor]) -> None:
    """Replace batch norm's running statistics, in place, by averages over the mini-batches as the SNN sees them."""
    with _batch_statistics(network, momentum=None) as norms:
        for norm in norms:
            norm.reset_running_stats()
        for batch in batches:
            network(batch)


@contextmanager
def _batch_statistics(network: SpikingNetwork, momentum: float | None) -> Iterator[list[Norm]]:
    """Eval mode for all but batch norm, which uses the mini-batch and updates its averages with ``momentum``."""
    network.eval()
    norms = [module for module in network.modules() if isinstance(module, Norm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = momentum
    yield norms
    for norm, usual in zip(norms, momenta, strict=True):
        norm.momentum = usual
    network.eval()


def _current(network: SpikingNetwork, name: str, images: Tensor, store: dict[str, PackedSpikes]) -> Tensor:
    """What enters a layer of neurons, from the image and the spikes before it; nothing is held longer than it is read,
    for at all steps each layer's values are as many as the whole calibration has room for a few times.
    """
    graph = network.graph
    (wanted,) = graph.sources[name]
    path = _layers_from(store, graph, wanted)
    last_reader = {source: layer for layer in path for source in graph.sources[layer]}
    values: dict[str, Tensor] = {}

    for layer in path:
        sources = graph.sources[layer]
        for source in sources:
            if source not in values:
                values[source] = images.unsqueeze(0) if source == INPUT else _unpack(store[source], images)
        read = [values[source] for source in sources]
        for source in {source for source in sources if last_reader[source] == layer}:
            del values[source]
        values[layer] = network.advance(layer, read)
        del read
    return values[wanted]


def _layers_from(store: dict[str, PackedSpikes], graph: LayerGraph, wanted: str) -> list[str]:
    """The layers, in order, that lie between the input or stored spikes and ``wanted``, which is one of them."""
    needed: set[str] = set()
    waiting = [wanted]
    while waiting:
        layer = waiting.pop()
        if layer != INPUT and layer not in store:
            needed.add(layer)
            waiting.extend(graph.sources[layer])
    return [layer.name for layer in graph.layers if layer.name in needed]


def _spikes_needed_after(graph: LayerGraph, name: str) -> set[str]:
    """The layers of neurons up to ``name`` whose spikes reach later neurons without passing through others."""
    order = [layer.name for layer in graph.layers]
    needed: set[str] = set()
    for layer in graph.layers[order.index(name) + 1 :]:
        if layer.kind != "spike":
            continue
        waiting = list(graph.sources[layer.name])
        while waiting:
            source = waiting.pop()
            if source == INPUT:
                continue
            if graph.by_name[source].kind == "spike":
                needed.add(source)
            else:
                waiting.extend(graph.sources[source])
    return needed


def _pack(spikes: Tensor) -> PackedSpikes:
    return np.packbits(spikes.bool().cpu().numpy()), tuple(spikes.shape)


def _unpack(packed: PackedSpikes, like: Tensor) -> Tensor:
    bits, shape = packed
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits, count=count)).to(like).reshape(shape)
