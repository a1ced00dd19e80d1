"""Where the deployed model's spikes part from the float model's, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hardware.trace import Trace
from pipeline.models.spiking import LayerActivity


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
        expected = layer.spikes.numpy()
        differing = expected != spikes
        first = None
        if differing.any():
            # Earliest in time over all images, so that causes come before their consequences.
            samples, steps, neurons = np.nonzero(differing)
            at = int(np.lexsort((neurons, samples, steps))[0])
            sample, step, neuron = int(samples[at]), int(steps[at]), int(neurons[at])
            margin = float(layer.membranes[sample, step, neuron]) - layer.threshold
            first = {"sample": sample, "step": step, "neuron": neuron, "margin": margin}
        rows.append(
            {
                "name": name,
                "spike_agreement": float(1 - differing.mean()),
                "rate_error": float(np.abs(expected.mean(1) - spikes.mean(1)).mean()),
                "first_divergence": first,
            }
        )
    return rows
