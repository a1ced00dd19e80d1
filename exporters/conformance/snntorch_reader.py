"""snnTorch as an independent reader of NIR: its own importer and its own neurons.

Images stay unbatched, because its ``Flatten(0, -1)`` would flatten a batch too. It turns an ``IF`` into a neuron
that leaks, so it reads profile "cuba" only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from exporters.conformance.nir_reader import Activity, NirReader, read_and_run

SNNTORCH = NirReader("snntorch", "exporters.conformance.snntorch_reader")


class SnntorchSimulation:
    """A graph in snnTorch, whose neurons keep their own state."""

    def __init__(self, graph: Any, nodes: list[str]) -> None:
        from snntorch.import_nir import import_from_nir

        self._model = import_from_nir(graph)
        self._neurons = {node: self._model.get_submodule(node) for node in nodes}
        self._spikes: dict[str, Any] = {}
        for node, neuron in self._neurons.items():
            neuron.register_forward_hook(
                lambda _module, _inputs, output, node=node: self._spikes.update({node: output.numpy().copy()})
            )

    def restart(self) -> None:
        """Forget everything."""
        for neuron in self._neurons.values():
            neuron.reset_mem()

    def step(self, image: Any) -> Activity:
        """Run one step; several synapses into the output come back one by one, the state last."""
        *outputs, _state = self._model(image)
        membranes = {node: neuron.mem.numpy().copy() for node, neuron in self._neurons.items()}
        return Activity([output.numpy() for output in outputs], dict(self._spikes), membranes)


if __name__ == "__main__":
    read_and_run(Path(sys.argv[1]), SnntorchSimulation)
