"""The input: codes of many samples, presented back to back."""

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.process.ports.ports import OutPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol


class Present(AbstractProcess):
    """Sends frame k of `frames` (frames, *shape) during `hold` steps each, zeros for `lag` steps before and then."""

    def __init__(self, *, frames: np.ndarray, hold: int, lag: int) -> None:
        super().__init__(frames=frames, hold=hold, lag=lag)
        self.s_out = OutPort(shape=frames.shape[1:])


@implements(proc=Present, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PresentModel(PyLoihiProcessModel):
    """Sends graded spikes."""

    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=8)

    def run_spk(self) -> None:
        """Send one step's codes."""
        frames, hold = self.proc_params["frames"], self.proc_params["hold"]
        index = (self.time_step - 1 - self.proc_params["lag"]) // hold
        self.s_out.send(frames[index] if 0 <= index < len(frames) else np.zeros_like(frames[0]))
