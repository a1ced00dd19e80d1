"""A run: the stages in order, each kept in the run folder and reused as long as nothing it rests on has changed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from hardware.errors import SpikeguardError
from hardware.files import atomic_folder, read_json, sha256_of, write_bytes, write_json
from hardware.formats.bundle import COUNTEREXAMPLES_FILE, Bundle, open_bundle
from hardware.formats.counterexamples import Counterexamples, load_counterexamples, merge, save_counterexamples
from hardware.runtimes.lava import locate_lava_python
from pipeline.config import Config, portable_settings
from pipeline.data import Dataset, Splits, digest_of
from pipeline.data.loading import load_splits
from pipeline.fidelity.baseline import compare_with_natural
from pipeline.fidelity.check import CheckResult, Circumstances, run_check
from pipeline.fidelity.crafting import Images
from pipeline.fidelity.markdown import summarize
from pipeline.fidelity.page import render_report
from pipeline.fidelity.waterfall import EarlierNetworks
from pipeline.models.float_file import float_files, holds_spiking, load_float, load_rate
from pipeline.models.graph import LayerGraph
from pipeline.models.spiking import SpikingNetwork
from pipeline.progress import console
from pipeline.source import source_digest
from pipeline.stages import STAGES, Stage, quantization_images, start_network
from pipeline.training import Records

LAVA_RUNTIMES = ("lava", "netx")


class Run:
    """A configuration and the folder its results lie in.

    Args:
        config: what to do.
        folder: created if absent.
        reproduce: shell command for the report.
    """

    def __init__(self, config: Config, folder: Path, reproduce: str) -> None:
        self.config = config
        self.folder = folder
        self.reproduce = reproduce

    @cached_property
    def data(self) -> Splits:
        """The data set, split."""
        return load_splits(self.config.data, self.config.seed)

    @cached_property
    def data_digest(self) -> str:
        """Hash of all parts of the data."""
        parts = (self.data.train, self.data.validation, self.data.test)
        return hashlib.sha256("".join(map(digest_of, parts)).encode()).hexdigest()

    @cached_property
    def start_digest(self) -> str:
        """Hash of the network before training: the code of one's own network may change while its name stays."""
        files = float_files(start_network(self))
        return hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()

    def result(self, stage: str) -> Path:
        """Folder with a stage's results."""
        return self.folder / STAGES[stage].folder

    def ensure(self, until: str = "export", fresh: bool = False) -> dict[str, float]:
        """Do every stage up to and including ``until`` that has no valid result.

        Returns:
            Seconds each stage took when it was done.
        """
        seconds: dict[str, float] = {}
        names = list(STAGES)
        for name in names[: names.index(until) + 1]:
            if name == "baseline" and not self.config.fidelity.baseline:
                continue
            seconds[name] = self._ensure_stage(STAGES[name], fresh)
        return seconds

    def _ensure_stage(self, stage: Stage, fresh: bool) -> float:
        record_path = self.folder / "stages" / f"{stage.name}.json"
        key = self._key(stage)
        record = read_json(record_path) if record_path.is_file() and not fresh else {}
        target = self.folder / stage.folder
        if record.get("key") == key and record.get("files") == _files(target):
            console.print(f"[dim]{stage.name:<22} kept from an earlier run ({record['seconds']:.0f} s)[/dim]")
            return float(record["seconds"])
        for left_by_a_kill in target.parent.glob(f".{target.name}.*.partial"):
            shutil.rmtree(left_by_a_kill)
        if fresh:
            self._remove_checkpoints(stage)
        start = time.perf_counter()
        with atomic_folder(target) as partial:
            stage.work(self, partial)
        seconds = time.perf_counter() - start
        write_json(record_path, {"key": key, "files": _files(target), "seconds": seconds})
        self._remove_checkpoints(stage)
        return seconds

    def records(self, stage: str, part: str = "") -> Records:
        """Where a training within a stage keeps its checkpoint, until the stage is finished, and its log.

        Args:
            stage: name of the stage.
            part: tells several trainings of one stage apart.
        """
        name = f"{stage}-{part}" if part else stage
        return Records(
            self.folder / "checkpoints" / f"{name}.safetensors",
            self.folder / "logs" / f"{name}.csv",
            self._key(STAGES[stage]),
        )

    def _remove_checkpoints(self, stage: Stage) -> None:
        for path in (self.folder / "checkpoints").glob(f"*{stage.name}*"):  # half-written ones too
            path.unlink()

    def _key(self, stage: Stage) -> str:
        """Hash of all that determines a stage's result: code, settings, data, the results it reads."""
        settings = portable_settings(self.config)
        facts = {
            "stage": stage.name,
            "code": source_digest(),
            "torch": metadata.version("torch"),
            "settings": {name: settings[name] for name in ("seed", "data", *stage.sections)},
            "data": self.data_digest,
            "network": self.start_digest if "network" in stage.sections else None,
            "inputs": {name: _files(self.result(name)) for name in stage.inputs},
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a result folder; empty if there is none."""
    return {path.name: sha256_of(path) for path in sorted(folder.glob("*")) if path.is_file()}


def require_same_test_split(bundle: Bundle, test: Dataset) -> None:
    """Refuse to check a bundle on other images than its run set aside: they may have been trained on.

    Raises:
        SpikeguardError: if the bundle names another test split.
    """
    if bundle.manifest.provenance.get("test_split") != digest_of(test):
        raise SpikeguardError(
            f"{bundle.path} was made with another test split than the data here gives; bring the data of its run"
        )


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Keep other runs out of a run folder; the lock dies with the process.

    Raises:
        SpikeguardError: if another run is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SpikeguardError(
                f"another run is at work in {folder}; wait for it, or choose another --out"
            ) from error
        yield


def require_runtimes(config: Config) -> None:
    """Refuse before any work a configuration whose runtimes cannot run here.

    Raises:
        SpikeguardError: with the remedy.
    """
    if set(config.fidelity.runtimes) & set(LAVA_RUNTIMES):
        locate_lava_python()


def require_deployable(run: Run) -> None:
    """Refuse, before anything is trained, runtimes that cannot take the network it will become.

    Raises:
        SpikeguardError: with the remedy.
    """
    start, settings = start_network(run), run.config
    conversion = settings.conversion
    graph = start.graph
    if not isinstance(start, SpikingNetwork):
        graph = graph.spiking(conversion.beta, conversion.reset == "subtract")
    refused = {
        name: why
        for reasons in _obstacles(graph)
        for name, why in reasons.items()
        if name in settings.fidelity.runtimes
    }
    if refused:
        kept = [name for name in settings.fidelity.runtimes if name not in refused]
        raise SpikeguardError(
            f"network {settings.network!r} cannot run on "
            f"{'; '.join(f'{name}: {why}' for name, why in refused.items())}; "
            f"choose others, as in --set 'fidelity.runtimes=[{', '.join(kept or ['emulator'])}]'"
        )


def _obstacles(graph: LayerGraph) -> Iterator[dict[str, str]]:
    """By runtime, why it takes no such network; the exporters hold the integers to the same rules."""
    neurons = [layer.options for layer in graph.layers if layer.kind == "spike"]
    for name, sources in graph.sources.items():
        if len(sources) > 1:
            yield {"netx": f"its layers do not follow one another ({name} reads several)"}
            break
    if any(options["subtract"] for options in neurons):
        yield dict.fromkeys(LAVA_RUNTIMES, "its neurons subtract their threshold at the reset")


def without_lava(config: Config) -> tuple[Config, list[dict[str, str]]]:
    """The same configuration without Lava where there is none, and what is missing for that reason."""
    wanted = [name for name in config.fidelity.runtimes if name in LAVA_RUNTIMES]
    try:
        if wanted:
            locate_lava_python()
        return config, []
    except SpikeguardError as error:
        kept = tuple(name for name in config.fidelity.runtimes if name not in LAVA_RUNTIMES)
        fidelity = config.fidelity.model_copy(update={"runtimes": kept})
        reduced = config.model_copy(update={"fidelity": fidelity})
        return reduced, [{"name": name, "reason": str(error)} for name in wanted]


def check_run(run: Run, timings: Mapping[str, float], missing: list[dict[str, str]], jobs: int = 1) -> CheckResult:
    """The fidelity check of a run's bundle; writes report.json and its other forms beside it."""
    test = run.data.test
    images = Images(test.codes, test.labels, run.config.seed)
    circumstances = Circumstances(
        data=run.data.name,
        missing_runtimes=missing,
        baseline=_baseline(run, images) if run.config.fidelity.baseline else None,
        quantization=read_json(run.result("quantize") / "scales.json"),
        timings=timings,
        reproduce=run.reproduce,
        earlier=_earlier_networks(run),
        calibration=quantization_images(run.data.train, run.config.seed),
        jobs=jobs,
    )
    bundle = open_bundle(run.result("export"))
    corpus = collected_corpus([bundle], run.folder)
    result = run_check(bundle, images, run.config.fidelity, run.folder / "crafted", circumstances, corpus=corpus)
    write_report(result, run.folder)
    return result


def collected_corpus(bundles: Sequence[Bundle], folder: Path) -> Counterexamples:
    """Counterexamples of earlier checks: those in the bundles, and those that the last report left in its folder.

    Raises:
        SpikeguardError: if they are damaged, or of images that the first bundle's network cannot be shown.
    """
    network, left = bundles[0].network, folder / COUNTEREXAMPLES_FILE
    parts = [bundle.counterexamples for bundle in bundles]
    return merge([*parts, load_counterexamples(left, network)] if left.is_file() else parts)


def write_report(result: CheckResult, folder: Path) -> None:
    """Write report.json, the page made of it, its summary for a pull request, and the grown corpus."""
    save_counterexamples(folder / COUNTEREXAMPLES_FILE, result.counterexamples)
    write_json(folder / "report.json", result.report)
    write_bytes(folder / "report.md", summarize(result.report).encode())
    write_bytes(folder / "report.html", render_report(result.report, result.gallery).encode())


def _earlier_networks(run: Run) -> EarlierNetworks | None:
    trained = run.result("train")
    if holds_spiking(trained):
        return None
    return EarlierNetworks(load_rate(trained), load_float(run.result("convert")))


def _baseline(run: Run, images: Images) -> dict[str, Any]:
    natural, robust = load_float(run.result("baseline")), load_float(run.result("finetune"))
    return compare_with_natural(natural, robust, images, run.config.fidelity.epsilon)
