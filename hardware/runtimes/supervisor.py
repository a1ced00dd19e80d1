"""Running a command that must not hang, leak or outlive us.

The command gets a session of its own and writes to a file; it has a deadline. However the call ends, every
process that descends from the command is killed, and every shared-memory block that carries its name removed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from hardware.errors import SpikeguardError

# In the environment of every supervised process: the name that all of one command's processes share, which is
# also the prefix they give to shared memory, and the process that waits for them.
NAME_VARIABLE = "SPIKEGUARD_WORKER"
PARENT_VARIABLE = "SPIKEGUARD_PARENT"

SHARED_MEMORY = Path("/dev/shm")
PROCESSES = Path("/proc")
KILL_SECONDS = 10.0
# What glibc's sem_open calls a semaphore until it is complete, and seconds within which it always is.
HALF_MADE_SEMAPHORE = "sem.??????"
MAKING_SECONDS = 1.0
TAIL_BYTES = 64 * 1024
MESSAGE_LINES = 3
# Lines of a Python traceback that say nothing to a user.
NOISE = ("Traceback ", "During handling ", "The above exception ", "Process ")


def run_supervised(
    command: Sequence[str],
    *,
    subject: str,
    time_limit: float,
    remedy: str,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a command to its end.

    Args:
        command: program and arguments.
        subject: what it is called in messages.
        time_limit: seconds after which it is killed.
        remedy: what the user can do when it fails.
        environment: variables to set on top of this process's own.

    Returns:
        What the command printed last, at most ``TAIL_BYTES``.

    Raises:
        SpikeguardError: if it cannot be started, fails, or runs into the time limit.
    """
    name = f"sg{secrets.token_hex(6)}"
    variables = {**os.environ, **(environment or {}), NAME_VARIABLE: name, PARENT_VARIABLE: str(os.getpid())}
    with _output_file() as output, _termination_as_exception():
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
        except OSError as error:
            raise SpikeguardError(f"{subject} cannot be started ({error}); {remedy}") from error
        try:
            status: int | None = process.wait(time_limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end_everything(process, name)
        output.seek(max(0, output.seek(0, os.SEEK_END) - TAIL_BYTES))
        printed = output.read().decode(errors="replace")
    if status is None:
        raise SpikeguardError(
            f"{subject} did not finish within {time_limit:.0f} s and was stopped{_last_words(printed)}; "
            "give it more time or less to do"
        )
    if status != 0:
        raise SpikeguardError(f"{subject} {_ending(status)}{_last_words(printed)}; {remedy}")
    return printed


def _output_file() -> IO[bytes]:
    """A file without a name; in memory where the system can, so that a full disk can be told of."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("output"), "w+b")
    return tempfile.TemporaryFile()


@contextlib.contextmanager
def _termination_as_exception() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, which passes through the clean-up; a handler already set stays."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def terminate(_signal: int, _frame: FrameType | None) -> None:
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_everything(process: subprocess.Popen[bytes], name: str) -> None:
    """Kill the process group and whatever else carries ``name``, then remove the shared memory it left."""
    ended = time.time()
    # The group of a process that was waited for may be someone else's by now; there its name has to do.
    if process.returncode is None or not PROCESSES.is_dir():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + KILL_SECONDS
    # Twice in a row: a process that is just being started shows no environment for a moment.
    quiet = 0
    while quiet < 2 and time.monotonic() < deadline:
        quiet = 0 if _kill_named(name) else quiet + 1
        time.sleep(0.01)
    if SHARED_MEMORY.is_dir():
        for pattern in (f"{name}*", f"sem.{name}*"):
            for block in SHARED_MEMORY.glob(pattern):
                block.unlink(missing_ok=True)
        if process.returncode != 0:
            _remove_half_made_semaphores(ended)


def _remove_half_made_semaphores(ended: float) -> None:
    """Remove the semaphore that was being made when its process was killed, for it does not carry our name yet.

    That is one of this user's, made just before the moment ``ended``, that stays what it is and that nobody has mapped.
    """
    found = []
    for block in SHARED_MEMORY.glob(HALF_MADE_SEMAPHORE):
        with contextlib.suppress(OSError):
            made = block.stat()
            if made.st_uid == os.getuid() and abs(ended - made.st_mtime) < MAKING_SECONDS:
                found.append(block)
    if found:
        time.sleep(MAKING_SECONDS)
    for block in found:
        if not _is_mapped(block):
            block.unlink(missing_ok=True)


def _is_mapped(block: Path) -> bool:
    for maps in PROCESSES.glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if f" {block}\n" in maps.read_text(errors="replace"):
                return True
    return False


def _kill_named(name: str) -> int:
    """Kill every living process whose environment carries ``name``, even one that left the session.

    Returns:
        how many there were. Where the system does not show environments, the process group has to do.
    """
    if not PROCESSES.is_dir():
        return 0
    mark = f"{NAME_VARIABLE}={name}".encode()
    found = 0
    for folder in PROCESSES.glob("[0-9]*"):
        # A process may end, or turn out to be someone else's, between any two of these calls.
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(int(folder.name))
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                    found += 1
            finally:
                os.close(handle)
    return found


def _ending(status: int) -> str:
    if status > 0:
        return f"failed with exit status {status}"
    return f"was ended by signal {-status}, {signal.strsignal(-status)}"


def _last_words(printed: str) -> str:
    lines = [line for line in printed.splitlines() if line.strip()]
    telling = [line for line in lines if not line[0].isspace() and not line.startswith(NOISE)]
    last = [line.strip() for line in (telling or lines)[-MESSAGE_LINES:]]
    return f" ({' | '.join(last)})" if last else ""
