"""Dying together: nothing this process starts or shares outlives the supervisor, nor this process what it started."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import multiprocessing.shared_memory
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.2
RANDOM_NAME_CHARACTERS = 16
# A shell in a session of its own. It waits until this process and its children are gone, for they hold the other end of
# its input; then until the parent is, which otherwise cleans up itself and ends the shell; and removes what they left.
# A semaphore that was being made does not carry our name yet, but one that others make now has its name a second later.
CLEAN_UP = r"""
read -r _
half_made=$(find /dev/shm -maxdepth 1 -name 'sem.??????' -user "$(id -u)" -mmin -0.03 2>/dev/null)
while sleep 1; kill -0 "$1" 2>/dev/null; do :; done
rm -rf -- "$2" "$3"* "$4"*
for block in $half_made; do grep -qs " $block\$" /proc/[0-9]*/maps || rm -f -- "$block"; done
"""


def name_shared_memory(prefix: str) -> None:
    """Make all shared blocks and semaphores of this process and its children start with ``prefix``."""
    multiprocessing.shared_memory._SHM_NAME_PREFIX = f"/{prefix}-"
    multiprocessing.shared_memory._SHM_SAFE_NAME_LENGTH = len(prefix) + 2 + RANDOM_NAME_CHARACTERS
    multiprocessing.current_process()._config["semprefix"] = f"/{prefix}"


def die_together(parent: int, prefix: str, folder: Path) -> None:
    """End as soon as any of us is gone: the parent, this process or one of its children.

    Forked children ask the kernel to be killed with this process. A thread here watches the others: without the
    parent it ends the process group, without a child this process, which would wait for that child for ever. It polls,
    because a pipe from the parent would stay open in whatever else the parent forked. A parent that was killed had no
    chance to clean up; a shell does that.
    """
    arguments = (str(parent), str(folder), f"{SHARED_MEMORY}/{prefix}", f"{SHARED_MEMORY}/sem.{prefix}")
    command = ["/bin/sh", "-c", CLEAN_UP, "clean-up", *arguments]
    outlet = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True).stdin
    multiprocessing.process._children = _Children()
    os.register_at_fork(after_in_child=functools.partial(_be_killed_with, os.getpid()))
    threading.Thread(target=_watch, args=(parent, outlet), daemon=True).start()


class _Children(set):
    """Python's record of the processes it started, which forgets those that ended whenever it starts another."""

    def discard(self, _child: multiprocessing.process.BaseProcess) -> None:
        """Keep it."""


def _be_killed_with(worker: int) -> None:
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The worker may have died between the fork and the request.
    if os.getppid() != worker:
        os._exit(1)


def report_lost_child() -> bool:
    """Print how a child ended, if one did, which none does by itself; whether there is one."""
    for child in list(multiprocessing.process._children):
        status = child.exitcode
        if status is not None:
            if status < 0:
                ending = f"was ended by signal {-status}, {signal.strsignal(-status)}"
            else:
                ending = f"exited with {status}"
            print(f"a process of Lava's, {child.pid}, {ending}", file=sys.stderr, flush=True)
            return True
    return False


def _watch(parent: int, _outlet: object) -> None:
    """Poll; ``_outlet`` is kept open as long as this process lives."""
    while os.getppid() == parent:
        try:
            lost = report_lost_child()
        except OSError:
            lost = True
        if lost:
            os._exit(1)
        time.sleep(POLL_SECONDS)
    os.killpg(0, signal.SIGKILL)
