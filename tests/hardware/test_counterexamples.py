"""The corpus of counterexamples on disk, and in bundles that are never edited."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.bundle import export_target, grow_bundle, write_bundle
from hardware.errors import RuleViolations, SpikeguardError
from hardware.files import read_arrays, write_arrays
from hardware.formats.bundle import COUNTEREXAMPLES_FILE, NIR_FILE, ONNX_FILE, ONNX_STEP_FILE, Bundle, open_bundle
from hardware.formats.counterexamples import (
    Counterexamples,
    load_counterexamples,
    merge,
    no_counterexamples,
    save_counterexamples,
)
from hardware.formats.verify import verify_bundle
from tests.networks import random_codes, random_network

NETWORK = random_network(np.random.default_rng(21), hidden=2)
SHAPE = NETWORK.input.shape


def corpus(count: int = 5, seed: int = 0) -> Counterexamples:
    rng = np.random.default_rng(seed)
    codes, clean = rng.integers(0, NETWORK.input.max_code + 1, (2, count, *SHAPE)).astype(np.uint8)
    wrong = rng.random((2, count)) < 0.5
    return Counterexamples(codes, clean, rng.integers(0, NETWORK.classes, count), *wrong)


def same(one: Counterexamples, other: Counterexamples) -> bool:
    return all(np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("corpus") / "bundle"
    codes = random_codes(np.random.default_rng(0), NETWORK)
    models = (NIR_FILE, ONNX_FILE, ONNX_STEP_FILE)
    write_bundle(folder, NETWORK, golden_codes=codes, float_model_files={}, provenance={"a": 1}, models=models)
    return open_bundle(folder)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    for count in (0, 1, 5):
        save_counterexamples(tmp_path / "c.npz", corpus(count))
        assert same(load_counterexamples(tmp_path / "c.npz", NETWORK), corpus(count))


def test_merged_corpora_hold_each_image_once_and_the_first_stays_first() -> None:
    first, second = corpus(5), corpus(4, seed=1)
    merged = merge([first, second, first[np.array([3, 1])]])
    assert len(merged) == 9
    assert same(merged[np.arange(5)], first)
    assert same(merged[np.arange(5, 9)], second)
    assert len(merge([no_counterexamples(SHAPE)])) == 0


def test_an_image_is_another_with_another_label_or_origin() -> None:
    one = corpus(1)
    labels, clean = (one.labels + 1) % NETWORK.classes, one.clean ^ 1
    assert len(merge([one, replace(one, labels=labels), replace(one, clean=clean)])) == 3
    assert len(merge([one, replace(one, deployed_wrong=~one.deployed_wrong)])) == 1, "what was wrong is no identity"


@pytest.mark.parametrize("name", ["codes", "clean", "labels"])
def test_an_exchanged_image_is_not_what_its_hash_says(tmp_path: Path, name: str) -> None:
    path = tmp_path / "c.npz"
    save_counterexamples(path, corpus())
    arrays = read_arrays(path)
    arrays[name] = np.roll(arrays[name], 1, axis=0)
    write_arrays(path, arrays)
    with pytest.raises(SpikeguardError, match="not what their hashes say"):
        load_counterexamples(path, NETWORK)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"codes": np.zeros((5, 1, 2, 2), np.uint8)}, "codes"),
        ({"clean": np.zeros((5, *SHAPE), np.int16)}, "clean"),
        ({"labels": np.int64(3), "codes": np.zeros(SHAPE, np.uint8), "clean": np.zeros(SHAPE, np.uint8)}, "labels"),
        ({"labels": np.full(5, NETWORK.classes)}, "labels"),
        ({"labels": np.full(5, -1)}, "labels"),
        ({"reference_wrong": np.zeros(4, np.bool_)}, "reference_wrong"),
        ({"codes": np.zeros((5, 1, 2, 2), np.uint8), "deployed_wrong": np.zeros(5)}, "deployed_wrong"),
    ],
)
def test_what_is_not_of_the_network_is_named(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = tmp_path / "c.npz"
    save_counterexamples(path, corpus())
    write_arrays(path, read_arrays(path) | change)
    with pytest.raises(RuleViolations, match=told):
        load_counterexamples(path, NETWORK)


def test_a_file_without_its_arrays_is_named(tmp_path: Path) -> None:
    write_arrays(tmp_path / "c.npz", {"codes": corpus().codes})
    with pytest.raises(SpikeguardError, match=r"c\.npz holds codes, not clean, codes"):
        load_counterexamples(tmp_path / "c.npz", NETWORK)


def test_a_grown_bundle_is_a_new_one_and_otherwise_the_same(bundle: Bundle, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in bundle.path.iterdir()}
    assert len(bundle.counterexamples) == 0
    grow_bundle(bundle, corpus(), tmp_path / "grown")
    assert {path.name: path.read_bytes() for path in bundle.path.iterdir()} == before
    grown = open_bundle(tmp_path / "grown")
    assert same(grown.counterexamples, corpus())
    assert all(row.equal for row in verify_bundle(grown))
    files = dict(grown.manifest.files)
    assert files.pop(COUNTEREXAMPLES_FILE).bytes == grown.file(COUNTEREXAMPLES_FILE).stat().st_size
    assert files == bundle.manifest.files
    assert grown.manifest.provenance == bundle.manifest.provenance
    grow_bundle(grown, merge([corpus(), corpus(3, seed=7)]), tmp_path / "again")
    assert len(open_bundle(tmp_path / "again").counterexamples) == 8


def test_nothing_is_grown_over_what_is_there(bundle: Bundle) -> None:
    for folder in (bundle.path, bundle.path / "grown"):
        with pytest.raises(SpikeguardError, match="never edited"):
            grow_bundle(bundle, corpus(), folder)
    open_bundle(bundle.path)


def test_a_corpus_travels_to_the_bundle_of_another_target(bundle: Bundle, tmp_path: Path) -> None:
    grow_bundle(bundle, corpus(), tmp_path / "grown")
    export_target(open_bundle(tmp_path / "grown"), "onnx", tmp_path / "onnx", {})
    assert same(open_bundle(tmp_path / "onnx").counterexamples, corpus())
