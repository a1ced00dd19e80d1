"""Reads ``model.cuba.nir`` with snnTorch's own importer and runs it: an independent reader of the file.

:func:`run_snntorch` is for callers; ``python -m exporters.conformance.snntorch_reader JOB`` is the process it
starts, in which nothing of this project but this file touches the network. snnTorch keeps images unbatched
here (a NIR ``Flatten(0, -1)`` would flatten the batch too), so samples run one by one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.errors import SpikeguardError
from hardware.files import read_arrays, read_json, write_arrays, write_json
from hardware.formats.network_file import describe_network
from hardware.formats.nir_layout import lay_out
from hardware.network import FRACTION_BITS, IntArray, IntegerNetwork
from hardware.runtimes.supervisor import run_supervised
from hardware.trace import PopulationTrace, Trace

NAME = "snntorch"
JOB_FILE = "job.json"
INPUT_FILE = "input.npz"
RESULT_FILE = "result.npz"
START_SECONDS = 120.0
SAMPLE_STEP_SECONDS = 2.0
PROJECT = Path(__file__).resolve().parents[2]


def run_snntorch(path: Path, network: IntegerNetwork, codes: IntArray) -> Trace:
    """Run a NIR file of profile "cuba" in snnTorch, in a process of its own with a deadline.

    Args:
        path: of the NIR file; all arithmetic comes from it.
        network: tells how to present the input, how many steps to run and which node is which population.
        codes: ``(samples, *shape)`` or ``(samples, steps, *shape)``.

    Returns:
        Readouts, and of every spiking population spikes and membranes. snnTorch has no readout neuron.

    Raises:
        SpikeguardError: if snnTorch cannot read or run the file, or gives values that are not integers.
    """
    presented = network.input.present(codes)
    nodes = lay_out(describe_network(network)).populations
    with tempfile.TemporaryDirectory(prefix="spikeguard-snntorch-") as folder:
        job = Path(folder)
        write_json(job / JOB_FILE, {"model": str(path.resolve()), "steps": network.steps, "nodes": nodes})
        timed = codes.ndim == len(network.input.shape) + 2
        write_arrays(job / INPUT_FILE, {"timed" if timed else "image": presented})
        run_supervised(
            [sys.executable, "-P", "-m", "exporters.conformance.snntorch_reader", str(job)],
            subject="snnTorch",
            time_limit=START_SECONDS + SAMPLE_STEP_SECONDS * len(codes) * network.steps,
            remedy="check that snntorch and nirtorch are installed and that the file has profile cuba",
            environment={"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        )
        arrays = read_arrays(job / RESULT_FILE)
    populations = {
        name: PopulationTrace(
            arrays[f"spikes.{name}"].astype(bool),
            _exact(arrays[f"membranes.{name}"] * 2**FRACTION_BITS, name).astype(np.int32),
        )
        for name in nodes
    }
    return Trace(_exact(arrays["readouts"], "readouts"), populations)


def _exact(values: NDArray[Any], name: str) -> NDArray[np.int64]:
    """Floats that must be integers, as integers."""
    if not (np.isfinite(values).all() and np.array_equal(values, np.rint(values))):
        raise SpikeguardError(f"snnTorch gave values of {name} that are no integers; the export is not exact")
    return values.astype(np.int64)


def _read_and_run(job: Path) -> None:
    """The process: reads the job folder, runs the file in snnTorch, writes the result."""
    import nir
    import torch
    from snntorch.import_nir import import_from_nir

    torch.set_num_threads(1)
    request = read_json(job / JOB_FILE)
    (kind, codes), *_ = read_arrays(job / INPUT_FILE).items()
    model = import_from_nir(nir.read(request["model"]))
    neurons = {name: model.get_submodule(node) for name, node in request["nodes"].items()}
    spikes: dict[str, list[NDArray[Any]]] = {name: [] for name in neurons}
    membranes: dict[str, list[NDArray[Any]]] = {name: [] for name in neurons}
    for name, neuron in neurons.items():
        neuron.register_forward_hook(
            lambda _module, _inputs, output, name=name: spikes[name].append(output.numpy().ravel().copy())
        )
    readouts = []
    with torch.no_grad():
        for sample in codes:
            for neuron in neurons.values():
                neuron.reset_mem()
            readouts.append(0.0)
            for step in range(request["steps"]):
                image = torch.from_numpy((sample[step] if kind == "timed" else sample).astype(np.float32))
                # Several synapses into the output come back one by one, the state last.
                *outputs, _state = model(image)
                readouts[-1] = readouts[-1] + sum(output.double().numpy().ravel() for output in outputs)
                for name, neuron in neurons.items():
                    membranes[name].append(neuron.mem.double().numpy().ravel().copy())
    axes = (len(codes), request["steps"], -1)
    result: dict[str, NDArray[Any]] = {"readouts": np.array(readouts)}
    result |= {f"spikes.{name}": np.array(values).reshape(axes) for name, values in spikes.items()}
    result |= {f"membranes.{name}": np.array(values).reshape(axes) for name, values in membranes.items()}
    write_arrays(job / RESULT_FILE, result)


if __name__ == "__main__":
    _read_and_run(Path(sys.argv[1]))
