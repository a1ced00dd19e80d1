"""One small run on real digits that the tests of the command line and of the whole pipeline share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from rich.console import Console

from pipeline import cli
from pipeline.commands import terminal
from pipeline.data import load_digits

ROOT = Path(__file__).parents[2]
IMAGES = 640
# Far too little training for a good network; enough for one that is right and fooled now and then.
SETTINGS = """
network: digits-cnn
data: {{name: npz, path: {data}, validation: 60, test: 80}}
training: {{epsilon: 0.05, attack_steps: 2, epochs: 8, learning_rate: 0.1}}
conversion: {{calibration_steps: 20, batches: 3}}
finetuning: {{steps: 4, epsilon: 0.05, epochs: 3}}
fidelity: {{epsilon: 0.05, square_queries: 30, certify: 6, curve: [0.1],
  runtimes: [emulator, onnxruntime]}}
"""


def spikeguard(*arguments: object, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@dataclass(frozen=True)
class SmallRun:
    """A finished run: its configuration file, its folder, and what the command line said."""

    config: Path
    folder: Path
    finished: subprocess.CompletedProcess[str]

    @property
    def data(self) -> str:
        """The setting that says where the images are, which is in no bundle."""
        return f"data.path={self.config.with_name('digits.npz')}"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return report


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """`spikeguard run` on some of the digits; no test may change its folder."""
    folder = tmp_path_factory.mktemp("small")
    digits = load_digits()
    data = folder / "digits.npz"
    np.savez(data, images=digits.codes[:IMAGES], labels=digits.labels[:IMAGES])
    config = folder / "small.yaml"
    config.write_text(SETTINGS.format(data=data))
    finished = spikeguard("run", config, "--out", folder / "run")
    return SmallRun(config, folder / "run", finished)


class Answer(NamedTuple):
    code: int
    out: str
    err: str

    def says(self, *words: str) -> bool:
        """Whether all words were told on stderr."""
        return all(word in self.err for word in words)


Call = Callable[..., Answer]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """The command line in this process, on a terminal wide enough not to break words."""
    monkeypatch.setattr(terminal, "out", Console(width=300))
    monkeypatch.setattr(terminal, "errors", Console(width=300, stderr=True))
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Answer:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert isinstance(stop.value.code, int)
        return Answer(stop.value.code, said.out, said.err)

    yield run
    signal.signal(signal.SIGTERM, handler)
