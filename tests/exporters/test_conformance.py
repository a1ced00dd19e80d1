"""snnTorch reads the exported file on its own, and finds every spike and membrane value where we do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporters.conformance.snntorch_reader import run_snntorch
from exporters.nir import write_nir
from hardware.errors import SpikeguardError
from hardware.reference import run_reference
from hardware.trace import compare_traces
from tests.networks import random_codes, random_network


def test_snntorch_runs_a_residual_network_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    network = random_network(rng, dag=True, hidden=3, constant_channels=1, steps=4)
    assert not network.is_chain()
    codes = random_codes(rng, network)
    write_nir(network, tmp_path / "model.cuba.nir", "cuba")
    trace = run_snntorch(tmp_path / "model.cuba.nir", network, codes)
    expected = run_reference(network, codes)
    assert set(trace.populations) == {p.name for p in network.populations if p.spiking}
    assert all(p.spikes.any() for p in trace.populations.values() if p.spikes is not None)
    difference = compare_traces(expected, trace)
    assert (difference.spikes, difference.membranes, difference.readouts) == (0, 0, 0)


def test_a_planted_threshold_error_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    network = random_network(rng, hidden=1, steps=4)
    codes = random_codes(rng, network)
    off = replace(network.populations[0], threshold=network.populations[0].threshold // 2)
    wrong = replace(network, populations=(off, *network.populations[1:]))
    write_nir(wrong, tmp_path / "model.cuba.nir", "cuba")
    trace = run_snntorch(tmp_path / "model.cuba.nir", network, codes)
    assert compare_traces(run_reference(network, codes), trace).spikes


def test_a_file_snntorch_cannot_read_is_a_clear_error(tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(2), kind="dense", hidden=1)
    (tmp_path / "model.cuba.nir").write_bytes(b"not a graph")
    with pytest.raises(SpikeguardError, match="snnTorch"):
        run_snntorch(tmp_path / "model.cuba.nir", network, random_codes(np.random.default_rng(0), network))
