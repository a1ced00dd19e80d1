"""A sweep: right figures at every point, each kept as soon as it is known, refusals as rows."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from hardware.errors import SpikeguardError
from hardware.network import IntegerNetwork
from hardware.reference import run_reference
from hardware.surrogates import TRIANGLE
from hardware.targets.loihi2 import LOIHI2
from hardware.targets.rules import placement
from pipeline import training
from pipeline.attacks import ensemble
from pipeline.attacks.ensemble import Member
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import Codes, FloatTarget, Labels, to_images
from pipeline.commands import terminal
from pipeline.config import FidelityConfig, validate_config
from pipeline.data import Dataset
from pipeline.fidelity import crafting
from pipeline.fidelity.crafting import Images
from pipeline.models.spiking import SpikingNetwork
from pipeline.quantization import quantize
from pipeline.statistics import judge, pair, tango_bound, wilson_interval
from pipeline.sweep import sweeping
from pipeline.sweep.grid import DEFAULT_BITS, Grid, grid_of, option_problems
from pipeline.sweep.plots import draw
from pipeline.sweep.points import Point, at_steps, measure_point
from pipeline.sweep.report import (
    accuracy_table,
    cost_table,
    notes_of,
    refusal_table,
    sweep_csv,
    sweep_report,
    write_sweep,
)
from pipeline.sweep.sweeping import Learning, Subject, SweepResult, run_sweep
from tests.pipeline.conftest import Call, SmallRun
from tests.pipeline.samples import random_images, spiking_network

SHAPE = (2, 3, 3)
STEPS = 4
GRID = Grid((8, 3), (2, 4))
SETTINGS = FidelityConfig(epsilon=0.1)


@pytest.fixture(autouse=True)
def short_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ensemble.PRESETS, "quick", (Member(TRIANGLE, steps=2),))  # type: ignore[arg-type]


def own_answers(network: SpikingNetwork, codes: Codes) -> Labels:
    answers: Labels = FloatTarget(network).logits(codes).argmax(1)
    return answers


def subject(network: SpikingNetwork | None = None) -> Subject:
    network = network or spiking_network("dense", steps=STEPS)
    codes = random_images(SHAPE, 12, seed=5)
    images = Images(codes, own_answers(network, codes), 3)
    return Subject(network, random_images(SHAPE, 16, seed=7), images, SETTINGS, "random")


def refused_subject() -> Subject:
    """No scale brings this threshold into the target's range."""
    network = spiking_network("dense", steps=STEPS)
    with torch.no_grad():
        dict(network.neurons())["neurons1"].threshold.fill_(1e9)
    return subject(network)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepResult, Path]:
    """A finished sweep and its folder, not to be changed."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ensemble.PRESETS, "quick", (Member(TRIANGLE, steps=2),))  # type: ignore[arg-type]
        return run_sweep(subject(), GRID, folder), folder


def without_seconds(result: SweepResult) -> list[Any]:
    return [replace(one, seconds=0.0) for one in (*result.references, *result.points)]


class TestGrid:
    def test_usual_steps_are_those_of_fine_tuning_half_and_twice_as_many(self) -> None:
        assert grid_of(None, None, 8) == Grid(DEFAULT_BITS, (4, 8, 16))
        assert grid_of(None, None, 1).steps == (1, 2)
        assert grid_of(None, None, 64).steps == (32, 64)

    def test_given_numbers_are_sorted_and_nothing_is_added(self) -> None:
        assert grid_of([2, 8], [16, 3], 8) == Grid((8, 2), (3, 16))

    def test_every_problem_is_listed_at_once(self) -> None:
        problems = option_problems(
            [1, 4, 4, 9], [0, 65, 8], 0, ["training.epochs=3", "fidelity.margin=0.05", "epsilon"]
        )
        text = "\n".join(problems)
        assert len(problems) == 8
        for told in ("--bits 1 ", "--bits 9 ", "--bits 4 is given 2", "--steps 0 ", "--steps 65 ", "--samples 0 "):
            assert told in text
        assert "training.epochs=3 changes nothing" in text
        assert "fidelity.margin=" not in text

    def test_what_is_right_is_no_problem(self) -> None:
        assert option_problems([2, 8], [1, 64], 1, ["fidelity.attacks=paper", "data.path=x"]) == []
        assert option_problems(None, None, None, []) == []


class TestPoint:
    def test_other_steps_run_the_same_weights(self) -> None:
        network, codes = spiking_network("dense", steps=4), to_images(random_images(SHAPE, 6))
        with torch.no_grad():
            changed, wanted = at_steps(network, 7)(codes), spiking_network("dense", steps=7)(codes)
            assert not torch.equal(changed, network(codes))
        assert torch.equal(changed, wanted)
        assert network.steps == 4

    @staticmethod
    def right_by_the_reference(network: IntegerNetwork, codes: Codes, labels: Labels) -> np.ndarray[Any, Any]:
        return np.asarray(run_reference(network, codes).readouts.argmax(1) == labels)

    def test_both_models_are_judged_on_one_union(self) -> None:
        """Images crafted on either count for both; each set of images matters to each model here."""
        network = spiking_network("dense", steps=STEPS)
        clean, on_float, on_integer = (random_images(SHAPE, 60, seed) for seed in (1, 2, 3))
        deployed = quantize(network, clean, 3, {}).network
        # Everything is right about half of the time.
        labels = np.where(np.arange(60) % 4 == 0, own_answers(network, on_float), own_answers(network, clean))
        labels = np.where(np.arange(60) % 4 == 1, own_answers(network, on_integer), labels)
        crafted = [Crafted(codes, np.zeros(60, bool), np.zeros(60), None, 0) for codes in (on_float, on_integer)]
        point = measure_point(
            FloatTarget(network), deployed, True, Images(clean, labels, 0), (crafted[0], crafted[1]), SETTINGS, 3
        )

        sets = (clean, on_float, on_integer)
        by_float = [own_answers(network, codes) == labels for codes in sets]
        by_integer = [self.right_by_the_reference(deployed, codes, labels) for codes in sets]
        outcome = pair(np.logical_and.reduce(by_float), np.logical_and.reduce(by_integer))
        for hits in (by_float, by_integer):
            full = np.logical_and.reduce(hits).sum()
            assert all(np.logical_and.reduce(hits[:n] + hits[n + 1 :]).sum() > full for n in range(3))
        row = point.worst_case
        assert row["reference_accuracy"] == outcome.reference_right / 60
        assert row["deployed_accuracy"] == outcome.deployed_right / 60
        assert row["discordant"] == [outcome.only_reference, outcome.only_deployed]
        assert row["deployed_interval"] == list(wilson_interval(outcome.deployed_right, 60))
        assert row["lower_bound"] == tango_bound(outcome, SETTINGS.confidence, "lower")
        assert row["verdict"] == judge(outcome, SETTINGS.margin, SETTINGS.confidence)
        assert point.clean["deployed_accuracy"] == by_integer[0].sum() / 60
        assert point.clean["reference_accuracy"] == by_float[0].sum() / 60

    def test_costs_are_those_of_its_own_network(self, whole: tuple[SweepResult, Path]) -> None:
        what = whole[0].subject
        for point in whole[0].points:
            network = quantize(at_steps(what.network, point.steps), what.calibration, point.bits, {}).network
            trace = run_reference(network, what.images.codes)
            spikes = sum(p.spikes.sum() for p in trace.populations.values() if p.spikes is not None)
            assert point.energy is not None
            assert point.placement is not None
            assert point.energy["spikes_per_image"] == pytest.approx(spikes / len(what.images.labels))
            placed = placement(network, LOIHI2)
            assert point.placement["weight_bytes"] == placed.weight_bytes
            assert point.placement["memory_bytes"] == placed.memory_bytes
            assert {synapse.bits for synapse in network.synapses} == {point.bits}


class TestSweep:
    def test_every_point_of_the_grid_is_there_and_says_what_was_fine_tuned(
        self, whole: tuple[SweepResult, Path]
    ) -> None:
        result, _ = whole
        assert [(point.steps, point.bits) for point in result.points] == [(2, 8), (2, 3), (4, 8), (4, 3)]
        assert [reference.steps for reference in result.references] == [2, 4]
        for one in (*result.references, *result.points):
            assert one.finetuned == (one.steps == STEPS)
            assert one.seconds > 0
        own = result.references[1]
        assert (own.clean.right, own.clean.samples, own.clean.accuracy) == (12, 12, 1.0)
        assert own.worst_case.right < 12
        for point in result.points:
            (reference,) = (one for one in result.references if one.steps == point.steps)
            # More images, among them all that the float SNN was attacked with by itself.
            assert point.worst_case["reference_accuracy"] <= reference.worst_case.accuracy
            assert point.clean["reference_accuracy"] == reference.clean.accuracy

    def test_a_second_run_computes_nothing(
        self, whole: tuple[SweepResult, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        result, folder = whole
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        for name in ("quantize", "craft_all", "measure_point", "measure_reference"):
            monkeypatch.setattr(sweeping, name, None)
        again = run_sweep(subject(), GRID, folder)
        assert (again.references, again.points) == (result.references, result.points)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    def test_a_larger_grid_computes_what_is_new_and_shares_what_was_crafted_on_the_float_network(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        crafted: list[str] = []
        run_ensemble = crafting.run_ensemble

        def counting(target: Any, *arguments: Any, **options: Any) -> Any:
            crafted.append(target.name)
            return run_ensemble(target, *arguments, **options)

        monkeypatch.setattr(crafting, "run_ensemble", counting)
        what = subject()
        run_sweep(what, Grid((8,), (4,)), tmp_path)
        run_sweep(what, Grid((8, 4), (4,)), tmp_path)
        assert crafted == ["float", "integer", "integer"]
        files = sorted(path.name.rpartition("-00000-")[0] for path in (tmp_path / "crafted").iterdir())
        assert files == ["T-4-4-bits", "T-4-8-bits", "T-4-float"]
        assert sorted(path.name.rpartition("-")[0] for path in (tmp_path / "points").iterdir()) == files

    def test_every_fact_that_determines_a_point_is_in_its_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        what = subject()
        images = what.images
        other = spiking_network("dense", steps=STEPS)
        with torch.no_grad():
            dict(other.neurons())["neurons1"].threshold.add_(1e-4)
        changed = [
            replace(what, network=other),
            replace(what, network=spiking_network("dense", steps=STEPS + 1)),
            replace(what, calibration=what.calibration[:-1]),
            replace(what, images=Images(images.codes ^ np.uint8(1), images.labels, images.seed)),
            replace(what, images=Images(images.codes, (images.labels + 1) % 4, images.seed)),
            replace(what, images=Images(images.codes, images.labels, images.seed + 1)),
            replace(what, images=Images(images.codes[:-1], images.labels[:-1], images.seed)),
            *(
                replace(what, settings=SETTINGS.model_copy(update=update))
                for update in ({"epsilon": 0.2}, {"margin": 0.05}, {"confidence": 0.9}, {"attacks": "paper"})
            ),
        ]
        keys = {one.key(4, 8) for one in (what, *changed)} | {what.key(4, 3), what.key(2, 8), what.key(4, None)}
        assert len(keys) == len(changed) + 4
        assert replace(what, settings=SETTINGS.model_copy(update={"certify": 5})).key(4, 8) in keys
        monkeypatch.setattr(sweeping, "source_digest", lambda: "other code")
        assert subject().key(4, 8) not in keys

    def test_a_kill_loses_one_point_at_most(
        self, whole: tuple[SweepResult, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measured: list[int] = []
        measure = sweeping.measure_point

        def killed_at_the_second(*arguments: Any) -> Point:
            if len(measured) == 1:
                raise KeyboardInterrupt
            measured.append(arguments[-1])
            return measure(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(sweeping, "measure_point", killed_at_the_second)
            with pytest.raises(KeyboardInterrupt):
                run_sweep(whole[0].subject, GRID, tmp_path)
        kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "points").iterdir()}
        assert [name.rpartition("-")[0] for name in sorted(kept)] == ["T-2-8-bits", "T-2-float"]
        for part in ("points", "crafted"):
            (tmp_path / part / ".T-2-3-bits.json.1.partial").write_text("half")  # as kill -9 would leave it
        resumed = run_sweep(whole[0].subject, GRID, tmp_path)
        assert without_seconds(resumed) == without_seconds(whole[0])
        assert {name: (tmp_path / "points" / name).stat().st_mtime_ns for name in kept} == kept
        assert not list(tmp_path.rglob("*.partial"))
        assert not list(tmp_path.rglob("*.half.npz"))

    def test_integers_learn_on_where_asked_for_and_are_found_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        codes = random_images(SHAPE, 24, seed=8)
        parts = [Dataset(part, own_answers(spiking_network("dense", steps=STEPS), part)) for part in np.split(codes, 2)]
        values = {"finetuning": {"batch_size": 4}, "quantization": {"epochs": 2, "learning_rate": 0.05}}
        what, grid = subject(), Grid((3,), (2, 4))
        taught = replace(what, learning=Learning(validate_config(values, "test"), *parts))
        rounded, learned = run_sweep(what, grid, tmp_path), run_sweep(taught, grid, tmp_path)
        assert learned.references == rounded.references
        trained = sorted(path.name for path in (tmp_path / "trained").glob("*.csv"))
        assert [name.rpartition("-")[0] for name in trained] == ["T-2-3-bits", "T-4-3-bits"]
        assert [one.energy for one in learned.points] != [one.energy for one in rounded.points]
        assert "learned on for 2 epochs" in notes_of(learned)[1]
        assert sweep_report(learned, "")["integer_epochs"] == 2

        for path in (tmp_path / "points").iterdir():
            path.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(training, "save_checkpoint", None)  # nothing is left to learn
            again = run_sweep(taught, grid, tmp_path)
        assert without_seconds(again) == without_seconds(learned)
        other = replace(taught, learning=replace(taught.learning, train=parts[1]))
        assert (other.key(2, 3) == taught.key(2, 3), other.key(2, None) == taught.key(2, None)) == (False, True)

    def test_a_fresh_sweep_takes_nothing_from_before(self, whole: tuple[SweepResult, Path], tmp_path: Path) -> None:
        what, grid = whole[0].subject, Grid((8,), (4,))
        run_sweep(what, grid, tmp_path)
        for path in tmp_path.rglob("*.json"):
            path.write_text("spoilt")
        for path in tmp_path.rglob("*.npz"):
            path.write_text("spoilt")
        with pytest.raises(SpikeguardError, match=r"holds no point of a sweep; delete it"):
            run_sweep(what, grid, tmp_path)
        fresh = run_sweep(what, grid, tmp_path, fresh=True)
        assert without_seconds(fresh) == [
            one for one in without_seconds(whole[0]) if one.steps == 4 and getattr(one, "bits", 8) == 8
        ]

    def test_a_refused_point_is_a_row_that_says_why(self, tmp_path: Path) -> None:
        result = run_sweep(refused_subject(), Grid((8, 2), (4,)), tmp_path)
        assert [point.verdict for point in result.points] == ["refused", "refused"]
        assert all(point.arms == () and point.energy is None for point in result.points)
        rows = refusal_table(result).rows
        assert [row[:3] for row in rows] == [("4", "8", "neurons1"), ("4", "2", "neurons1")]
        assert all("17 bits" in row[3] for row in rows)
        assert cost_table(result).rows == []
        write_sweep(result, tmp_path, "")
        told = json.loads((tmp_path / "sweep.json").read_text())["points"][0]
        assert (told["verdict"], told["violations"][0]["object"]) == ("refused", "neurons1")
        assert "neurons1: thresholds fit 17 bits" in (tmp_path / "sweep.csv").read_text()
        assert (tmp_path / "sweep.svg").read_text().count(">refused<") == 8  # two points in four panels
        assert run_sweep(result.subject, result.grid, tmp_path) == result


class TestReport:
    def test_the_file_says_what_was_swept_and_how(self, whole: tuple[SweepResult, Path]) -> None:
        report = sweep_report(whole[0], "spikeguard sweep run")
        assert report["schema"] == "spikeguard.sweep/1"
        assert (report["samples"], report["seed"], report["finetuned_steps"]) == (12, 3, STEPS)
        assert (report["epsilon"], report["budget_codes"], report["margin"]) == (0.1, 25, 0.02)
        assert report["reproduce"] == "spikeguard sweep run"
        assert report["versions"]["numpy"] == np.__version__
        assert len(report["points"]) == len(whole[0].points)
        assert f"Fine-tuned for T = {STEPS} only" in report["notes"][0]
        json.dumps(report, allow_nan=False)

    def test_the_csv_holds_every_point_and_float_network(self, whole: tuple[SweepResult, Path]) -> None:
        result, _ = whole
        rows = list(csv.DictReader(io.StringIO(sweep_csv(result))))
        assert [(row["steps"], row["bits"]) for row in rows] == [
            *(("2", bits) for bits in ("float", "8", "3")),
            *(("4", bits) for bits in ("float", "8", "3")),
        ]
        by_point = {(int(row["steps"]), row["bits"]): row for row in rows}
        for point in result.points:
            row = by_point[point.steps, str(point.bits)]
            assert float(row["worst_case_accuracy"]) == point.worst_case["deployed_accuracy"]
            assert float(row["worst_case_accuracy_low"]) == point.worst_case["deployed_interval"][0]
            assert float(row["float_worst_case_accuracy"]) == point.worst_case["reference_accuracy"]
            assert float(row["clean_lower_bound"]) == point.clean["lower_bound"]
            assert point.energy is not None
            assert float(row["synaptic_operations_per_image"]) == point.energy["synaptic_operations_per_image"]
            assert (row["samples"], row["verdict"]) == ("12", point.verdict)
        for reference in result.references:
            row = by_point[reference.steps, "float"]
            assert float(row["worst_case_accuracy"]) == reference.worst_case.accuracy
            assert row["verdict"] == row["weight_bytes"] == ""

    def test_tables_fit_100_columns(self, whole: tuple[SweepResult, Path]) -> None:
        result, _ = whole
        wide = replace(
            result,
            references=tuple(replace(one, steps=10 * one.steps) for one in result.references),
            points=tuple(replace(one, steps=10 * one.steps) for one in result.points),
        )
        for table, rows in ((accuracy_table(wide), 6), (cost_table(wide), 4)):
            assert len(table.rows) == rows
            console = Console(width=100)
            with console.capture() as capture:
                console.print(terminal.table(*table))
            lines = [line for line in capture.get().splitlines() if line.startswith("│")]
            assert len(lines) == rows, capture.get()  # no cell was folded
            for line, cells in zip(lines, table.rows, strict=True):
                assert all(cell in line for cell in cells)
            assert str(len(result.subject.images.labels)) in capture.get().splitlines()[0]

    def test_the_plot_names_its_axes_and_every_t_and_is_repeatable(self, whole: tuple[SweepResult, Path]) -> None:
        result, _ = whole
        pictures = draw(result.references, result.points, "a title")
        assert draw(result.references, result.points, "a title") == pictures
        assert pictures["png"].startswith(b"\x89PNG")
        words = self.words(pictures["svg"])
        for told in (
            "a title",
            "T = 2",
            f"T = {STEPS}, fine-tuned for it",
            "accuracy, %",
            "bits per weight",
            "thousands per image",
            "weights and neuron states, KiB",
            "float SNN, same T and images",
        ):
            assert told in words, told

    @staticmethod
    def words(svg: bytes) -> Sequence[str]:
        return [element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


class TestCommand:
    def test_a_run_is_swept_and_its_own_point_is_what_the_check_found(
        self, call: Call, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the attacks of the check, and from a run folder or its bundle alike."""
        monkeypatch.undo()
        arguments = ("--bits", 8, "--steps", 4, "--set", small_run.data, "--out", tmp_path)
        answer = call("sweep", small_run.folder, *arguments)
        assert answer.code == 0, answer.err
        report = json.loads((tmp_path / "sweep.json").read_text())
        (point,) = report["points"]
        checked = {arm["name"]: arm for arm in small_run.report["arms"]}
        found = {arm["name"]: arm for arm in point["arms"]}
        assert set(found) == {"clean", "worst case", "transfer", "adaptive"}
        for name in ("clean", "transfer", "adaptive"):
            assert found[name] == checked[name]
        assert found["worst case"]["deployed_accuracy"] >= checked["worst case"]["deployed_accuracy"]
        assert point["placement"] == small_run.report["placement"]
        assert point["finetuned"] is True
        for name in ("sweep.json", "sweep.csv", "sweep.svg", "sweep.png"):
            assert (tmp_path / name).stat().st_size > 0
            assert name in answer.out
        points = {path: path.stat().st_mtime_ns for path in (tmp_path / "points").iterdir()}
        again = call("sweep", small_run.bundle, *arguments)
        assert again.code == 0
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "points").iterdir()} == points
        assert json.loads((tmp_path / "sweep.json").read_text())["points"] == report["points"]

    def test_wrong_options_are_told_together_before_any_work(
        self, call: Call, small_run: SmallRun, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        answer = call(
            "sweep", small_run.folder, "--bits", 1, "--bits", 9, "--steps", 65, "--set", "seed=2", "--out", out
        )
        assert answer.code == 2
        assert answer.says("--bits 1", "--bits 9", "--steps 65", "--set seed=2")
        for more, told in (
            (("--samples", 81), "--samples 81 is more than the 80 test images"),
            (("--set", "fidelity.epsilon=2"), "fidelity.epsilon"),
        ):
            answer = call("sweep", small_run.folder, "--set", small_run.data, "--out", out, *more)
            assert (answer.code, answer.says(told)) == (2, True), answer.err
        assert not out.exists()

    def test_other_data_than_the_runs_are_refused(self, call: Call, small_run: SmallRun, tmp_path: Path) -> None:
        arrays = dict(np.load(small_run.config.with_name("digits.npz")))
        np.savez(tmp_path / "other.npz", images=arrays["images"][::-1], labels=arrays["labels"][::-1])
        data = f"data.path={tmp_path / 'other.npz'}"
        answer = call("sweep", small_run.folder, "--set", data, "--out", tmp_path / "out")
        assert (answer.code, answer.says("another test split")) == (1, True)
        assert not (tmp_path / "out").exists()
