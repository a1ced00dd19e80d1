"""A run: the stages in order, each kept in the run folder and reused as long as nothing it rests on has changed."""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporters.bundle import write_bundle
from hardware.errors import SpikeguardError
from hardware.files import atomic_folder, read_json, sha256_of, write_bytes, write_json
from hardware.formats.bundle import Bundle, open_bundle
from hardware.formats.network_file import load_network, save_network
from hardware.runtimes.lava import locate_lava_python
from pipeline.attacks.black_box import random_noise
from pipeline.attacks.targets import budget_of
from pipeline.checkpoints import Epoch
from pipeline.config import Config, TrainingConfig
from pipeline.conversion import calibrate, convert
from pipeline.data import Dataset, Splits
from pipeline.data.loading import load_splits
from pipeline.fidelity.baseline import compare_with_natural
from pipeline.fidelity.check import CheckResult, Circumstances, run_check
from pipeline.fidelity.crafting import Images
from pipeline.fidelity.page import render_report
from pipeline.finetuning import finetune
from pipeline.models.float_file import float_files, load_float, load_rate
from pipeline.models.spiking import RateNetwork, SpikingNetwork
from pipeline.models.tracing import trace_network
from pipeline.models.zoo import NETWORKS
from pipeline.objectives import Objective, natural
from pipeline.progress import console
from pipeline.quantization import quantize
from pipeline.recipes import (
    augmentation_of,
    compute_of,
    finetuning_objective,
    schedule_of,
    training_objective,
)
from pipeline.source import source_digest
from pipeline.training import Records, fit, pixels

