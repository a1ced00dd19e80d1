"""Supervised commands end as a whole, however they end, and say what went wrong."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hardware.errors import SpikeguardError
from hardware.runtimes import supervisor
from hardware.runtimes.supervisor import SHARED_MEMORY, run_supervised

ROOT = Path(__file__).parent.parent.parent
PATIENCE_SECONDS = 60.0

# Starts a child that leaves the session and ignores polite signals, leaves a block of shared memory behind,
# and notes its own process id and the child's.
LEAVES_A_MESS = """
import os, pathlib, signal, subprocess, sys, time
name = os.environ["SPIKEGUARD_WORKER"]
pathlib.Path("/dev/shm", name + "-block").write_bytes(b"x")
pathlib.Path("/dev/shm", "sem." + name + "-semaphore").write_bytes(b"x")
sleeper = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", sleeper], start_new_session=True)
note = pathlib.Path(sys.argv[1])
note.with_suffix(".new").write_text(f"{name} {os.getpid()} {child.pid}")
note.with_suffix(".new").rename(note)
"""
# Is killed while it makes a semaphore, as it were; an older one of such a name is not its own.
MAKES_A_SEMAPHORE = """
import os, pathlib, sys, time
for name, age in zip(sys.argv[1:], (0, 60)):
    pathlib.Path(name).write_bytes(bytes(32))
    os.utime(name, (time.time() - age,) * 2)
os.kill(os.getpid(), 9)
"""
THEN_HANGS = LEAVES_A_MESS + "time.sleep(600)\n"
THEN_FAILS = LEAVES_A_MESS + "raise ValueError('weights went missing')\n"


def run_python(program: str, *arguments: str, time_limit: float = 60.0) -> str:
    return run_supervised(
        [sys.executable, "-c", program, *arguments],
        subject="the helper",
        time_limit=time_limit,
        remedy="mend it",
    )


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def nothing_is_left(note: Path) -> bool:
    name, *processes = note.read_text().split()
    blocks = [*SHARED_MEMORY.glob(f"*{name}*")]
    # A process that was killed has given up its memory, and all that names it, before it counts as ended.
    return not blocks and eventually(lambda: not any(is_running(int(process)) for process in processes))


def test_output_is_returned() -> None:
    assert run_python("print('first'); print('last')") == "first\nlast\n"


def test_long_output_is_cut_from_the_front() -> None:
    printed = run_python("print('x' * 1_000_000); print('end')")
    assert len(printed) == supervisor.TAIL_BYTES
    assert printed.endswith("end\n")


def test_nothing_survives_success(tmp_path: Path) -> None:
    note = tmp_path / "note"
    run_python(LEAVES_A_MESS, str(note))
    assert nothing_is_left(note)


def test_failure_names_the_exception_and_the_remedy_and_leaves_nothing(tmp_path: Path) -> None:
    note = tmp_path / "note"
    with pytest.raises(SpikeguardError) as caught:
        run_python(THEN_FAILS, str(note))
    message = str(caught.value)
    assert message == "the helper failed with exit status 1 (ValueError: weights went missing); mend it", message
    assert nothing_is_left(note)


def test_time_limit_is_kept_and_leaves_nothing(tmp_path: Path) -> None:
    note = tmp_path / "note"
    begun = time.monotonic()
    with pytest.raises(SpikeguardError, match="did not finish within 2 s"):
        run_python(THEN_HANGS, str(note), time_limit=2.0)
    assert time.monotonic() - begun < PATIENCE_SECONDS
    assert nothing_is_left(note)


def test_a_half_made_semaphore_is_removed_and_another_is_not() -> None:
    own, other = (SHARED_MEMORY / f"sem.{secrets.token_hex(3)}" for _ in range(2))
    try:
        with pytest.raises(SpikeguardError, match="was ended by signal 9, Killed; mend it"):
            run_python(MAKES_A_SEMAPHORE, str(own), str(other))
        assert (own.exists(), other.exists()) == (False, True)
    finally:
        other.unlink(missing_ok=True)


def test_a_program_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(SpikeguardError, match=r"cannot be started .*; install it"):
        run_supervised(["/nowhere/at/all"], subject="the helper", time_limit=1.0, remedy="install it")


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_interrupted_parent_leaves_nothing(tmp_path: Path, sent: signal.Signals, status: int) -> None:
    note = tmp_path / "note"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from tests.hardware.test_supervisor import *; run_python(THEN_HANGS, sys.argv[1])",
            str(note),
        ],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    assert eventually(note.exists)
    os.kill(parent.pid, sent)
    assert parent.wait(PATIENCE_SECONDS) == status
    assert nothing_is_left(note)


def test_it_works_beside_the_main_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run_python, "print('there')").result() == "there\n"


def test_termination_handler_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run_python(LEAVES_A_MESS, str(tmp_path / "note"))
    assert signal.getsignal(signal.SIGTERM) is before
