"""What a fault in the middle of a Lava run costs its caller, and what it leaves behind.

Run it as ``python -m tests.benchmarks.bench_lava_faults``. Runs follow one another, each in a caller of its own and
with the next kind of fault; kills come at a random moment, from the worker's start to the middle of stepping.
A full disk and full shared memory are small ones of a mount namespace; where the system grants none, a limit on the
size of files stands in for the disk, and shared memory is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hardware.errors import SpikeguardError
from hardware.runtimes import lava
from hardware.runtimes.supervisor import HALF_MADE_SEMAPHORE, NAME_VARIABLE, PARENT_VARIABLE, SHARED_MEMORY
from tests.hardware.test_lava import codes_for, conv_network

RUNS = 55
SHORT, LONG = 24, 3_000
DEADLINE_SECONDS = 3.0
LATEST_KILL_SECONDS = 2.5
HANG_SECONDS = 60.0
SETTLING_SECONDS = 10.0
EXEC_SECONDS = 0.05
"""After which a fork that was to become another program has done so."""
JOB_ROOM, RESULT_ROOM = 8 << 10, 200 << 10
"""Bytes that suffice not even for the job, and for the job but not the result."""
BLOCKS_ROOM, PAGES_ROOM = 256 << 10, 450 << 10
"""Bytes in which not all of Lava's channels fit, and in which they do until they are written to."""
ON_SMALL_DISK = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        samples: that the caller runs.
        victims: killed with SIGKILL at a random moment.
        small: file system that is small, and its bytes.
        expected: part of what the caller must be told; None where it is killed or the run succeeds.
    """

    name: str
    samples: int = LONG
    victims: tuple[str, ...] = ()
    small: tuple[str, int] | None = None
    expected: str | None = None


KINDS = (
    Kind("none", SHORT),
    Kind("worker killed", victims=("worker",), expected="signal 9"),
    Kind("a process of Lava's killed", victims=("child",), expected="signal 9"),
    Kind("caller killed", victims=("caller",)),
    Kind("caller and worker killed", victims=("caller", "worker")),
    Kind("exception in Lava", SHORT, expected="ZeroDivisionError"),
    Kind("deadline", expected="did not finish within"),
    Kind("disk full for the job", SHORT, small=("disk", JOB_ROOM), expected="make room there"),
    Kind("disk full for the result", SHORT, small=("disk", RESULT_ROOM), expected="is full, make room"),
    Kind("shared memory full at once", SHORT, small=("memory", BLOCKS_ROOM), expected="is full, make room"),
    Kind("shared memory full later", SHORT, small=("memory", PAGES_ROOM), expected="is full, make room"),
)


@dataclass
class Row:
    """What all runs with one kind of fault came to."""

    runs: int = 0
    seconds: float = 0.0
    hangs: int = 0
    orphans: int = 0
    blocks: int = 0
    files: int = 0
    unclear: int = 0
    message: str = ""
    unclear_messages: list[str] = field(default_factory=list)


def run_caller(name: str) -> None:
    """What the caller of a run does: run, then print what it was told and what lies in its temporary directory."""
    (kind,) = (kind for kind in KINDS if kind.name == name)
    network = conv_network(8)
    runtime = lava.LavaRuntime(network, time_limit=DEADLINE_SECONDS if kind.name == "deadline" else None)
    codes, message = codes_for(network, kind.samples), ""
    if kind.name == "exception in Lava":
        # Held for no steps, the presenting process divides by zero.
        lava.describe_input = lambda *_: ({"hold": 0}, {"frames": np.zeros((1, 6, 8, 3), np.int32)})
    try:
        runtime.run(codes, "traces")
    except SpikeguardError as error:
        message = str(error)
    own_memory = kind.small is not None and kind.small[0] == "memory"
    files = entries(Path(tempfile.gettempdir()))
    blocks = entries(SHARED_MEMORY) if own_memory else 0
    print(json.dumps({"message": message, "files": files, "blocks": blocks}))


def entries(folder: Path) -> int:
    """How many files and folders lie in it."""
    return sum(1 for _ in folder.iterdir())


def started_by(caller: int) -> dict[int, str]:
    """Names of the living processes that serve ``caller``."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pairs = (entry.partition("=") for entry in (folder / "environ").read_text(errors="replace").split("\0"))
            environment = {key: value for key, _, value in pairs}
            if environment.get(PARENT_VARIABLE) == str(caller):
                found[int(folder.name)] = environment[NAME_VARIABLE]
    return found


def parent_of(process: int) -> int:
    """Its parent's process id, 0 if it is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return 0


def is_fork(process: int) -> bool:
    """Whether it runs its parent's command."""
    with contextlib.suppress(OSError):
        own, parents = (Path(f"/proc/{p}/cmdline").read_bytes() for p in (process, parent_of(process)))
        return own == parents
    return False


def kill(victims: Sequence[str], caller: int, rng: random.Random) -> bool:
    """Kill those processes, the caller first; whether they all exist yet."""
    running = started_by(caller)
    workers = [process for process in running if parent_of(process) == caller]
    # Lava's processes are forks of the worker; the shell that cleans up after them and Python's tracker are not.
    children = [process for process in running if parent_of(process) in workers and is_fork(process)]
    if "child" in victims:
        time.sleep(EXEC_SECONDS)
        children = [process for process in children if is_fork(process)]
    chosen = {"caller": [caller], "worker": workers, "child": [rng.choice(children)] if children else []}
    # When caller and worker die at once, what cleans up is the shell that the worker starts with.
    shell_is_there = any(parent_of(process) in workers for process in running)
    if not all(chosen[victim] for victim in victims) or (len(victims) > 1 and not shell_is_there):
        return False
    for victim in victims:
        for process in chosen[victim]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    return True


