"""Runs an exported NIR file in another framework: what its independent readers have in common.

:meth:`NirReader.run` is for callers. It starts a process in which the framework's own importer reads the file and
the framework's own neurons run it; :func:`read_and_run` is what that process does. The framework sees the file and
the images, and nothing else of this project: no weight, threshold or shape reaches it another way.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hardware.errors import Missing, RuleViolations, SpikeguardError, Violation
from hardware.files import read_arrays, read_json, write_arrays, write_json
from hardware.formats.hdf5_guard import require_plain_hdf5
from hardware.formats.network_file import describe_network
from hardware.formats.nir_layout import lay_out
from hardware.network import FRACTION_BITS, IntArray, IntegerNetwork, Shape
from hardware.runtimes.supervisor import run_supervised
from hardware.trace import PopulationTrace, Trace

JOB_FILE = "job.json"
INPUT_FILE = "input.npz"
RESULT_FILE = "result.npz"
REFUSAL_FILE = "refusal.json"
START_SECONDS = 120.0
SAMPLE_STEP_SECONDS = 2.0
PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class NirReader:
    """A framework that reads NIR files.

    Attributes:
        name: of the framework and of its Python package.
        module: of this package; ``python -m module JOB`` is the process that reads and runs.
    """

    name: str
    module: str

    @property
    def version(self) -> str:
        """Of the framework.

        Raises:
            Missing: if it is not in this environment.
        """
        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError as error:
            raise Missing(f"{self.name} is not installed; run `make setup`") from error

    def run(self, path: Path, network: IntegerNetwork, codes: IntArray) -> Trace:
        """Run a NIR file in a fresh process with a hash seed of its own and a deadline.

        Args:
            path: of the NIR file; all arithmetic comes from it.
            network: tells how to present the input, how many steps to run, and which node is which population.
            codes: ``(samples, *shape)`` or ``(samples, steps, *shape)``.

        Returns:
            Readouts, and of every spiking population spikes and, unless it leaks, membranes. NIR has no readout neuron.

        Raises:
            Missing: if the framework is not.
            RuleViolations: if the framework would not compute what the file says.
            SpikeguardError: if it cannot read or run the file, or gives values of another shape or no integers.
        """
        version = self.version
        require_plain_hdf5(path)
        if network.readout.is_leaky:
            rule, remedy = "importer knows every node", "read it with our own interpreter"
            row = Violation(network.readout.name, rule, "CubaLI", "no CubaLI", remedy)
            raise RuleViolations(f"{self.name} {version}", [row])
        presented = network.input.present(codes)
        nodes = lay_out(describe_network(network)).populations
        with tempfile.TemporaryDirectory(prefix=f"spikeguard-{self.name}-") as folder:
            job = Path(folder)
            write_json(job / JOB_FILE, {"model": str(path.resolve()), "steps": network.steps, "nodes": nodes})
            timed = codes.ndim == len(network.input.shape) + 2
            write_arrays(job / INPUT_FILE, {"timed" if timed else "image": presented})
            run_supervised(
                [sys.executable, "-P", "-m", self.module, str(job)],
                subject=self.name,
                time_limit=START_SECONDS + SAMPLE_STEP_SECONDS * len(codes) * network.steps,
                remedy=f"check that {self.name} {version} reads this profile of NIR",
                # Sets of names are ordered by hashes: what hangs on their order has to show.
                environment={"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"},
            )
            if (job / REFUSAL_FILE).exists():
                rows = [Violation(**row) for row in read_json(job / REFUSAL_FILE)]
                raise RuleViolations(f"{self.name} {version}", rows)
            return read_result(self.name, network, read_arrays(job / RESULT_FILE))


def read_result(subject: str, network: IntegerNetwork, arrays: Mapping[str, NDArray[Any]]) -> Trace:
    """The trace that a framework left in a result file: floats ``(samples, steps, *shape)`` of every population.

    Raises:
        SpikeguardError: naming ``subject``, if values have another shape than their population or are no integers.
    """

    def integers(name: str, shape: Shape) -> NDArray[np.int64]:
        values = arrays[name]
        if values.shape[2:] != shape:
            raise SpikeguardError(f"{subject} gave {name} of shape {values.shape[2:]}, the network has {shape}")
        if not (np.isfinite(values).all() and np.array_equal(values, np.rint(values))):
            raise SpikeguardError(f"{subject} gave values of {name} that are no integers; the export is not exact")
        return values.astype(np.int64)

    populations = {}
    for population in network.populations:
        if population.spiking:
            spikes = integers(f"spikes.{population.name}", population.shape)
            if not np.isin(spikes, (0, 1)).all():
                raise SpikeguardError(f"{subject} gave spikes of {population.name} that are neither 0 nor 1")
            axes = (*spikes.shape[:2], population.size)
            membranes: NDArray[np.int32] | None = None
            if not population.is_leaky:  # or else they are no integers
                whole = integers(f"membranes.{population.name}", population.shape) << FRACTION_BITS
                membranes = whole.reshape(axes).astype(np.int32)
            populations[population.name] = PopulationTrace(spikes.reshape(axes) != 0, membranes)
    sums = integers("readouts", network.readout.shape)
    return Trace(sums.sum(axis=1).reshape(len(sums), network.classes), populations)


class Activity(NamedTuple):
    """What one step of one sample left behind, as floats, each of its population's shape.

    Attributes:
        outputs: of every synapse into the readout, or their sum.
        spikes, membranes: by node of a population; membranes after reset.
    """

    outputs: list[NDArray[Any]]
    spikes: Mapping[str, NDArray[Any]]
    membranes: Mapping[str, NDArray[Any]]


class Simulation(Protocol):
    """A NIR graph in a framework."""

    def restart(self) -> None:
        """Forget everything: the next step is a sample's first."""
        ...

    def step(self, image: Any) -> Activity:
        """Run one step on a float32 tensor of the input's shape."""
        ...


def read_and_run(job: Path, load: Callable[[Any, list[str]], Simulation]) -> None:
    """The process: reads the job folder, runs the file in the framework, writes the result or the refusal.

    Args:
        job: folder with the request.
        load: makes a simulation of a ``nir.NIRGraph`` and the names of its populations' nodes; it raises
            ``RuleViolations`` if the framework would not compute what the graph says.
    """
    import nir
    import torch

    torch.set_num_threads(1)
    request = read_json(job / JOB_FILE)
    nodes: dict[str, str] = request["nodes"]
    (kind, codes), *_ = read_arrays(job / INPUT_FILE).items()
    try:
        simulation = load(nir.read(request["model"]), list(nodes.values()))
    except RuleViolations as refusal:
        write_json(job / REFUSAL_FILE, [asdict(row) for row in refusal.violations])
        return
    history: dict[str, list[NDArray[Any]]] = {}
    with torch.no_grad():
        for sample in codes:
            simulation.restart()
            for step in range(request["steps"]):
                image = torch.from_numpy((sample[step] if kind == "timed" else sample).astype(np.float32))
                activity = simulation.step(image)
                history.setdefault("readouts", []).append(np.stack(activity.outputs).sum(axis=0, dtype=np.float64))
                for name, node in nodes.items():
                    history.setdefault(f"spikes.{name}", []).append(activity.spikes[node])
                    history.setdefault(f"membranes.{name}", []).append(activity.membranes[node])
    axes = (len(codes), request["steps"])
    write_arrays(job / RESULT_FILE, {key: np.stack(v).reshape(*axes, *v[0].shape) for key, v in history.items()})
