"""Runs one job on Lava: ``python worker.py FOLDER``.

The folder holds job.json and job.npz; result.npz appears in it, complete, when all went well. Otherwise there
is an exit status, and what was printed last says why. The process ends without Lava's own shutdown, which may
hang; whoever started it kills the process group. Environment: SPIKEGUARD_WORKER, the prefix of all shared
names, and SPIKEGUARD_PARENT, the process that this one must not outlive.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import guard


def main() -> None:
    """Run the job in the folder given on the command line, and end without waiting for anything."""
    folder, prefix = Path(sys.argv[1]).resolve(), os.environ["SPIKEGUARD_WORKER"]
    guard.name_shared_memory(prefix)
    guard.die_together(int(os.environ["SPIKEGUARD_PARENT"]), prefix, folder)
    status = 1
    try:
        # Importing Lava takes a while; the guard stands before.
        from job import run_job

        run_job(folder)
        status = 0
    except BaseException:
        traceback.print_exc()
        # A lost child may be the reason, and be felt before its end is known.
        time.sleep(guard.POLL_SECONDS)
        guard.report_lost_child()
    finally:
        # Even if there is no room to print: what Python does at its own end waits for Lava's processes.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
