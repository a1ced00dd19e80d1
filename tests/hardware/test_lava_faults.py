"""Whatever befalls a run on Lava, its caller is told, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hardware.errors import SpikeguardError
from hardware.runtimes import lava, supervisor
from hardware.runtimes.lava import LavaRuntime
from hardware.runtimes.supervisor import SHARED_MEMORY
from tests.hardware.test_lava import codes_for, conv_network
from tests.hardware.test_supervisor import PATIENCE_SECONDS, ROOT, eventually, is_running

needs_lava = pytest.mark.lava


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A temporary directory with a path short enough for the sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="sg"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def processes_of(name: str) -> list[int]:
    """Living processes whose environment has a variable of this value."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if any(entry.partition("=")[2] == name for entry in environment) and is_running(int(folder.name)):
            found.append(int(folder.name))
    return found


def nothing_is_left(name: str, scratch: Path) -> bool:
    blocks, files = [*SHARED_MEMORY.glob(f"*{name}*")], [*scratch.iterdir()]
    return not (processes_of(name) or blocks or files)


def give_name(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> str:
    """Fix the name of the next worker and where its job folder goes."""
    monkeypatch.setattr("hardware.runtimes.supervisor.secrets.token_hex", lambda _: scratch.name)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    return f"sg{scratch.name}"


@needs_lava
def test_success_leaves_nothing(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> None:
    network = conv_network(1)
    runtime = LavaRuntime(network)
    name = give_name(monkeypatch, scratch)
    runtime.run(codes_for(network, 1))
    assert nothing_is_left(name, scratch)


@needs_lava
def test_an_exception_inside_a_lava_process_is_told_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    network = conv_network(1)
    runtime = LavaRuntime(network)
    name = give_name(monkeypatch, scratch)
    # Held for no steps, the presenting process divides by zero.
    monkeypatch.setattr(lava, "describe_input", lambda *_: ({"hold": 0}, {"frames": np.zeros((1, 6, 8, 3), np.int32)}))
    with pytest.raises(SpikeguardError, match=r"ZeroDivisionError: .*make setup"):
        runtime.run(codes_for(network, 1))
    assert nothing_is_left(name, scratch)


@needs_lava
def test_a_run_that_takes_too_long_is_stopped_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    network = conv_network(8)
    runtime = LavaRuntime(network, time_limit=3.0)
    name = give_name(monkeypatch, scratch)
    with pytest.raises(SpikeguardError, match="did not finish within 3 s"):
        runtime.run(codes_for(network, 5000))
    assert nothing_is_left(name, scratch)


def children_of(process: int, name: str) -> list[int]:
    """Living processes of this name whose parent is ``process``."""
    found = []
    for candidate in processes_of(name):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{candidate}/stat").read_text().rsplit(")", 1)[1].split()[1] == str(process):
                found.append(candidate)
    return found


def lava_runs(name: str) -> bool:
    """Whether the network of ``run_for_ever`` does: 9 processes, the runtime service, the worker, and shared memory."""
    return len(processes_of(name)) > 10 and any(SHARED_MEMORY.glob(f"{name}*"))


@needs_lava
@pytest.mark.parametrize("victim", ["worker", "child"])
def test_a_killed_process_ends_the_run_at_once_and_leaves_nothing(
    victim: str, monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    network = conv_network(8)
    runtime = LavaRuntime(network)
    name = give_name(monkeypatch, scratch)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(runtime.run, codes_for(network, 5000))
        assert eventually(lambda: lava_runs(name))
        (worker,) = children_of(os.getpid(), name)
        os.kill(worker if victim == "worker" else children_of(worker, name)[-1], signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(SpikeguardError, match=r"ended by signal 9, Killed.*; if memory, .* is full, make room"):
            run.result()
    # Far from the time limit of minutes.
    assert time.monotonic() - killed < PATIENCE_SECONDS / 2
    assert nothing_is_left(name, scratch)


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Sets how large files may grow; beyond, writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@needs_lava
@pytest.mark.parametrize(
    ("room", "told"),
    [
        (1_000, "job for the Lava worker .lava. cannot be written to .*; make room there, or set TMPDIR"),
        (200_000, "File too large.*; if memory, .* is full, make room"),
    ],
    ids=["for the job", "for the result"],
)
def test_a_full_disk_is_told_and_leaves_nothing(
    room: int,
    told: str,
    largest_file: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    scratch: Path,
) -> None:
    network = conv_network(8)
    runtime = LavaRuntime(network)
    name = give_name(monkeypatch, scratch)
    largest_file(room)
    with pytest.raises(SpikeguardError, match=told):
        runtime.run(codes_for(network, 24), "traces")
    assert nothing_is_left(name, scratch)


def run_for_ever() -> None:
    """What the interrupted parents below do."""
    network = conv_network(8)
    LavaRuntime(network).run(codes_for(network, 5000))


@needs_lava
@pytest.mark.parametrize(
    ("sent", "to_worker"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGKILL, False), (signal.SIGKILL, True)],
)
def test_an_interrupted_parent_leaves_nothing(sent: signal.Signals, to_worker: bool, scratch: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", "from tests.hardware.test_lava_faults import run_for_ever; run_for_ever()"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    names: set[str] = set()

    def any_lava_runs() -> bool:
        for process in processes_of(str(parent.pid)):
            with contextlib.suppress(OSError):  # it may end meanwhile
                environment = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
                names.update(e.partition("=")[2] for e in environment if e.startswith(supervisor.NAME_VARIABLE))
        return any(lava_runs(name) for name in names)

    assert eventually(any_lava_runs)
    workers = [worker for name in names for worker in children_of(parent.pid, name)] if to_worker else []
    assert len(workers) == to_worker
    for process in (parent.pid, *workers):
        os.kill(process, sent)
    parent.wait(PATIENCE_SECONDS)
    assert eventually(lambda: all(nothing_is_left(name, scratch) for name in names))
