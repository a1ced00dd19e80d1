"""Networks on Intel's Lava, in fixed point: as stock processes, or loaded from a netx file.

Lava lives in a Python environment of its own. Each run is one supervised process there, spoken to through
files.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import hardware
from hardware.errors import Missing, SpikeguardError
from hardware.files import read_arrays, write_arrays, write_json
from hardware.formats.hdf5_guard import require_plain_hdf5
from hardware.network import IntArray, IntegerNetwork
from hardware.runtimes.lava_job import Arrays, Engine, depths, describe_input, describe_network, read_records
from hardware.runtimes.supervisor import SHARED_MEMORY, run_supervised
from hardware.targets.lava import LAVA, NETX
from hardware.targets.rules import require
from hardware.trace import Record, Trace

PYTHON_VARIABLE = "SPIKEGUARD_LAVA_PYTHON"
WORKER = Path(__file__).parent / "lava_worker" / "worker.py"
SETUP_REMEDY = f"run `make setup`, or set {PYTHON_VARIABLE} to the Python of an environment with lava-nc and lava-dl"

# Time limits are generous multiples of what was measured: about a millisecond per process and step, and tens
# of nanoseconds per synaptic operation of the simulator's convolution.
STARTUP_LIMIT_SECONDS = 120.0
SECONDS_PER_PROCESS_STEP = 0.01
SECONDS_PER_OPERATION = 2e-7

# What does the arithmetic of each engine, and so belongs to its version.
PACKAGES: dict[Engine, tuple[str, ...]] = {"processes": ("lava-nc",), "netx": ("lava-dl", "lava-nc")}
_VERSIONS_PROGRAM = (
    "import importlib.metadata, json; "
    "print(json.dumps({name: importlib.metadata.version(name) for name in ('lava-nc', 'lava-dl')}))"
)


@dataclass(frozen=True)
class RunTimes:
    """Seconds a run took: ``stepping`` in Lava's time steps, ``startup`` in everything around them."""

    startup: float
    stepping: float


def locate_lava_python() -> Path:
    """The interpreter of the Lava environment.

    Raises:
        Missing: if there is none.
    """
    named = os.environ.get(PYTHON_VARIABLE)
    path = Path(named) if named else Path(hardware.__file__).parent.parent / ".venv-lava" / "bin" / "python"
    if not path.is_file():
        raise Missing(f"there is no Lava environment at {path}; {SETUP_REMEDY}")
    return path


@functools.cache
def lava_versions(python: Path) -> dict[str, str]:
    """Versions of lava-nc and lava-dl in an environment.

    Raises:
        SpikeguardError: if they are not installed there.
    """
    printed = run_supervised(
        [str(python), "-c", _VERSIONS_PROGRAM],
        subject=f"asking {python} for its Lava versions",
        time_limit=STARTUP_LIMIT_SECONDS,
        remedy=SETUP_REMEDY,
    )
    versions: dict[str, str] = json.loads(printed.strip().splitlines()[-1])
    return versions


