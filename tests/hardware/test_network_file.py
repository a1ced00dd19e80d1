"""The integer network's files: exact round trip, narrow types, and every damage named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from safetensors.numpy import load_file, save_file

from hardware.errors import RuleViolations, SpikeguardError
from hardware.formats.network_file import ARRAYS_FILE, JSON_FILE, load_network, narrowest, save_network
from hardware.network import IntegerNetwork
from tests.networks import networks, random_network, same_network


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_network(random_network(np.random.default_rng(3), constant_channels=1, hidden=2), tmp_path)
    return tmp_path


@given(network=networks())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip_is_exact(network: IntegerNetwork, tmp_path: Path) -> None:
    save_network(network, tmp_path)
    assert same_network(load_network(tmp_path), network)


@pytest.mark.parametrize(
    ("largest", "dtype"), [(127, np.int8), (128, np.int16), (-(2**15) - 1, np.int32), (2**40, np.int64)]
)
def test_integers_take_the_narrowest_type(largest: int, dtype: type) -> None:
    stored = narrowest(np.array([0, largest], np.int64))
    assert stored.dtype == dtype
    assert stored.tolist() == [0, largest]


def test_eight_bit_weights_take_one_byte(saved: Path) -> None:
    types = {name: array.dtype for name, array in load_file(saved / ARRAYS_FILE).items()}
    assert {types[name] for name in types if name.startswith("weight")} <= {
        np.dtype(np.int8),
        np.dtype(np.int16),
    }


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_network(random_network(np.random.default_rng(5)), tmp_path / name)
    for file in (JSON_FILE, ARRAYS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def _edit(path: Path, change: Any) -> None:
    value = json.loads((path / JSON_FILE).read_text())
    change(value)
    (path / JSON_FILE).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda v: v["populations"][0].update(scale=float("nan")), "populations.0.scale"),
        (lambda v: v["populations"][0].update(scale=float("inf")), "populations.0.scale"),
        (lambda v: v["populations"][0].update(scale=-1.0), "populations.0.scale"),
        (lambda v: v["populations"][0].update(threshold="3"), "populations.0.threshold"),
        (lambda v: v["populations"][0].update(colour=1), "populations.0.colour"),
        (lambda v: v["synapses"][0].update(stride=0), "synapses.0.stride"),
        (lambda v: v["synapses"][0].update(kind="sparse"), "synapses.0.kind"),
        (lambda v: v["input"].pop("shape"), "input.shape"),
        (lambda v: v.update(format="spikeguard.network/2"), "format"),
        (lambda v: v["populations"][0].update(shape=[2**30]), "populations.0.shape"),
        (lambda v: v.update(steps=True), "steps"),
        (lambda v: v["populations"][0].update(shape=[1, 1, 1]), "bias.0"),
        (lambda v: v["synapses"].pop(), "weight."),
        (lambda v: v["synapses"][0].update(source="nobody"), "nobody"),
    ],
)
def test_a_bad_field_is_named(saved: Path, change: Any, named: str) -> None:
    _edit(saved, change)
    with pytest.raises(RuleViolations, match=named):
        load_network(saved)


def test_all_bad_fields_are_named_at_once(saved: Path) -> None:
    _edit(saved, lambda v: (v.update(steps=0), v["populations"][0].update(scale=0.0)))
    with pytest.raises(RuleViolations) as caught:
        load_network(saved)
    assert {row.object for row in caught.value.violations} == {"steps", "populations.0.scale"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda a: a.update({"bias.0": a["bias.0"].astype(np.float32)}), "bias.0"),
        (lambda a: a.update({"weight.0": a["weight.0"].astype(np.int64)}), "weight.0"),
        (lambda a: a.pop("bias.1"), "bias.1"),
        (lambda a: a.update({"extra": np.zeros(2, np.int8)}), "extra"),
    ],
)
def test_a_bad_array_is_named(saved: Path, change: Any, named: str) -> None:
    arrays = load_file(saved / ARRAYS_FILE)
    change(arrays)
    save_file(arrays, saved / ARRAYS_FILE)
    with pytest.raises(RuleViolations, match=named):
        load_network(saved)


@pytest.mark.parametrize("file", [JSON_FILE, ARRAYS_FILE])
def test_truncated_and_missing_files_are_refused(saved: Path, file: str) -> None:
    content = (saved / file).read_bytes()
    (saved / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(SpikeguardError, match=file):
        load_network(saved)
    (saved / file).unlink()
    with pytest.raises(SpikeguardError, match="does not exist"):
        load_network(saved)


def test_provenance_must_be_plain_json(tmp_path: Path) -> None:
    network = replace(random_network(np.random.default_rng(1)), provenance={"when": object()})
    with pytest.raises(SpikeguardError, match="provenance"):
        save_network(network, tmp_path)