CALIBRATION_IMAGES = 256
GOLDEN_IMAGES = 16
LAVA_RUNTIMES = ("lava", "netx")


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        name: also of the folder its results lie in, unless ``folder`` says otherwise.
        sections: parts of the configuration it depends on.
        inputs: names of the stages whose results it reads.
        work: does it, writing into the given folder (which then appears complete or not at all).
        folder: where its results lie, relative to the run.
    """

    name: str
    sections: tuple[str, ...]
    inputs: tuple[str, ...]
    work: Callable[[Run, Path], None]
    folder: str

    def __str__(self) -> str:
        return self.name


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


def portable_settings(config: Config) -> dict[str, Any]:
    """Plain settings without where the data lie: moved data are the same data, and their bytes are hashed anyway."""
    return config.model_dump(mode="json", exclude={"data": {"path", "dir"}})


def digest_of(part: Dataset) -> str:
    """SHA-256 of a part of the data, labels included."""
    digest = hashlib.sha256(repr(part.codes.shape).encode())
    for array in (part.codes, part.labels):
        digest.update(np.ascontiguousarray(array).data)  # without a copy: a data set may fill half the memory
    return digest.hexdigest()


def require_same_test_split(bundle: Bundle, test: Dataset) -> None:
    """Refuse to check a bundle on other images than its run set aside: they may have been trained on.

    Raises:
        SpikeguardError: if the bundle names another test split.
    """
    if bundle.manifest.provenance.get("test_split") != digest_of(test):
        raise SpikeguardError(
            f"{bundle.path} was made with another test split than the data here gives; bring the data of its run"
        )


def build_network(name: str) -> nn.Module:
    """The torch module a configuration names: one of the zoo, or ``package.module:function`` found on the path.

    Raises:
        SpikeguardError: if there is no such function, or it returns something else.
    """
    if name in NETWORKS:
        return NETWORKS[name]()
    module_name, colon, function = name.partition(":")
    if not colon:
        raise SpikeguardError(
            f"network {name!r} is unknown; choose among {', '.join(NETWORKS)} or give package.module:function"
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        network = getattr(importlib.import_module(module_name), function)()
    except Exception as error:  # the user's own code may raise anything
        raise SpikeguardError(f"network {name!r} cannot be loaded ({error}); check the module and its name") from error
    finally:
        sys.path.pop(0)
    if not isinstance(network, nn.Module):
        raise SpikeguardError(f"network {name!r} returns {type(network).__name__}, expected a torch.nn.Module")
    return network


def start_network(run: Run) -> RateNetwork:
    """The configured network with fresh weights, as a layer graph."""
    torch.manual_seed(run.config.seed)
    traced = trace_network(build_network(run.config.network), run.data.input_shape)
    network = RateNetwork(traced.graph)
    for name, module in traced.modules.items():
        network.layers[name].load_state_dict(module.state_dict())
    outputs = traced.graph.shapes()[traced.graph.layers[-1].name]
    if outputs != (run.data.classes,):
        raise SpikeguardError(
            f"network {run.config.network!r} gives {outputs} outputs for {run.data.classes} classes; mend its end"
        )
    return network


def train_network(run: Run, folder: Path) -> None:
    """Train the ANN with the configured objective."""
    settings = run.config.training
    objective, label = training_objective(settings), f"train ANN ({settings.objective})"
    epsilon = 0.0 if settings.objective == "natural" else settings.epsilon
    save_network_files(folder, *_train(run, settings, objective, epsilon, label, run.records("train")))


def _train(
    run: Run, settings: TrainingConfig, objective: Objective, epsilon: float, label: str, records: Records
) -> tuple[RateNetwork, list[Epoch]]:
    network = start_network(run)
    history = fit(
        network,
        objective,
        run.data.train,
        run.data.validation,
        schedule_of(settings),
        epsilon=epsilon,
        seed=run.config.seed,
        label=label,
        parameter_groups=[{"params": list(network.parameters())}],
        augment=augmentation_of(settings),
        compute=compute_of(run.config.compute),
        records=records,
    )
    return network, history


def _finetune(
    run: Run, network: SpikingNetwork, objective: Objective, epsilon: float, label: str, records: Records
) -> list[Epoch]:
    settings = run.config.finetuning
    return finetune(
        network,
        objective,
        run.data.train,
        run.data.validation,
        schedule_of(settings),
        epsilon=epsilon,
        seed=run.config.seed,
        label=label,
        decay_thresholds=settings.decay_thresholds,
        augment=augmentation_of(settings),
        compute=compute_of(run.config.compute),
        records=records,
    )


def save_network_files(folder: Path, network: RateNetwork | SpikingNetwork, history: list[Epoch] | None = None) -> None:
    """Write a float network, and its training history as CSV."""
    for name, content in float_files(network).items():
        write_bytes(folder / name, content)
    if history:
        rows = [f"{n},{e.loss:.6f},{e.clean:.6f},{e.robust:.6f}" for n, e in enumerate(history, 1)]
        write_bytes(folder / "history.csv", "\n".join(["epoch,loss,clean,robust", *rows, ""]).encode())


def convert_network(run: Run, folder: Path) -> None:
    """ANN to SNN, thresholds calibrated on training images."""
    save_network_files(folder, _convert(run, load_rate(run.result("train"))))


def _convert(run: Run, network: RateNetwork) -> SpikingNetwork:
    settings = run.config.conversion
    spiking = convert(network, run.config.finetuning.steps)
    calibrate(
        spiking,
        calibration_batches(run, settings.batches, settings.batch_size),
        percentile=settings.percentile,
        calibration_steps=settings.calibration_steps,
        scale=settings.scale,
    )
    return spiking


def calibration_batches(run: Run, batches: int, batch_size: int) -> list[Tensor]:
    """Mini-batches of training images in seeded random order, as many as there are images for."""
    codes = torch.from_numpy(run.data.train.codes)
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(run.config.seed))
    return [pixels(codes[part]) for part in order.split(batch_size)[:batches]]


def finetune_network(run: Run, folder: Path) -> None:
    """Robust fine-tuning of the SNN."""
    settings = run.config.finetuning
    network = load_float(run.result("convert"))
    objective = finetuning_objective(settings)
    history = _finetune(run, network, objective, settings.epsilon, "fine-tune SNN", run.records("finetune"))
    save_network_files(folder, network, history)


def train_baseline(run: Run, folder: Path) -> None:
    """The same pipeline without an attack in it, to show what robust training buys."""
    settings = run.config.training
    short = settings.model_copy(update={"epochs": max(settings.epochs // 4, 1)})
    network, _ = _train(run, short, natural(), 0.0, "natural ANN", run.records("baseline", "ann"))
    spiking = _convert(run, network)
    history = _finetune(run, spiking, natural(), 0.0, "natural SNN", run.records("baseline", "snn"))
    save_network_files(folder, spiking, history)


def quantize_network(run: Run, folder: Path) -> None:
    """Float SNN to integer network."""
    settings = run.config
    order = np.random.default_rng(settings.seed).permutation(len(run.data.train))[:CALIBRATION_IMAGES]
    known = portable_settings(settings)
    provenance = {"config": {name: known[name] for name in WITHOUT_FIDELITY}, "data": settings.data.name}
    result = quantize(
        load_float(run.result("finetune")),
        run.data.train.codes[order],
        settings.quantization.bits,
        provenance,
    )
    save_network(result.network, folder)
    write_json(folder / "scales.json", [asdict(choice) for choice in result.choices])


def export_bundle(run: Run, folder: Path) -> None:
    """Integer network and float SNN to a bundle, with golden traces of clean and noisy validation images."""
    clean = run.data.validation.codes[: GOLDEN_IMAGES // 2]
    budget = budget_of(run.config.fidelity.epsilon)
    noisy = random_noise(clean, np.arange(len(clean)), budget=budget, seed=run.config.seed)
    network = load_network(run.result("quantize"))
    write_bundle(
        folder,
        network,
        golden_codes=np.concatenate([clean, noisy]),
        float_model_files=float_files(load_float(run.result("finetune"))),
        provenance={
            "config": portable_settings(run.config),
            "data": run.config.data.name,
            "test_split": digest_of(run.data.test),
        },
    )


# The integer network carries the settings it was made with, the bundle all settings.
WITHOUT_FIDELITY = tuple(name for name in Config.model_fields if name != "fidelity")
STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("train", ("network", "compute", "training"), (), train_network, "train"),
        Stage("convert", ("conversion", "finetuning"), ("train",), convert_network, "convert"),
        Stage("finetune", ("compute", "finetuning"), ("convert",), finetune_network, "finetune"),
        Stage(
            "baseline",
            ("network", "compute", "training", "conversion", "finetuning"),
            (),
            train_baseline,
            "baseline",
        ),
        Stage("quantize", WITHOUT_FIDELITY, ("finetune",), quantize_network, "quantize"),
        Stage("export", tuple(Config.model_fields), ("finetune", "quantize"), export_bundle, "bundle"),
    )
}


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


def check_run(run: Run, timings: Mapping[str, float], missing: list[dict[str, str]]) -> CheckResult:
    """The fidelity check of a run's bundle; writes report.json and report.html beside it."""
    test = run.data.test
    images = Images(test.codes, test.labels, run.config.seed)
    circumstances = Circumstances(
        data=run.data.name,
        missing_runtimes=missing,
        baseline=_baseline(run, images) if run.config.fidelity.baseline else None,
        quantization=read_json(run.result("quantize") / "scales.json"),
        timings=timings,
        reproduce=run.reproduce,
    )
    bundle = open_bundle(run.result("export"))
    result = run_check(bundle, images, run.config.fidelity, run.folder / "crafted", circumstances)
    write_report(result, run.folder)
    return result


def write_report(result: CheckResult, folder: Path) -> None:
    """Write report.json and the page made of it."""
    write_json(folder / "report.json", result.report)
    write_bytes(folder / "report.html", render_report(result.report, result.gallery).encode())


def _baseline(run: Run, images: Images) -> dict[str, Any]:
    natural, robust = load_float(run.result("baseline")), load_float(run.result("finetune"))
    return compare_with_natural(natural, robust, images, run.config.fidelity.epsilon)
