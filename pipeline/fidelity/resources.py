"""What a deployed network takes and does, as rows of a report: memory and cores, spikes, operations, energy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.network import IntegerNetwork
from hardware.targets.energy import count_operations, estimate_energy
from hardware.targets.loihi2 import LOIHI2
from hardware.targets.rules import count_activity, placement
from hardware.trace import Trace


def placement_row(network: IntegerNetwork) -> dict[str, Any]:
    """Memory and cores on Loihi 2, in all and by population."""
    placed = placement(network, LOIHI2)
    return {
        "target": placed.target,
        "neurons": placed.neurons,
        "synapses": placed.connections,
        "weight_bytes": placed.weight_bytes,
        "memory_bytes": placed.memory_bytes,
        "minimum_cores": placed.minimum_cores,
        "minimum_chips": placed.minimum_chips,
        "populations": [
            {
                "name": row.population,
                "neurons": row.neurons,
                "synapses": row.connections,
                "fan_in": row.fan_in,
                "fan_out": row.fan_out,
                "axons_in": row.axons_in,
                "axons_out": row.axons_out,
                "weight_bytes": row.weight_bytes,
                "state_bytes": row.state_bytes,
                "minimum_cores": row.minimum_cores,
            }
            for row in placed.populations
        ],
    }


def energy_row(network: IntegerNetwork, sample: NDArray[np.uint8], trace: Trace) -> dict[str, Any]:
    """Spikes, operations and estimated energy of one image.

    Args:
        network: that left the trace.
        sample: the clean images of the trace.
        trace: with the spikes of every spiking population.
    """
    activity = count_activity(network, trace)
    operations = count_operations(network, sample, trace)
    return {
        "spikes_per_image": activity.spikes_per_image,
        "synaptic_operations_per_image": activity.synaptic_operations_per_image,
        "input_operations_per_image": operations.input,
        "neuron_updates_per_image": operations.updates,
        "estimates": [
            {"name": row.name, "least_nj": row.nanojoules[0], "most_nj": row.nanojoules[1], "source": row.source}
            for row in estimate_energy(operations)
        ],
        "note": f"spikes and operations are counted on {len(sample)} clean images; energies are estimates from "
        "published costs per operation, not measurements",
    }
