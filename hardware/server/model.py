"""A bundle on a runtime, verified and ready to answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.errors import SpikeguardError
from hardware.formats.bundle import Bundle, open_bundle
from hardware.network import IntegerNetwork
from hardware.runtimes.opening import open_runtime
from hardware.runtimes.protocol import Runtime
from hardware.server.batching import Answer
from hardware.server.protocol import CLASS, IMAGE, LOGITS, READOUT, SPIKES
from hardware.server.tensors import InputForm
from hardware.trace import PopulationTrace, Trace, compare_traces

TRACE_BYTES = 2**25
"""Of the membranes that are held at once while spikes are counted."""


@dataclass(frozen=True)
class ServedModel:
    """What answers requests; make it with :func:`verified`.

    Attributes:
        form: of the inputs, as in the golden ones.
        spiking: names of the populations whose spikes the runtime exposes; empty if it does not.
    """

    network: IntegerNetwork
    runtime: Runtime
    form: InputForm
    spiking: tuple[str, ...]

    def run(self, codes: NDArray[np.uint8], counts_spikes: bool) -> Answer:
        """Answer codes ``(samples, [steps,] *shape)``; spikes are counted if they are wanted and exposed.

        Raises:
            SpikeguardError: if the runtime did not finish.
        """
        if not (counts_spikes and self.spiking):
            return Answer(self.runtime.run(codes).readouts)
        per_sample = 4 * self.network.steps * sum(population.size for population in self.network.populations)
        block = max(1, TRACE_BYTES // per_sample)
        traces = [self._counted(codes[first : first + block]) for first in range(0, len(codes), block)]
        return Answer(*(np.concatenate(parts) for parts in zip(*traces, strict=True)))

    def outputs(self, answer: Answer) -> dict[str, NDArray[Any]]:
        """Arrays by output name."""
        readouts = answer.readouts
        found = {READOUT: readouts, CLASS: readouts.argmax(1), LOGITS: self.network.logits(readouts)}
        return found if answer.spikes is None else {**found, SPIKES: answer.spikes}

    def metadata(self, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The protocol's description of the model.

        Args:
            name: of the model.
            parameters: further facts, plain values by name.
        """
        network = self.network
        outputs: list[dict[str, Any]] = [
            {"name": READOUT, "datatype": "INT64", "shape": [-1, network.classes]},
            {"name": CLASS, "datatype": "INT64", "shape": [-1]},
            {"name": LOGITS, "datatype": "FP64", "shape": [-1, network.classes]},
        ]
        if self.spiking:
            columns = {"populations": ", ".join(self.spiking)}
            outputs.append(
                {"name": SPIKES, "datatype": "INT64", "shape": [-1, len(self.spiking)], "parameters": columns}
            )
        return {
            "name": name,
            "versions": [],
            "platform": f"spikeguard_{self.runtime.name}",
            "inputs": [
                {
                    "name": IMAGE,
                    "datatype": "UINT8",
                    "shape": [-1, *self.form.shape],
                    "parameters": {"max_code": self.form.max_code, "also": "FP32, FP64 in [0, 1]"},
                }
            ],
            "outputs": outputs,
            "parameters": dict(parameters),
        }

    def _counted(self, codes: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        trace = self.runtime.run(codes, record="traces")
        counts = [_count(trace.populations[name]) for name in self.spiking]
        return trace.readouts, np.stack(counts, axis=1)


def load_verified(path: Path, runtime: str, threads: int = 1) -> ServedModel:
    """Open a bundle on a runtime, by name, and verify both.

    Raises:
        SpikeguardError: if a file is not what the manifest says, the runtime cannot be opened, or :func:`verified`
            refuses it.
    """
    bundle = open_bundle(path)
    return verified(bundle, open_runtime(runtime, bundle, threads))


def verified(bundle: Bundle, runtime: Runtime) -> ServedModel:
    """Run the golden inputs, and compare all that the runtime exposes, with and without traces.

    Raises:
        SpikeguardError: if there are none, or a value differs.
    """
    golden, network = bundle.golden, bundle.network
    if not golden.trace.samples:
        raise SpikeguardError(f"{bundle.path} has no golden traces to verify {runtime.name} with; export it again")
    traced = runtime.run(golden.codes, record="traces")
    found = compare_traces(golden.trace, traced)
    differing = {"spikes": found.spikes, "membranes": found.membranes, "readouts": found.readouts}
    plain = compare_traces(Trace(golden.trace.readouts), runtime.run(golden.codes))
    differing["readouts"] = max(found.readouts, plain.readouts)
    if any(differing.values()):
        counts = ", ".join(f"{count:,} golden {name}" for name, count in differing.items() if count)
        raise SpikeguardError(
            f"{runtime.name} leaves {counts} of {bundle.path} otherwise than the bundle says; "
            "run 'spikeguard verify' on it and export it again"
        )
    spiking = tuple(population.name for population in network.populations if population.spiking)
    exposed = all(name in traced.populations and traced.populations[name].spike_bits is not None for name in spiking)
    form = InputForm(golden.codes.shape[1:], network.input.max_code)
    return ServedModel(network, runtime, form, spiking if exposed else ())


def _count(trace: PopulationTrace) -> NDArray[np.int64]:
    assert trace.spike_bits is not None
    counts: NDArray[np.int64] = np.bitwise_count(trace.spike_bits).sum(axis=(1, 2), dtype=np.int64)
    return counts
