"""The meaning of an :class:`~hardware.network.IntegerNetwork`, as plainly as it can be written.

Everything else that runs a network is proven equal to this. Speed is no concern here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hardware.network import DECAY_UNITY, FRACTION_BITS, INPUT, STATE_LIMIT, IntArray, IntegerNetwork, Synapse
from hardware.trace import PopulationTrace, Record, Trace

Int64Array = NDArray[np.int64]


def run_reference(
    network: IntegerNetwork, codes: IntArray, record: Record = "traces", *, state_limit: int = STATE_LIMIT
) -> Trace:
    """Run samples one step at a time.

    Args:
        network: what to run.
        codes: ``(samples, *shape)``, or ``(samples, steps, *shape)`` for inputs that change over time.
        record: "traces" keeps every spike and membrane, "readouts" only the sums.
        state_limit: where membranes saturate. A wider one than the chip's 24 bits shows what a network of wider
            integers would do; int64 must hold 4096 times it.

    Returns:
        A complete trace; the readout's membranes are recorded, its spikes do not exist. Membranes that need more
        than 32 bits are absent.
    """
    presented = network.input.present(codes, network.steps)
    samples = len(presented)
    changes_over_time = codes.ndim == len(network.input.shape) + 2
    currents = {p.name: np.zeros((samples, *p.shape), np.int64) for p in network.populations}
    membranes = {p.name: np.zeros((samples, *p.shape), np.int64) for p in network.populations}
    readouts = np.zeros((samples, network.classes), np.int64)
    spike_history: dict[str, list[NDArray[np.bool_]]] = {p.name: [] for p in network.populations}
    fits_record = state_limit <= np.iinfo(np.int32).max
    membrane_history: dict[str, list[NDArray[np.int32]]] = {p.name: [] for p in network.populations}

    for step in range(network.steps):
        activity: dict[str, Int64Array] = {INPUT: presented[:, step] if changes_over_time else presented}
        for population in network.populations:
            name = population.name
            total = sum(
                (propagate(s, activity[s.source]) for s in network.incoming(name)),
                start=np.zeros_like(currents[name]),
            )
            u = decay(currents[name], population.current_decay) + (total << FRACTION_BITS)
            v = decay(membranes[name], population.voltage_decay) + u + (population.bias << FRACTION_BITS)
            v = np.clip(v, -state_limit, state_limit)
            if population.spiking:
                threshold = population.threshold << FRACTION_BITS
                spikes = v > threshold
                v = np.where(spikes, 0 if population.reset == "zero" else v - threshold, v)
                activity[name] = spikes.astype(np.int64)
                spike_history[name].append(spikes.reshape(samples, population.size))
            else:
                readouts += total.reshape(samples, population.size) + population.bias.reshape(-1)
            currents[name], membranes[name] = u, v
            if fits_record:
                membrane_history[name].append(v.reshape(samples, population.size).astype(np.int32))

    if network.readout.is_leaky:
        readouts = membranes[network.readout.name].reshape(samples, network.classes)
    if record == "readouts":
        return Trace(readouts)
    return Trace(
        readouts,
        {
            p.name: PopulationTrace(
                np.stack(spike_history[p.name], axis=1) if p.spiking else None,
                np.stack(membrane_history[p.name], axis=1) if fits_record else None,
            )
            for p in network.populations
        },
    )


def decay(state: Int64Array, share: int) -> Int64Array:
    """What is left of a state after one step: the product over 4096, truncated towards zero."""
    product = state * (DECAY_UNITY - share)
    result: Int64Array = np.sign(product) * (np.abs(product) // DECAY_UNITY)
    return result


def propagate(synapse: Synapse, activity: Int64Array) -> Int64Array:
    """Weighted sums of ``activity`` ``(samples, *source_shape)`` -> ``(samples, *target_shape)``."""
    weight = synapse.weight.astype(np.int64)
    if synapse.kind == "dense":
        return activity.reshape(len(activity), weight.shape[1]) @ weight.T
    pad = synapse.padding
    padded = np.pad(activity, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(2, 3))
    windows = windows[:, :, :: synapse.stride, :: synapse.stride]
    sums: Int64Array = np.einsum("nchwij,ocij->nohw", windows, weight)
    return sums
