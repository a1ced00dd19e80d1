"""Where the deployed model's spikes part from the reference's, layer by layer.

Free-running, a spike that differs changes what later layers read. Teacher-forced, each layer of the integer network
reads the spikes of the float SNN, so that what differs is of its own making.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.emulated_population import EmulatedPopulation, input_rows
from hardware.network import FRACTION_BITS, INPUT, IntegerNetwork
from hardware.synapse_kernels import pack_spikes
from hardware.trace import Trace
from pipeline.models.spiking import LayerActivity

Spikes = NDArray[np.bool_]
"""``(samples, steps, neurons)``."""
Margin = Callable[[int, int, int], float | None]


def layer_rows(
    activity: Mapping[str, LayerActivity], deployed: Trace, forced: Mapping[str, Spikes]
) -> list[dict[str, Any]]:
    """Compare the spikes of every layer as rows of ``report.json``.

    Args:
        activity: of the float SNN.
        deployed: trace of the integer network on the same images.
        forced: spikes of :func:`run_teacher_forced` on them.

    Returns:
        Per layer, free-running and under "teacher_forced": the share of equal spikes, in all and at each step, the mean
        absolute difference of firing rates, and the first differing spike with its margin: the float membrane before
        reset minus its threshold, in real units.
    """
    rows = []
    for name, layer in activity.items():
        spikes = deployed.populations[name].spikes
        assert spikes is not None

        def margin(sample: int, step: int, neuron: int, layer: LayerActivity = layer) -> float:
            return float(layer.membranes[sample, step, neuron]) - layer.threshold

        expected = layer.spikes.numpy()
        row = {"name": name, **_compare(expected, spikes, margin)}
        rows.append(row | {"teacher_forced": _compare(expected, forced[name], margin)})
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

        rows.append({"name": population.name, **_compare(old, new, margin)})
    return rows


def _compare(expected: Spikes, spikes: Spikes, margin: Margin) -> dict[str, Any]:
    differing = expected != spikes
    first = None
    if differing.any():
        # Earliest in time over all images, so that causes come before their consequences.
        samples, steps, neurons = np.nonzero(differing)
        at = int(np.lexsort((neurons, samples, steps))[0])
        sample, step, neuron = int(samples[at]), int(steps[at]), int(neurons[at])
        first = {"sample": sample, "step": step, "neuron": neuron, "margin": margin(sample, step, neuron)}
    return {
        "spike_agreement": float(1 - differing.mean()),
        "step_agreement": [float(1 - share) for share in differing.mean((0, 2))],
        "rate_error": float(np.abs(expected.mean(1) - spikes.mean(1)).mean()),
        "first_divergence": first,
    }


def run_teacher_forced(
    network: IntegerNetwork, codes: NDArray[np.uint8], teacher: Mapping[str, Spikes]
) -> dict[str, Spikes]:
    """Spikes of every spiking population when each reads the spikes of a teacher.

    Args:
        network: what is run.
        codes: uint8 ``(samples, [steps,] *shape)``.
        teacher: spikes ``(samples, steps, neurons)`` by population, neurons in C order of its shape.

    Returns:
        Spikes of that form.
    """
    steps, timed = network.steps, codes.ndim == len(network.input.shape) + 2
    rows = input_rows(network.input, codes, steps)
    read = {INPUT: pack_spikes(rows != 0) if network.input.max_code == 1 else rows}
    read |= {name: pack_spikes(_channels_last(spikes, network.by_name[name].shape)) for name, spikes in teacher.items()}
    found = {}
    for population in network.populations:
        if not population.spiking:
            continue
        incoming = [(synapse, network.source_shape(synapse)) for synapse in network.incoming(population.name)]
        emulated = EmulatedPopulation.proven(population, incoming, network.input)
        held, stepped = emulated.sums(read, len(codes), steps, timed)
        spikes, _, _ = emulated.fire(held, stepped, steps, keeps_membranes=False)
        found[population.name] = emulated.c_order(spikes)
    return found


def _channels_last(spikes: Spikes, shape: tuple[int, ...]) -> Spikes:
    """Rows of one sample and step, neurons as the kernels have them."""
    shaped = spikes.reshape(-1, *shape)
    return np.ascontiguousarray(np.moveaxis(shaped, 1, -1)).reshape(len(shaped), -1)
