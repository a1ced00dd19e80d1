"""Where the deployed model's spikes part from the reference's, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.network import FRACTION_BITS, IntegerNetwork
from hardware.trace import Trace
from pipeline.models.spiking import LayerActivity

Spikes = NDArray[np.bool_]
"""``(samples, steps, neurons)``."""
Margin = Callable[[int, int, int], float | None]


def layer_rows(activity: Mapping[str, LayerActivity], deployed: Trace) -> list[dict[str, Any]]:
    """Compare the spikes of every layer, free-running, as rows of ``report.json``.

    Args:
        activity: of the float SNN.
        deployed: trace of the integer network on the same images.

    Returns:
        Per layer the share of equal spikes, the mean absolute difference of firing rates, and the first differing
        spike with its margin: the float membrane before reset minus its threshold, in real units.
    """
    rows = []
    for name, layer in activity.items():
        spikes = deployed.populations[name].spikes
        assert spikes is not None

        def margin(sample: int, step: int, neuron: int, layer: LayerActivity = layer) -> float:
            return float(layer.membranes[sample, step, neuron]) - layer.threshold

        rows.append(_row(name, layer.spikes.numpy(), spikes, margin))
    return rows


def build_rows(network: IntegerNetwork, earlier: Trace, deployed: Trace) -> list[dict[str, Any]]:
    """Compare an earlier build's spikes with the deployed ones', as :func:`layer_rows` does.

    A trace holds membranes after the reset, so a margin is known only where the earlier build did not spike; elsewhere
    it is None. Layers that have other names, sizes or steps in the two builds have no row.

    Args:
        network: of the earlier build.
        earlier, deployed: traces of the same images.
    """
    rows = []
    for population in network.populations:
        before = earlier.populations[population.name]
        after = deployed.populations.get(population.name)
        old, new = before.spikes, None if after is None else after.spikes
        if old is None or new is None or old.shape != new.shape:
            continue
        membranes, unit = before.membranes, population.scale * (1 << FRACTION_BITS)
        threshold = population.threshold / population.scale

        def margin(
            sample: int, step: int, neuron: int, old: Spikes = old, membranes: Any = membranes, unit: float = unit,
            threshold: float = threshold,
        ) -> float | None:  # fmt: skip
            spiked = old[sample, step, neuron]
            return None if spiked else float(membranes[sample, step, neuron]) / unit - threshold

        rows.append(_row(population.name, old, new, margin))
    return rows


def _row(name: str, expected: Spikes, spikes: Spikes, margin: Margin) -> dict[str, Any]:
    differing = expected != spikes
    first = None
    if differing.any():
        # Earliest in time over all images, so that causes come before their consequences.
        samples, steps, neurons = np.nonzero(differing)
        at = int(np.lexsort((neurons, samples, steps))[0])
        sample, step, neuron = int(samples[at]), int(steps[at]), int(neurons[at])
        first = {"sample": sample, "step": step, "neuron": neuron, "margin": margin(sample, step, neuron)}
    return {
        "name": name,
        "spike_agreement": float(1 - differing.mean()),
        "rate_error": float(np.abs(expected.mean(1) - spikes.mean(1)).mean()),
        "first_divergence": first,
    }
