"""The reference as a runtime."""

from __future__ import annotations

from hardware.network import SEMANTICS_VERSION, IntArray, IntegerNetwork
from hardware.reference import run_reference
from hardware.trace import Record, Trace


class ReferenceRuntime:
    """Runs a network by its definition: slow, and right by construction."""

    name = "reference"
    version = SEMANTICS_VERSION

    def __init__(self, network: IntegerNetwork) -> None:
        self._network = network

    def run(self, inputs: IntArray, record: Record = "readouts") -> Trace:
        """Run ``(samples, *shape)`` or ``(samples, steps, *shape)`` codes; everything is exposed."""
        return run_reference(self._network, inputs, record)
