"""One job: build the network on Lava, check it, run it, write down what it did."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import numpy as np
import recording
from lava.magma.core.run_conditions import RunSteps
from lava.magma.core.run_configs import Loihi2SimCfg
from lava.magma.runtime import runtime as lava_runtime
from processes.observed import MODELS, RECORD
from processes.present import Present


def run_job(folder: Path) -> None:
    """Build the network, run one step, check what Lava holds, run the rest, write the result."""
    _fail_as_a_whole()
    job = json.loads((folder / "job.json").read_text())
    with np.load(folder / "job.npz", allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    presenter, layers, steps = _assemble(job, arrays)
    presenter.run(RunSteps(1), Loihi2SimCfg(select_tag="fixed_pt", exception_proc_model_map=MODELS))
    problems = [line for layer in layers for line in _differences(layer)]
    if problems:
        raise ValueError("Lava does not hold the intended parameters: " + "; ".join(problems))
    stepping = time.perf_counter()
    presenter.run(RunSteps(steps - 1))
    _write_result(folder, layers, time.perf_counter() - stepping)


def _assemble(job: dict[str, Any], arrays: dict[str, Any]) -> tuple[Present, list[engines.Layer], int]:
    """Build the network and what presents the samples to it, and set up the records.

    Returns:
        (one of the presenting processes, layers, steps to run)
    """
    frames, hold = arrays["frames"], job["hold"]
    inlets, layers = engines.ENGINES[job["engine"]](job, arrays)
    presenters = {lag: Present(frames=frames, hold=hold, lag=lag) for lag in {lag for lag, _ in inlets}}
    for lag, inlet in inlets:
        engines.connect(presenters[lag].s_out, inlet)
    steps = len(frames) * hold + max(layer.depth for layer in layers)
    for layer in layers:
        for synapse in layer.synapses:
            synapse.process.proc_params[RECORD] = recording.add_synapse(synapse.weight.shape)
        recorded = layer.index is not None and (job["record"] == "traces" or layer.index == len(job["layers"]) - 1)
        number = recording.add_neuron(layer.neuron.s_out.shape, steps, recorded)
        layer.neuron.proc_params[RECORD] = number
    return presenters[0], layers, steps


def _differences(layer: engines.Layer) -> Iterator[str]:
    """Where the parameters that a layer's processes hold are not the intended ones."""
    for synapse in layer.synapses:
        held = recording.SYNAPSES[synapse.process.proc_params[RECORD]]
        # A negative exponent makes Lava shift its sums to the right. Powers of two keep these floats exact.
        weight = held.weight * 2.0 ** int(held.weight_exponent[0])
        yield from _different("weights", synapse.name, weight, synapse.weight)
    record = recording.NEURONS[layer.neuron.proc_params[RECORD]]
    yield from _different("biases", layer.name, record.bias, layer.bias.astype(np.int64) * engines.STATE_UNIT)
    threshold = np.array([layer.threshold * engines.STATE_UNIT])
    yield from _different("thresholds", layer.name, record.threshold, threshold)
    yield from _different("decays", layer.name, record.decays, np.array(layer.decays))


def _different(what: str, name: str, held: Any, meant: Any) -> Iterator[str]:
    wrong = np.argwhere(held != meant)
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        yield (
            f"{len(wrong)} of {held.size} {what} of {name} differ, "
            f"the first is {held[at]:.10g} instead of {meant[at]:.10g} at {at}"
        )


def _write_result(folder: Path, layers: list[engines.Layer], seconds: float) -> None:
    """Write result.npz under another name, then move it into place."""
    arrays = {"stepping_seconds": np.array(seconds)}
    for layer in layers:
        record = recording.NEURONS[layer.neuron.proc_params[RECORD]]
        if record.spikes is not None and record.membranes is not None:
            arrays[f"spikes.{layer.index}"] = record.spikes
            arrays[f"membranes.{layer.index}"] = record.membranes
    partial = folder / "partial.npz"
    np.savez(partial, **arrays)
    partial.replace(folder / "result.npz")


def _fail_as_a_whole() -> None:
    """Let an exception in any Lava process end the run; Lava would log it away and wait for ever."""
    worker, target = os.getpid(), lava_runtime.target_fn

    def reporting_target(*args: Any, **kwargs: Any) -> None:
        try:
            target(*args, **kwargs)
        except BaseException:
            try:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os.kill(worker, signal.SIGKILL)
            raise

    lava_runtime.target_fn = reporting_target
