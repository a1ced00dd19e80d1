"""Strict NIR reader: unsafe files are refused before parsing, inconsistent ones with what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from exporters.nir import write_nir
from hardware.errors import RuleViolations, SpikeguardError
from hardware.formats import hdf5_guard
from hardware.formats.nir_file import read_nir
from tests.networks import random_network


@pytest.fixture
def model(tmp_path: Path) -> Path:
    # input -> pop0 (conv) -> pop1 (conv) -> out (dense, flattened)
    network = random_network(np.random.default_rng(1), hidden=2, constant_channels=1)
    assert [s.kind for s in network.synapses] == ["conv", "conv", "dense"]
    write_nir(network, tmp_path / "model.nir", "if", allow_deviations=True)
    return tmp_path / "model.nir"


def _replace(group: h5py.Group, name: str, value: Any) -> None:
    del group[name]
    group[name] = value


def _change(name: str, edit: Callable[[Any], Any]) -> Callable[[h5py.File], None]:
    """Change one data set of one node, ``node/field``."""

    def apply(file: h5py.File) -> None:
        node, field = name.split("/")
        group = file["node/nodes"][node]
        _replace(group, field, edit(group[field][()]))

    return apply


def _set(index: tuple[int, ...], value: float) -> Callable[[Any], Any]:
    def edit(array: Any) -> Any:
        array[index] = value
        return array

    return edit


def _edges(edit: Callable[[list[list[bytes]]], list[Any]]) -> Callable[[h5py.File], None]:
    def apply(file: h5py.File) -> None:
        _replace(file["node"], "edges", edit(file["node/edges"][()].tolist()))

    return apply


def _metadata(edit: Callable[[Any], Any]) -> Callable[[h5py.File], None]:
    def apply(file: h5py.File) -> None:
        group = file["node/metadata"]
        card = json.loads(group["spikeguard"][()])
        edit(card)
        _replace(group, "spikeguard", json.dumps(card))

    return apply


def _add_scale_node(file: h5py.File) -> None:
    node = file["node/nodes"].create_group("gain")
    node["type"] = "Scale"
    node["scale"] = np.ones(3, np.float32)


def _unknown_type(file: h5py.File) -> None:
    _replace(file["node/nodes/pop0"], "type", "Wormhole")


def _missing_field(file: h5py.File) -> None:
    del file["node/nodes/input_to_pop0/weight"]


def _external_link(file: h5py.File) -> None:
    del file["node/nodes/pop0/r"]
    file["node/nodes/pop0/r"] = h5py.ExternalLink("/etc/elsewhere.h5", "/r")


def _soft_link(file: h5py.File) -> None:
    del file["node/nodes/pop0/r"]
    file["node/nodes/pop0/r"] = h5py.SoftLink("/node/nodes/pop0/v_reset")


def _group_in_itself(file: h5py.File) -> None:
    file["node/nodes/again"] = file["node"]


def _external_data(file: h5py.File) -> None:
    file["node"].create_dataset("raw", (4,), "f4", external=[("/etc/hostname", 0, 16)])


def _declare_terabytes(file: h5py.File) -> None:
    file["node"].create_dataset("huge", (2**38,), "f4", chunks=(2**10,), compression="gzip")


def _declare_a_huge_chunk(file: h5py.File) -> None:
    file["node"].create_dataset("huge", (4,), "f4", chunks=(2**29,), maxshape=(None,), compression="gzip")


BAD_FILES: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "external link": (_external_link, "ExternalLink"),
    "soft link": (_soft_link, "SoftLink"),
    "group in itself": (_group_in_itself, "second hard link"),
    "external data": (_external_data, "external or virtual"),
    "terabytes": (_declare_terabytes, "declared size"),
    "huge chunk": (_declare_a_huge_chunk, "declared size"),
    "unknown node": (_add_scale_node, "gain: node is in the metadata"),
    "unknown type": (_unknown_type, "not a well-formed NIR graph"),
    "missing field": (_missing_field, "not a well-formed NIR graph"),
    "NaN weight": (
        _change("input_to_pop0/weight", _set((0, 0, 0, 0), np.nan)),
        "input_to_pop0: weight is finite",
    ),
    "half weight": (_change("pop1_to_out/weight", _set((0, 0), 0.5)), "pop1_to_out: weight holds integers"),
    "huge weight": (
        _change("pop1_to_out/weight", _set((0, 0), 2.0**40)),
        "pop1_to_out: weight holds integers",
    ),
    "wide weight": (_change("pop1_to_out/weight", _set((0, 0), 2.0**20)), "weights fit"),
    "infinite bias": (_change("pop1_to_out/bias", _set((0,), np.inf)), "bias is finite"),
    "threshold": (_change("pop0/v_threshold", _set((0, 0, 0), 1.0)), "pop0: v_threshold is the profile's"),
    "NaN threshold": (_change("pop0/v_threshold", _set((0, 0, 0), np.nan)), "pop0: v_threshold"),
    "reset": (_change("pop0/v_reset", _set((0, 0, 0), 1.0)), "pop0: v_reset is the profile's"),
    "stride": (_change("input_to_pop0/stride", lambda s: s + 1), "input_to_pop0: stride"),
    "groups": (_change("input_to_pop0/groups", lambda g: g + 1), "input_to_pop0: groups"),
    "flatten": (_change("pop1_to_out_flatten/start_dim", lambda _d: 1), "flattens its whole source"),
    "missing edge": (_edges(lambda edges: edges[1:]), "edge of the metadata exists"),
    "cycle": (_edges(lambda edges: [*edges, [b"pop1", b"input_to_pop0"]]), "edge is in the metadata"),
    "double edge": (_edges(lambda edges: [*edges, edges[0]]), "edge is listed once"),
    "other threshold": (
        _metadata(lambda c: c["network"]["populations"][0].update(threshold=1)),
        "v_threshold",
    ),
    "other profile": (_metadata(lambda c: c.update(profile="cuba")), "neuron is its profile's"),
    "NaN scale": (_metadata(lambda c: c["network"]["populations"][0].update(scale=float("nan"))), "scale"),
    "other steps": (_metadata(lambda c: c["network"].update(steps=99)), "semantics card"),
    "unknown field": (_metadata(lambda c: c.update(colour=1)), "colour"),
    "unknown population": (
        _metadata(lambda c: c["network"]["synapses"][0].update(source="x")),
        "unknown population",
    ),
    "huge population": (
        _metadata(lambda c: c["network"]["populations"][-1].update(shape=[2**28, 2**28])),
        "population size",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_with_what_is_wrong(model: Path, name: str) -> None:
    damage, named = BAD_FILES[name]
    read_nir(model)
    with h5py.File(model, "r+") as file:
        damage(file)
    with pytest.raises(SpikeguardError) as caught:
        read_nir(model)
    assert named in str(caught.value)


def test_a_string_that_claims_gigabytes_is_refused_before_it_is_allocated(model: Path) -> None:
    with h5py.File(model, "r") as file:
        offset = file["node/metadata/spikeguard"].id.get_offset()
    content = bytearray(model.read_bytes())
    content[offset : offset + 4] = (2**31).to_bytes(4, "little")
    model.write_bytes(content)
    with pytest.raises(RuleViolations, match=r"strings fit the file \(has 2,147"):
        read_nir(model)


def test_strings_in_chunks_are_refused_because_their_lengths_cannot_be_seen(model: Path) -> None:
    with h5py.File(model, "r+") as file:
        file["node"].create_dataset("names", data=["a", "b"], chunks=(1,))
    with pytest.raises(RuleViolations, match="stored plainly"):
        read_nir(model)


def test_external_links_are_refused_before_their_target_is_opened(model: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["r"] = np.ones(3, np.float32)
    with h5py.File(model, "r+") as file:
        del file["node/nodes/pop0/r"]
        file["node/nodes/pop0/r"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/r")
    with pytest.raises(RuleViolations, match="ExternalLink"):
        read_nir(model)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(model: Path, keep: float) -> None:
    content = model.read_bytes()
    model.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(SpikeguardError, match=r"model\.nir"):
        read_nir(model)


def test_a_file_without_metadata_is_refused(model: Path) -> None:
    with h5py.File(model, "r+") as file:
        del file["node/metadata"]
    with pytest.raises(SpikeguardError, match="metadata"):
        read_nir(model)


def test_size_is_checked_before_parsing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_guard, "MAX_FILE_BYTES", 1000)
    with pytest.raises(SpikeguardError, match="more than the 1,000 allowed"):
        read_nir(model)


def test_reading_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, hardware.formats.verify, hardware.formats.nir_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
