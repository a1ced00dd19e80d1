"""Lava's own fixed-point models, observed: all arithmetic is inherited, its outcome is noted down."""

from __future__ import annotations

from typing import Any

import recording
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol
from lava.proc.conv.models import PyConvModelFixed
from lava.proc.conv.process import Conv
from lava.proc.dense.models import PyDenseModelBitAcc
from lava.proc.dense.process import Dense
from lava.proc.lif.models import PyLifResetModelBitAcc
from lava.proc.lif.process import LIFReset

RECORD = "observed_record"


@implements(proc=LIFReset, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class ObservedLIFReset(PyLifResetModelBitAcc):
    """Notes parameters at the first step, spikes and membranes at every step."""

    def reset_voltage(self, spike_vector: Any) -> None:
        """Reset as Lava does, the last thing that happens to the membranes in a step; then note them down."""
        super().reset_voltage(spike_vector)
        record = recording.NEURONS[self.proc_params[RECORD]]
        if record.spikes is not None:
            record.spikes[self.time_step - 1] = spike_vector
            record.membranes[self.time_step - 1] = self.v
        if self.time_step == 1:
            record.bias[...] = self.effective_bias
            record.threshold[...] = self.effective_vth
            record.decays[...] = (self.du + self.ds_offset, self.dv + self.dm_offset)


@implements(proc=Conv, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class ObservedConv(PyConvModelFixed):
    """Notes the weights in use at the first step."""

    def run_spk(self) -> None:
        """Step as Lava does."""
        super().run_spk()
        if self.time_step == 1:
            recording.SYNAPSES[self.proc_params[RECORD]].weight[...] = self.weight


@implements(proc=Dense, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class ObservedDense(PyDenseModelBitAcc):
    """Notes the weights in use at the first step, after clipping and truncation."""

    def run_spk(self) -> None:
        """Step as Lava does."""
        super().run_spk()
        if self.time_step == 1:
            record = recording.SYNAPSES[self.proc_params[RECORD]]
            record.weight[...] = self.weights
            record.weight_exponent[...] = self.weight_exp


MODELS = {LIFReset: ObservedLIFReset, Conv: ObservedConv, Dense: ObservedDense}
