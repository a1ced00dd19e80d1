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
from processes.observed import LAYER, MODELS
from processes.present import Present


def run_job(folder: Path) -> None:
    """Build the network, run one step, check what Lava holds, run the rest, write the result."""
    _fail_as_a_whole()
    job = json.loads((folder / "job.json").read_text())
    with np.load(folder / "job.npz", allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    presenter, layers, steps = _assemble(job, arrays)
    presenter.run(RunSteps(1), Loihi2SimCfg(select_tag="fixed_pt", exception_proc_model_map=MODELS))
    problems = [line for index, layer in enumerate(layers) for line in _differences(index, layer)]
    if problems:
        raise ValueError("Lava does not hold the intended parameters: " + "; ".join(problems))
    stepping = time.perf_counter()
    presenter.run(RunSteps(steps - 1))
    _write_result(folder, time.perf_counter() - stepping)


def _assemble(job: dict[str, Any], arrays: dict[str, Any]) -> tuple[Present, list[engines.Layer], int]:
    """Build the network and what presents the samples to it, and set up the records.

    Returns:
        (presenting process, layers, steps to run)
    """
    inlet, layers = engines.ENGINES[job["engine"]](job, arrays)
    presenter = Present(frames=arrays["frames"], hold=job["hold"])
    presenter.s_out.connect(inlet)
    # What is presented in one step reaches layer l, counted from 1, l steps later.
    steps = len(arrays["frames"]) * job["hold"] + len(layers)
    for layer in layers:
        recorded = job["record"] == "traces" or layer is layers[-1]
        number = recording.add_layer(layer.weight.shape, layer.neuron.s_out.shape, steps, recorded)
        layer.synapse.proc_params[LAYER] = number
        layer.neuron.proc_params[LAYER] = number
    return presenter, layers, steps


def _differences(index: int, layer: engines.Layer) -> Iterator[str]:
    """Where the parameters that Lava's processes hold are not the intended ones."""
    record = recording.LAYERS[index]
    # A negative exponent makes Lava shift its sums to the right. Powers of two keep these floats exact.
    held_weight = record.weight * 2.0 ** int(record.weight_exponent[0])
    pairs = {
        "weights": (held_weight, layer.weight),
        "biases": (record.bias, layer.bias.astype(np.int64) * engines.STATE_UNIT),
        "thresholds": (record.threshold, np.array([layer.threshold * engines.STATE_UNIT])),
        "decays": (record.decays, np.array(layer.decays)),
    }
    for what, (held, meant) in pairs.items():
        wrong = np.argwhere(held != meant)
        if len(wrong):
            at = tuple(int(i) for i in wrong[0])
            yield (
                f"{len(wrong)} of {held.size} {what} of {layer.name} differ, "
                f"the first is {held[at]:.10g} instead of {meant[at]:.10g} at {at}"
            )


def _write_result(folder: Path, seconds: float) -> None:
    """Write result.npz under another name, then move it into place."""
    arrays = {"stepping_seconds": np.array(seconds)}
    for index, record in enumerate(recording.LAYERS):
        if record.spikes is not None and record.membranes is not None:
            arrays[f"spikes.{index}"] = record.spikes
            arrays[f"membranes.{index}"] = record.membranes
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
            traceback.print_exc()
            sys.stderr.flush()
            os.kill(worker, signal.SIGKILL)
            raise

    lava_runtime.target_fn = reporting_target
