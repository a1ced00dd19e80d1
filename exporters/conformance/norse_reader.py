"""Norse as an independent reader of NIR: its own importer and its own neurons, on unbatched images.

Norse's importer runs the nodes of a graph depth first. Where branches meet again, a node then runs before some of
what feeds it, whose value of the step before it takes instead, without a word; such graphs are refused here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from exporters.conformance.nir_reader import Activity, NirReader, read_and_run
from hardware.errors import RuleViolations, Violation
from hardware.formats.nir_layout import STEP_SECONDS

NORSE = NirReader("norse", "exporters.conformance.norse_reader")


class NorseSimulation:
    """A graph in Norse, whose state is handed from step to step."""

    def __init__(self, graph: Any, nodes: list[str]) -> None:
        from norse.torch import from_nir

        self._model = from_nir(graph, dt=STEP_SECONDS)
        require_order([node.name for node in self._model.execution_order], graph.edges)
        self._nodes = nodes
        self._state: Any = None

    def restart(self) -> None:
        """Forget everything."""
        self._state = None

    def step(self, image: Any) -> Activity:
        """Run one step; the state holds every node's output, and what its neuron keeps."""
        output, self._state = self._model(image, self._state)
        spikes = {node: self._state.cache[node].numpy() for node in self._nodes}
        membranes = {node: _membrane(self._state.state[node][0]).numpy() for node in self._nodes}
        return Activity([output.numpy()], spikes, membranes)


def require_order(order: list[str], edges: list[tuple[str, str]]) -> None:
    """Refuse an order of execution in which a node comes before one that feeds it.

    Raises:
        RuleViolations: naming every such pair.
    """
    place = {name: index for index, name in enumerate(order)}
    problems = [
        Violation(target, "what feeds a node runs before it", f"{source} after it", "before it", "use another reader")
        for source, target in edges
        if place[target] < place[source]
    ]
    if problems:
        raise RuleViolations("norse", problems)


def _membrane(state: Any) -> Any:
    """The membrane of an ``IF``; a ``CubaLIF`` keeps (synapse, membrane)."""
    return (state if hasattr(state, "v") else state[1]).v


if __name__ == "__main__":
    read_and_run(Path(sys.argv[1]), NorseSimulation)
