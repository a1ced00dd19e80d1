"""Bundle reader: every altered, missing or unlisted file is named, all at once."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.bundle import write_bundle
from hardware.errors import RuleViolations, SpikeguardError
from hardware.files import arrays_as_bytes, read_arrays, write_arrays
from hardware.formats.bundle import (
    FLOAT_GOLDEN_FILE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    NIR_CUBA_FILE,
    NIR_FILE,
    ONNX_FILE,
    ONNX_INT8_FILE,
    ONNX_STEP_FILE,
    open_bundle,
)
from hardware.formats.float_golden import FloatActivity, FloatGolden, pack_float_golden
from hardware.formats.verify import verify_bundle
from tests.networks import random_codes, random_network

FILES = [
    "network.json",
    "network.safetensors",
    GOLDEN_FILE,
    NIR_FILE,
    NIR_CUBA_FILE,
    ONNX_FILE,
    ONNX_STEP_FILE,
    ONNX_INT8_FILE,
]
FILES += ["snn.json", "snn.safetensors"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    network = random_network(np.random.default_rng(21), hidden=2)
    write_bundle(
        folder,
        network,
        golden_codes=random_codes(np.random.default_rng(0), network),
        float_model_files={"snn.json": b"{}", "snn.safetensors": b"weights"},
        provenance={},
        models=(NIR_FILE, NIR_CUBA_FILE, ONNX_FILE, ONNX_STEP_FILE, ONNX_INT8_FILE),
    )
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def _objects(path: Path) -> set[str]:
    with pytest.raises(RuleViolations) as caught:
        open_bundle(path)
    return {row.object for row in caught.value.violations}


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_named(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    assert _objects(bundle) == {name}


def test_all_differences_are_named_at_once(bundle: Path) -> None:
    (bundle / NIR_FILE).unlink()
    (bundle / "report.html").write_text("left here by mistake")
    (bundle / ONNX_FILE).write_bytes((bundle / ONNX_FILE).read_bytes() + b"x")
    (bundle / "snn.json").write_bytes(b"[]")
    assert _objects(bundle) == {NIR_FILE, "report.html", ONNX_FILE, "snn.json"}


def test_a_link_in_place_of_a_file_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / NIR_FILE, tmp_path / "elsewhere")
    (bundle / NIR_FILE).symlink_to(tmp_path / "elsewhere")
    assert _objects(bundle) == {NIR_FILE}


def _edit_manifest(path: Path, edit: Callable[[Any], Any]) -> None:
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    edit(manifest)
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))


def _forge(path: Path, name: str, content: bytes) -> None:
    """Change a file and its entry in the manifest alike."""
    (path / name).write_bytes(content)
    record = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    _edit_manifest(path, lambda m: m["files"].update({name: record}))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda m: m.update(format="spikeguard.bundle/2"), "format"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m.pop("versions"), "versions"),
        (lambda m: m["files"]["snn.json"].update(sha256="zz"), "files.snn.json.sha256"),
        (lambda m: m["files"]["snn.json"].update(bytes=-1), "files.snn.json.bytes"),
        (lambda m: m["files"].update({"../outside": m["files"]["snn.json"]}), "'../outside'"),
        (lambda m: m["files"].update({"a/b": m["files"]["snn.json"]}), "'a/b'"),
        (lambda m: m["files"].update({"..": m["files"]["snn.json"]}), "'..'"),
        (lambda m: m["files"].update({"C:\\x": m["files"]["snn.json"]}), "'C:\\\\x'"),
        (lambda m: m["files"].pop(GOLDEN_FILE), GOLDEN_FILE),
    ],
)
def test_a_bad_manifest_is_refused(bundle: Path, edit: Callable[[Any], Any], named: str) -> None:
    _edit_manifest(bundle, edit)
    assert _objects(bundle) == {named}


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(SpikeguardError, match=r"manifest\.json"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(SpikeguardError, match="does not exist"):
        open_bundle(tmp_path)


def test_a_file_the_bundle_has_not_is_a_clear_error(original: Path) -> None:
    with pytest.raises(SpikeguardError, match=r"has no model\.net"):
        open_bundle(original).file("model.net")


def test_a_card_of_another_network_is_refused(bundle: Path) -> None:
    _edit_manifest(bundle, lambda m: m["semantics"].update(steps=99))
    with pytest.raises(SpikeguardError, match="semantics card"):
        _ = open_bundle(bundle).network


def test_verification_counts_what_differs_from_the_golden_traces(bundle: Path) -> None:
    arrays = read_arrays(bundle / GOLDEN_FILE)
    arrays["readouts"][0, 0] += 1
    arrays["membranes.pop0"][1, 0, :2] += 64
    write_arrays(bundle / GOLDEN_FILE, arrays)
    _forge(bundle, GOLDEN_FILE, (bundle / GOLDEN_FILE).read_bytes())
    rows = verify_bundle(open_bundle(bundle))
    for row in rows:
        found = (row.mismatched_spikes, row.mismatched_membranes, row.mismatched_readouts)
        assert found == ((None, None, 1) if row.file in (ONNX_FILE, ONNX_INT8_FILE) else (0, 2, 1))
        assert not row.equal


def test_verification_finds_a_file_of_another_network(bundle: Path, tmp_path: Path) -> None:
    from exporters.nir import write_nir
    from exporters.onnx import write_step_onnx

    other = random_network(np.random.default_rng(21), hidden=2)
    other.readout.bias[:] += 1
    write_nir(other, tmp_path / "other.nir", "if", allow_deviations=True)
    write_step_onnx(other, tmp_path / "other.onnx")
    _forge(bundle, NIR_FILE, (tmp_path / "other.nir").read_bytes())
    _forge(bundle, ONNX_STEP_FILE, (tmp_path / "other.onnx").read_bytes())
    assert {row.file for row in verify_bundle(open_bundle(bundle)) if not row.equal} == {
        NIR_FILE,
        ONNX_STEP_FILE,
    }


def test_golden_arrays_must_belong_to_the_network(bundle: Path) -> None:
    arrays = read_arrays(bundle / GOLDEN_FILE)
    write_arrays(bundle / GOLDEN_FILE, {**arrays, "inputs": arrays["inputs"][1:]})
    _forge(bundle, GOLDEN_FILE, (bundle / GOLDEN_FILE).read_bytes())
    with pytest.raises(SpikeguardError, match="3 inputs and 4 traces"):
        _ = open_bundle(bundle).golden


def test_golden_activity_of_the_float_network_must_be_of_the_golden_inputs(bundle: Path) -> None:
    with pytest.raises(SpikeguardError, match=r"has no golden\.float\.npz"):
        _ = open_bundle(bundle).float_golden
    for samples in (4, 3):
        spikes = np.zeros((samples, 2, 5), bool)
        activity = FloatActivity(np.ones((samples, 3), np.float32), {"neurons": spikes})
        arrays = pack_float_golden(FloatGolden(activity, {"neurons": spikes}))
        content = arrays_as_bytes(arrays)
        _forge(bundle, FLOAT_GOLDEN_FILE, content)
        if samples == 4:
            assert open_bundle(bundle).float_golden.activity.spikes["neurons"].shape == spikes.shape
    with pytest.raises(SpikeguardError, match="not of the golden inputs"):
        _ = open_bundle(bundle).float_golden


def test_verification_needs_no_training_software(original: Path) -> None:
    code = f"""
import sys
for name in ("torch", "snntorch", "onnx", "sklearn", "scipy", "matplotlib", "lava"):
    sys.modules[name] = None
from pathlib import Path
from hardware.formats.bundle import open_bundle
from hardware.formats.verify import verify_bundle
rows = verify_bundle(open_bundle(Path({str(original)!r})))
sys.exit(0 if len(rows) == 7 and all(row.equal for row in rows) else 1)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
