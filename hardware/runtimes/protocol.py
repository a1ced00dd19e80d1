"""What every runtime offers."""

from __future__ import annotations

from typing import Protocol

from hardware.network import IntArray
from hardware.trace import Record, Trace


class Runtime(Protocol):
    """Runs a network that was loaded from files.

    Attributes:
        name: as reports call it, for example "lava".
        version: of the software that does the arithmetic.
    """

    name: str
    version: str

    def run(self, inputs: IntArray, record: Record = "readouts") -> Trace:
        """Run ``(samples, *shape)`` codes, or ``(samples, steps, *shape)``.

        With ``record="traces"`` every spike and membrane the runtime exposes is kept; what it cannot expose
        is absent from the trace.

        Raises:
            SpikeguardError: if the runtime did not finish; the message says why.
        """
        ...
