"""``spikeguard serve`` as a process of its own, for tests and measurements."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 60.0


@dataclass
class Served:
    """A server that was started; its log lies in a file."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def events(self) -> list[dict[str, Any]]:
        """The lines of its log."""
        return read_log(self.log)

    def get(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def stop(self, kind: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit status."""
        self.process.send_signal(kind)
        return self.process.wait(PATIENCE)


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def command(bundle: Path, *options: str) -> list[str]:
    program = "from pipeline.cli import main; main()"
    return [sys.executable, "-c", program, "serve", str(bundle), "--port", "0", "--drain", "0.3", *options]


def until(condition: Any) -> Any:
    """What a condition gives as soon as it holds."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found


@contextmanager
def served(bundle: Path, folder: Path, *options: str) -> Iterator[Served]:
    """A server that is ready; it is killed at the end unless it stopped before."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"log-{time.monotonic_ns()}"
    with log.open("wb") as written:
        process = subprocess.Popen(command(bundle, *options), stderr=written, stdout=written, env={**os.environ})
    try:

        def event(name: str) -> dict[str, Any] | None:
            assert process.poll() is None, log.read_text()
            return next((row for row in read_log(log) if row["event"] == name), None)

        port = until(lambda: event("listening"))["port"]
        until(lambda: event("ready"))
        yield Served(process, log, port)
    finally:
        process.kill()
        process.wait()
