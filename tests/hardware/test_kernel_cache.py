"""Kernels compiled ahead of time: all of them, and found where a container starts with nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numba
import pytest

from hardware.kernel_cache import take_shipped

PROGRAM = """
import numpy as np
from hardware import kernels, synapse_kernels
from hardware.emulator import run_emulator
from hardware.kernel_cache import compile_all
from tests.networks import random_codes, random_network

def compiled():
    adders = [*synapse_kernels._SPIKE_ADDERS.values(), *synapse_kernels._CODE_ADDERS.values()]
    return [set(kernel.signatures) for kernel in (kernels.integrate, kernels.integrate_leaky, *adders)]

compile_all()
ahead = compiled()
for seed in range(40):
    rng = np.random.default_rng(seed)
    kind = ("conv", "dense")[seed % 2]
    network = random_network(rng, kind=kind, dag=seed % 3 == 0, leaky=seed % 4 < 2, max_code=(1, 255)[seed % 5 > 2])
    run_emulator(network, random_codes(rng, network), ("readouts", "traces")[seed % 2])
assert compiled() == ahead, (compiled(), ahead)
print(sum(map(len, ahead)))
"""


def test_no_network_needs_a_kernel_that_was_not_compiled_ahead() -> None:
    finished = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) == 2 * (2 + 3 + 3)


def test_shipped_kernels_are_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    (shipped / "folder").mkdir(parents=True)
    (shipped / "folder" / "kernel").write_text("first")
    shipped.chmod(0o555)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(own))
    take_shipped()
    assert not own.exists()  # nothing was shipped
    monkeypatch.setenv("SPIKEGUARD_KERNELS", str(shipped))
    take_shipped()
    assert (own / "folder" / "kernel").read_text() == "first"
    (own / "folder" / "kernel").write_text("second")
    take_shipped()
    assert (own / "folder" / "kernel").read_text() == "second"
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file" / "own"))
    (tmp_path / "file").write_text("no folder can be made here")
    take_shipped()