class _Lava:
    """What both runtimes share: one supervised worker per run."""

    name: str

    def __init__(self, network: IntegerNetwork, engine: Engine, python: Path | None, time_limit: float | None) -> None:
        self.network = network
        self.python = python or locate_lava_python()
        self.time_limit = time_limit
        self.last_run: RunTimes | None = None
        self.version = ", ".join(f"{name} {lava_versions(self.python)[name]}" for name in PACKAGES[engine])
        self._facts, self._arrays = describe_network(network, engine)

    def run(self, inputs: IntArray, record: Record = "readouts") -> Trace:
        """Run samples back to back; see :class:`~hardware.runtimes.protocol.Runtime`.

        Raises:
            RuleViolations: if the inputs are not this network's.
            SpikeguardError: if Lava fails, does not end in time, or holds other parameters than intended.
        """
        begun = time.perf_counter()
        about_input, frames = describe_input(self.network, inputs)
        samples = len(inputs)
        if not samples:
            raise SpikeguardError("there is nothing to run; bring at least one sample")
        facts = {**self._facts, **about_input, "record": record}
        try:
            with tempfile.TemporaryDirectory(prefix="lava-") as folder:
                records = self._work(Path(folder), facts, {**self._arrays, **frames}, samples)
        except OSError as error:
            place = tempfile.gettempdir()
            raise SpikeguardError(
                f"the job for the Lava worker ({self.name}) cannot be written to {place} ({error}); "
                "make room there, or set TMPDIR to a folder with room"
            ) from error
        trace = read_records(self.network, samples, records, record)
        stepping = float(records["stepping_seconds"])
        self.last_run = RunTimes(time.perf_counter() - begun - stepping, stepping)
        return trace

    def _work(self, folder: Path, facts: dict[str, Any], arrays: Arrays, samples: int) -> Arrays:
        write_json(folder / "job.json", facts)
        write_arrays(folder / "job.npz", arrays)
        run_supervised(
            [str(self.python), str(WORKER), str(folder)],
            subject=f"the Lava worker ({self.name})",
            time_limit=self.time_limit or default_time_limit(self.network, samples),
            remedy=f"if memory, {SHARED_MEMORY} or {tempfile.gettempdir()} is full, make room; "
            "else check the bundle with `spikeguard verify`, or set Lava up again with `make setup`",
            # Lava's shared-memory manager puts a socket into the temporary directory.
            environment={
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": "",
                "PYTHONWARNINGS": "ignore",
                "TMPDIR": str(folder),
            },
        )
        return read_arrays(folder / "result.npz")


class LavaRuntime(_Lava):
    """Stock Conv, Dense and LIFReset processes, built from an integer network.

    Args:
        network: as read from a bundle. Where branches of unequal length meet, the short one passes relays.
        python: interpreter of the Lava environment; None looks for it.
        time_limit: seconds for one run; None derives it from the work.

    Attributes:
        version: for example "lava-nc 0.10.0".
        last_run: how long the last run took.

    Raises:
        RuleViolations: everything about the network that stock Lava cannot do exactly.
        SpikeguardError: if there is no Lava environment.
    """

    name = "lava"

    def __init__(self, network: IntegerNetwork, *, python: Path | None = None, time_limit: float | None = None) -> None:
        require(network, LAVA, "Lava processes")
        super().__init__(network, "processes", python, time_limit)


class NetxRuntime(_Lava):
    """A model.net loaded by lava-dl's netx.

    Args:
        path: the file; every weight, bias and threshold comes from it.
        network: what the file is said to hold. Input, steps, names and shapes are taken from here.
        python, time_limit: as for :class:`LavaRuntime`.

    Raises:
        RuleViolations: everything about the network that netx cannot do exactly.
        SpikeguardError: if the file is missing or not plain HDF5, or there is no Lava environment.
    """

    name = "netx"

    def __init__(
        self,
        path: Path,
        network: IntegerNetwork,
        *,
        python: Path | None = None,
        time_limit: float | None = None,
    ) -> None:
        require(network, NETX, "lava-dl netx")
        require_plain_hdf5(path)
        super().__init__(network, "netx", python, time_limit)
        self._facts["net"] = str(path.resolve())


def default_time_limit(network: IntegerNetwork, samples: int) -> float:
    """Seconds that a run of ``samples`` certainly ends within, on one slow core."""
    operations = sum(
        synapse.weight.size * int(np.prod(network.by_name[synapse.target].shape[1:], dtype=np.int64))
        for synapse in network.synapses
    )
    depth_of = depths(network)
    deepest = max(depth_of.values())
    # For every synapse its own process, a neuron process and at most the relays that hold back its source.
    processes = sum(2 + 2 * (depth_of[s.target] - depth_of[s.source]) for s in network.synapses)
    steps = samples * network.steps + deepest
    return STARTUP_LIMIT_SECONDS + steps * (processes * SECONDS_PER_PROCESS_STEP + operations * SECONDS_PER_OPERATION)
