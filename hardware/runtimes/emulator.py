"""The fast emulator as a runtime."""

from __future__ import annotations

from hardware.emulator import run_emulator
from hardware.network import SEMANTICS_VERSION, IntArray, IntegerNetwork
from hardware.trace import Record, Trace


class EmulatorRuntime:
    """Runs a network with the reference's arithmetic, batched and fast; everything is exposed."""

    name = "emulator"
    version = SEMANTICS_VERSION

    def __init__(self, network: IntegerNetwork) -> None:
        self._network = network

    def run(self, inputs: IntArray, record: Record = "readouts") -> Trace:
        """Run ``(samples, *shape)`` or ``(samples, steps, *shape)`` codes."""
        return run_emulator(self._network, inputs, record)
