"""Bundle writer: complete, self-consistent, reproducible, and all or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.bundle import MODEL_FILES, refusals, write_bundle
from hardware.errors import RuleViolations, SpikeguardError
from hardware.formats.bundle import (
    NETX_FILE,
    NIR_CUBA_FILE,
    NIR_FILE,
    ONNX_FILE,
    ONNX_INT8_FILE,
    ONNX_STEP_FILE,
    open_bundle,
)
from hardware.formats.verify import verify_bundle
from hardware.network import IntegerNetwork
from hardware.reference import run_reference
from hardware.trace import compare_traces
from tests.networks import random_codes, random_network, same_network

FLOAT_FILES = {"snn.json": b'{"layers": []}', "snn.safetensors": b"weights"}
WITHOUT_NETX = tuple(name for name in MODEL_FILES if name != NETX_FILE)


def _write(folder: Path, network: IntegerNetwork, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "golden_codes": random_codes(np.random.default_rng(0), network),
        "float_model_files": FLOAT_FILES,
        "provenance": {"data": "digits", "seed": 3},
        "models": WITHOUT_NETX,
    }
    write_bundle(folder, network, **{**arguments, **changes})
    return folder


@pytest.mark.parametrize("seed", range(4))
def test_every_file_of_a_bundle_leaves_the_golden_traces(tmp_path: Path, seed: int) -> None:
    network = random_network(np.random.default_rng(seed), dag=seed % 2 == 0, constant_channels=seed % 3)
    bundle = open_bundle(_write(tmp_path / "bundle", network))
    assert same_network(bundle.network, network)
    golden = bundle.golden
    assert compare_traces(run_reference(network, golden.codes), golden.trace).equal
    rows = verify_bundle(bundle)
    assert [(row.file, row.reader) for row in rows] == [
        ("network.json", "reference"),
        ("network.json", "emulator"),
        (NIR_FILE, "nir + reference"),
        (NIR_CUBA_FILE, "nir + reference"),
        (ONNX_FILE, "onnxruntime"),
        (ONNX_STEP_FILE, "onnxruntime"),
        (ONNX_INT8_FILE, "onnxruntime"),
    ]
    for row in rows:
        unexposed = None if row.file in (ONNX_FILE, ONNX_INT8_FILE) else 0
        found = (row.mismatched_spikes, row.mismatched_membranes, row.mismatched_readouts)
        assert found == (unexposed, unexposed, 0)
        assert row.equal
        assert row.samples == len(golden.codes)
        assert row.version
    asked = verify_bundle(bundle, ["onnx", "reference"])[len(rows) :]
    assert [(row.reader, row.mismatched_spikes, row.mismatched_readouts) for row in asked] == [
        ("onnx", 0, 0),
        ("reference", 0, 0),
    ]


def test_all_model_formats_are_written_for_a_chain(tmp_path: Path) -> None:
    network = _chain()
    bundle = open_bundle(_write(tmp_path / "bundle", network, models=MODEL_FILES))
    assert set(MODEL_FILES) <= set(bundle.manifest.files)
    assert all(row.equal for row in verify_bundle(bundle))


def test_the_manifest_tells_what_it_holds(tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(1))
    bundle = open_bundle(_write(tmp_path / "bundle", network))
    assert bundle.manifest.provenance == {"data": "digits", "seed": 3}
    assert bundle.manifest.semantics == json.loads(json.dumps(network.semantics_card()))
    assert {"spikeguard", "nir", "onnx", "numpy"} <= bundle.manifest.versions.keys()
    for name, content in FLOAT_FILES.items():
        assert bundle.file(name).read_bytes() == content


def test_golden_inputs_may_change_over_time_without_the_unrolled_graph(tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(1))
    codes = random_codes(np.random.default_rng(2), network, 3, timed=True)
    with pytest.raises(RuleViolations, match="one image per sample"):
        _write(tmp_path / "bundle", network, golden_codes=codes)
    models = (NIR_FILE, ONNX_STEP_FILE)
    bundle = open_bundle(_write(tmp_path / "bundle", network, golden_codes=codes, models=models))
    rows = verify_bundle(bundle)
    assert {row.file for row in rows} == {"network.json", *models}
    assert all(row.equal for row in rows)


def test_formats_that_cannot_hold_the_network_are_all_named_and_nothing_is_written(tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(1), reset="subtract")
    with pytest.raises(RuleViolations) as caught:
        _write(tmp_path / "bundle", network)
    assert {row.object.split(":")[0] for row in caught.value.violations} == {NIR_FILE, NIR_CUBA_FILE}
    assert not list(tmp_path.iterdir())


def test_a_network_that_leaks_has_all_onnx_files_too(tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(1), leaky=True)
    files = (ONNX_FILE, ONNX_STEP_FILE, ONNX_INT8_FILE)
    bundle = open_bundle(_write(tmp_path / "bundle", network, models=files))
    assert [row.file for row in verify_bundle(bundle)] == ["network.json", "network.json", *files]
    assert all(row.equal for row in verify_bundle(bundle))


def test_a_bundle_of_what_can_hold_the_network_can_be_had(tmp_path: Path) -> None:
    branched = random_network(np.random.default_rng(5), dag=True, hidden=3)
    refused = refusals(branched)
    assert refused[NETX_FILE]
    kept = [name for name in MODEL_FILES if name not in refused]
    assert {NIR_FILE, ONNX_FILE} <= set(kept)
    bundle = open_bundle(_write(tmp_path / "bundle", branched, models=kept))
    assert NETX_FILE not in bundle
    assert all(row.equal for row in verify_bundle(bundle))
    assert refusals(_chain()) == {}


def test_a_failed_rewrite_leaves_the_old_bundle(tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(1))
    folder = _write(tmp_path / "bundle", network)
    with pytest.raises(SpikeguardError, match="plain JSON"):
        _write(folder, network, provenance={"when": float("nan")})
    assert same_network(open_bundle(folder).network, network)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


def test_names_and_models_are_checked_at_once(tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(1))
    files = {"../escape": b"", "network.json": b"", "ok.bin": b""}
    codes = random_codes(np.random.default_rng(0), network).astype(np.int64)
    with pytest.raises(RuleViolations) as caught:
        _write(tmp_path / "b", network, float_model_files=files, models=("model.txt",), golden_codes=codes)
    objects = {row.object for row in caught.value.violations}
    assert objects == {"'../escape'", "'network.json'", "model.txt", "golden inputs"}


def _chain() -> IntegerNetwork:
    """A chain every format can hold: dense, eight-bit weights, small biases."""
    for seed in range(200):
        network = random_network(np.random.default_rng(seed), kind="dense", hidden=2)
        if all(s.bits <= 8 for s in network.synapses):
            return network
    raise AssertionError("no such chain was drawn")
