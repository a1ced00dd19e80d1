"""SpikingJelly as an independent reader of NIR: its own importer and its own neurons, in batches of one image."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from exporters.conformance.nir_reader import Activity, NirReader, read_and_run
from hardware.formats.nir_layout import STEP_SECONDS

SPIKINGJELLY = NirReader("spikingjelly", "exporters.conformance.spikingjelly_reader")


class SpikingjellySimulation:
    """A graph in SpikingJelly, whose state is handed from step to step."""

    def __init__(self, graph: Any, nodes: list[str]) -> None:
        import nir
        from spikingjelly.activation_based.nir_exchange import import_from_nir

        # It takes an IF for one step's Euler integration, and so demands r = 1 / dt of it; profile "if" has r = 1.
        integrates = any(isinstance(node, nir.IF) for node in graph.nodes.values())
        self._model = import_from_nir(graph, dt=1.0 if integrates else STEP_SECONDS)
        self._neurons = {node: self._model.get_submodule(node) for node in nodes}
        self._state: Any = None
        self._spikes: dict[str, Any] = {}
        for node, neuron in self._neurons.items():
            neuron.register_forward_hook(
                lambda _module, _inputs, output, node=node: self._spikes.update({node: output[0][0].numpy()})
            )

    def restart(self) -> None:
        """Forget everything."""
        self._state = None

    def step(self, image: Any) -> Activity:
        """Run one step; several synapses into the output come back one by one, the state last."""
        *outputs, self._state = self._model(image[None], self._state)
        membranes = {}
        for node, neuron in self._neurons.items():
            names = [name for name, _ in neuron.module.named_memories()]
            membranes[node] = self._state[node][names.index("v")][0].numpy()
        return Activity([output[0].numpy() for output in outputs], dict(self._spikes), membranes)


if __name__ == "__main__":
    read_and_run(Path(sys.argv[1]), SpikingjellySimulation)
