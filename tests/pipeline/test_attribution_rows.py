"""What a bundle says of each kind of rounding: taken as it was measured, or refused with all that is wrong."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from exporters.bundle import export_target, write_bundle
from hardware.errors import RuleViolations
from hardware.formats.bundle import Bundle, open_bundle
from pipeline.attribution import EVERYTHING
from pipeline.bundle_tables import attribution_table
from pipeline.fidelity.attribution import MAX_ROWS, attribution_rows
from pipeline.fidelity.wording import worst_share
from pipeline.models.float_file import float_files
from pipeline.quantization import quantize
from tests.pipeline.samples import random_images, spiking_network

CODES = random_images((1, 8, 8), 6, 1)


def write(folder: Path, provenance: dict[str, Any] | None = None) -> tuple[Bundle, list[dict[str, Any]]]:
    """A bundle, and the rows its quantiser measured; they are its provenance unless another is given."""
    network = spiking_network("conv", seed=1, steps=3)
    result = quantize(network, CODES, 8, {})
    rows = [asdict(row) for row in result.attribution]
    write_bundle(
        folder,
        result.network,
        golden_codes=CODES[:2],
        float_model_files=float_files(network),
        provenance={"attribution": rows} if provenance is None else provenance,
        models=(),
    )
    return open_bundle(folder), rows


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, list[dict[str, Any]]]:
    return write(tmp_path_factory.mktemp("attribution") / "bundle")


def test_rows_come_out_of_a_bundle_as_the_quantiser_measured_them(
    measured: tuple[Bundle, list[dict[str, Any]]], tmp_path: Path
) -> None:
    bundle, rows = measured
    assert rows[-1]["rounded"] == EVERYTHING
    assert attribution_rows(bundle) == rows
    export_target(bundle, "onnx", tmp_path / "other", {})
    assert attribution_rows(open_bundle(tmp_path / "other")) == rows


def test_a_bundle_made_without_rows_has_none(tmp_path: Path) -> None:
    bundle, _ = write(tmp_path / "bundle", {})
    assert attribution_rows(bundle) == []


SPOILED = {
    "an unknown field": ({"more": 1}, "attribution.0.more"),
    "a missing field": ({"samples": None}, "attribution.0.samples"),
    "a share above one": ({"disagreement": {"conv": 1.5}}, "attribution.0.disagreement.conv"),
    "a share that is no number": ({"disagreement": {"conv": float("nan")}}, "attribution.0.disagreement.conv"),
    "a negative error": ({"logit_error": -0.1}, "attribution.0.logit_error"),
    "a count of words": ({"argmax_flips": "2"}, "attribution.0.argmax_flips"),
    "no image": ({"samples": 0}, "attribution.0.samples"),
    "a name without end": ({"rounded": "x" * 201}, "attribution.0.rounded"),
    "populations of another network": ({"disagreement": {"other": 0.5}}, "nothing"),
    "more changes than images": ({"argmax_flips": 7}, "nothing"),
}


@pytest.mark.parametrize(("change", "named"), SPOILED.values(), ids=SPOILED.keys())
def test_rows_that_cannot_be_of_the_network_are_refused_by_name(
    measured: tuple[Bundle, list[dict[str, Any]]], change: dict[str, Any], named: str
) -> None:
    bundle, rows = measured
    with pytest.raises(RuleViolations, match=r"manifest\.json") as caught:
        attribution_rows(spoiled(bundle, [rows[0] | change, *rows[1:]]))
    assert [violation.object for violation in caught.value.violations] == [named]


@pytest.mark.parametrize("value", [None, "rows", {"rounded": "weights"}, 3])
def test_what_are_no_rows_is_refused(measured: tuple[Bundle, list[dict[str, Any]]], value: Any) -> None:
    with pytest.raises(RuleViolations, match="array"):
        attribution_rows(spoiled(measured[0], value))


def test_rows_without_end_are_refused(measured: tuple[Bundle, list[dict[str, Any]]]) -> None:
    bundle, rows = measured
    with pytest.raises(RuleViolations, match="at most"):
        attribution_rows(spoiled(bundle, rows[:1] * (MAX_ROWS + 1)))


def spoiled(bundle: Bundle, value: Any) -> Bundle:
    """The same bundle, its manifest with other rows."""
    provenance = {"attribution": value}
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"provenance": provenance}))


def test_the_table_names_the_worst_layer_and_counts_the_changed_classes() -> None:
    rows = [
        {"rounded": "nothing", "disagreement": {"a": 0.0, "b": 0.0}, "logit_error": 2.5e-8, "argmax_flips": 0,
         "samples": 1256},
        {"rounded": "weights", "disagreement": {"a": 0.02, "b": 0.0125}, "logit_error": 0.0371, "argmax_flips": 2,
         "samples": 64},
    ]  # fmt: skip
    assert [[cell.replace("\u00a0", " ") for cell in row] for row in attribution_table(rows).rows] == [
        ["nothing", "0.00 %", "2.5e−08", "0 of 1,256"],
        ["weights", "2.00 % (a)", "0.0371", "2 of 64"],
    ]


def test_a_network_without_spikes_has_no_worst_layer() -> None:
    assert worst_share({}) == "–"