def command_of(kind: Kind, scratch: Path, namespaces: Sequence[str]) -> list[str]:
    """The caller's command, on a small file system where its kind asks for one."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_lava_faults", "--caller", kind.name]
    if kind.small is None:
        return command
    where, size = kind.small
    if not namespaces:
        return ["prlimit", f"--fsize={size}:", *command]
    place = str(scratch if where == "disk" else SHARED_MEMORY)
    return [*namespaces, "sh", "-c", ON_SMALL_DISK, "sh", str(size), place, *command]


def namespace_command() -> list[str]:
    """The beginning of a command that gets a mount namespace of its own; empty where there is no way."""
    for options in ("-m", "-rm"):
        trial = ["unshare", options, "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]
        with contextlib.suppress(OSError):
            if subprocess.run(trial, capture_output=True, check=False).returncode == 0:
                return trial[:2]
    return []


def run_once(kind: Kind, row: Row, rng: random.Random, namespaces: Sequence[str]) -> None:
    """Let one caller meet the fault and note what came of it."""
    with scratch_folder() as scratch:
        caller = subprocess.Popen(
            command_of(kind, scratch, namespaces),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        before, begun, names = half_made(), time.monotonic(), set[str]()
        delay, serving = rng.uniform(0, LATEST_KILL_SECONDS), False
        struck = not kind.victims
        while caller.poll() is None and time.monotonic() - begun < HANG_SECONDS:
            names |= set(started_by(caller.pid).values())
            # The first command supervised asks for Lava's version; the second is the worker.
            if not serving and any(scratch.glob("lava-*/job.npz")):
                serving, begun = True, time.monotonic()
            if serving and not struck and time.monotonic() - begun > delay and kill(kind.victims, caller.pid, rng):
                struck, begun = True, time.monotonic()
            time.sleep(0.01)
        if caller.poll() is None:
            row.hangs += 1
            caller.kill()
        printed, errors = caller.communicate()
        left = settle(caller.pid, names, scratch, before)
        row.seconds = max(row.seconds, time.monotonic() - begun)
        told: dict[str, Any] = json.loads(printed) if printed else {"message": errors, "files": 0, "blocks": 0}
        row.runs += 1
        row.orphans += left[0]
        row.blocks += left[1] + told["blocks"]
        row.files += left[2] + told["files"]
        expected = "" if kind.expected is None else kind.expected
        row.message = told["message"]
        if expected not in row.message or bool(row.message) != bool(expected):
            row.unclear += 1
            row.unclear_messages.append(row.message or "(none)")


def half_made() -> set[Path]:
    """Semaphores that were being made when their process was killed; they carry no one's name."""
    return set(SHARED_MEMORY.glob(HALF_MADE_SEMAPHORE))


def settle(caller: int, names: set[str], scratch: Path, before: set[Path]) -> tuple[int, int, int]:
    """Processes, shared-memory blocks and files that are still there when nothing is removed any more."""
    deadline = time.monotonic() + SETTLING_SECONDS
    while True:
        blocks = sum(any(name in block.name for name in names) for block in SHARED_MEMORY.iterdir())
        blocks += len(half_made() - before)
        left = len(started_by(caller)), blocks, entries(scratch)
        if not any(left) or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary directory with a path short enough for the sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="sg"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Run all kinds in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[kind.name for kind in KINDS], help="the one kind of fault to measure")
    parser.add_argument("--caller", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.caller is not None:
        run_caller(options.caller)
        return
    rng, namespaces = random.Random(options.seed), namespace_command()
    kinds = [kind for kind in KINDS if namespaces or kind.small is None or kind.small[0] == "disk"]
    if options.only is not None:
        kinds = [kind for kind in kinds if kind.name == options.only]
    rows = {kind.name: Row() for kind in kinds}
    for number in range(options.runs):
        kind = kinds[number % len(kinds)]
        run_once(kind, rows[kind.name], rng, namespaces)
    print(f"{options.runs} runs in a row; longest from the fault, or the job's writing where the fault is built in, to")
    print("the moment when the caller has its answer and nothing is left:\n")
    print(f"{'fault':28}{'runs':>5}{'longest':>9}{'hangs':>7}{'orphans':>9}{'blocks':>8}{'files':>7}{'unclear':>9}")
    for name, row in rows.items():
        counts = f"{row.hangs:7}{row.orphans:9}{row.blocks:8}{row.files:7}{row.unclear:9}"
        print(f"{name:28}{row.runs:5}{row.seconds:8.2f}s{counts}")
    print("\nthe last message of each:")
    for name, row in rows.items():
        print(f"- {name}: {row.message}")
        for message in row.unclear_messages:
            print(f"  NOT AS EXPECTED: {message}")
    if len(kinds) < len(KINDS):
        print("not measured here, for want of a mount namespace: full shared memory")
    bad = sum(row.hangs + row.orphans + row.blocks + row.files + row.unclear for row in rows.values())
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
