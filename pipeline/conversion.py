"""ANN to SNN: weights and batch-norm affine copied, one threshold per layer from a percentile of its input."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.models.spiking import RateNetwork, SpikingNetwork
from pipeline.neurons import MIN_THRESHOLD, IntegrateAndFire


def convert(network: RateNetwork, steps: int) -> SpikingNetwork:
    """An SNN of the same topology and weights; ReLUs become neurons, weighted layers gain zero biases.

    Batch norm's running statistics are not carried over (they are re-estimated by :func:`calibrate`), and
    thresholds are 1 until then. The caller's network is untouched.
    """
    graph = network.graph.with_kind("relu", "spike").with_biases()
    spiking = SpikingNetwork(graph, steps)
    for name, module in network.layers.items():
        target = spiking.layers[name]
        if isinstance(target, IntegrateAndFire):
            continue
        state = {key: value for key, value in module.state_dict().items() if not key.startswith("running_")}
        missing = set(target.state_dict()) - set(state)
        if "bias" in missing:
            state["bias"] = torch.zeros_like(target.state_dict()["bias"])
        target.load_state_dict(copy.deepcopy(state), strict=False)
    return spiking


@torch.no_grad()
def calibrate(
    network: SpikingNetwork,
    batches: Sequence[Tensor],
    *,
    percentile: float,
    calibration_steps: int,
    scale: float,
) -> None:
    """Set every threshold in place, front to back, then scale all of them and re-estimate batch norm.

    A layer's threshold is the largest, over the mini-batches, of the ``percentile``-th percentile of its input
    current over all steps, images and features (the k-th smallest of N values, k = 1 + round(q (N - 1))). Earlier
    layers spike with their unscaled thresholds meanwhile, and batch norm uses the statistics of the mini-batch.

    Args:
        network: as :func:`convert` made it.
        batches: of training images ``(samples, *shape)`` in [0, 1].
        percentile: in (0, 100].
        calibration_steps: steps of constant input during calibration.
        scale: factor on all thresholds at the end (kappa of the method).
    """
    running_steps, network.steps = network.steps, calibration_steps
    _set_batch_statistics(network, momentum=0.0)
    activities = [batch.unsqueeze(0) for batch in batches]
    for module in network.layers.values():
        if isinstance(module, IntegrateAndFire):
            found = max(kth_percentile(activity, percentile) for activity in activities)
            module.threshold.fill_(max(found, MIN_THRESHOLD))
        activities = [network.advance(module, activity) for activity in activities]
    for _, neuron in network.neurons():
        neuron.threshold.mul_(scale)
        neuron.clamp_threshold()
    network.steps = running_steps
    estimate_batch_norm(network, batches)


def kth_percentile(values: Tensor, percentile: float) -> float:
    """The k-th smallest value, k = 1 + round(q (N - 1)), q = percentile / 100."""
    flat = values.flatten()
    k = 1 + round(percentile / 100 * (flat.numel() - 1))
    return float(flat.kthvalue(k).values)


@torch.no_grad()
def estimate_batch_norm(network: SpikingNetwork, batches: Sequence[Tensor]) -> None:
    """Replace batch norm's running statistics, in place, by averages over the mini-batches as the SNN sees them."""
    norms = _set_batch_statistics(network, momentum=None)
    for norm in norms:
        norm.reset_running_stats()
    for batch in batches:
        network(batch)
    for norm, settings in zip(norms, _momenta(network), strict=True):
        norm.momentum = settings
    network.eval()


def _set_batch_statistics(network: SpikingNetwork, momentum: float | None) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    """Eval mode for all but batch norm, which uses the mini-batch and updates its averages with ``momentum``."""
    network.eval()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = momentum
    return norms


def _momenta(network: SpikingNetwork) -> list[float]:
    return [float(layer.options["momentum"]) for layer in network.graph.layers if layer.kind == "batch_norm"]
