"""The fast emulator as a runtime."""

from __future__ import annotations

from hardware.emulator import Emulator
from hardware.network import SEMANTICS_VERSION, IntArray, IntegerNetwork
from hardware.trace import Record, Trace


class EmulatorRuntime:
    """Runs a network with the reference's arithmetic, batched and fast; everything is exposed.

    Args:
        network: what to run.
        threads: blocks of samples that run at the same time.
    """

    name = "emulator"
    version = SEMANTICS_VERSION

    def __init__(self, network: IntegerNetwork, threads: int = 1) -> None:
        self._emulator, self._threads = Emulator(network), threads

    def run(self, inputs: IntArray, record: Record = "readouts") -> Trace:
        """Run ``(samples, *shape)`` or ``(samples, steps, *shape)`` codes."""
        return self._emulator.run(inputs, record, self._threads)
