"""A sweep point after point: each is kept in a file of its own as soon as it is known, and found again by its key."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from hardware.errors import RuleViolations, SpikeguardError
from hardware.files import MAX_JSON_BYTES, read_bytes, write_json
from hardware.formats.bundle import Bundle
from hardware.network import IntegerNetwork
from pipeline.attacks.ensemble import PRESETS
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import Codes, FloatTarget, GradientTarget, IntegerTarget
from pipeline.config import Config, FidelityConfig
from pipeline.data import Dataset
from pipeline.data.loading import load_splits
from pipeline.fidelity.crafting import Attack, Images
from pipeline.fidelity.shards import craft_all
from pipeline.models.float_file import float_files, load_float
from pipeline.models.spiking import SpikingNetwork
from pipeline.progress import console
from pipeline.quantization import Rounding, quantize
from pipeline.recipes import finetune_integers
from pipeline.run import require_same_test_split
from pipeline.source import source_digest
from pipeline.stages import quantization_images
from pipeline.sweep.grid import Grid
from pipeline.sweep.points import (
    ON_FLOAT,
    ON_INTEGER,
    Point,
    Reference,
    at_steps,
    measure_point,
    measure_reference,
    refused_point,
)
from pipeline.training import Records

POINTS, CRAFTED, TRAINED = "points", "crafted", "trained"
"""Folders of what is kept."""

Result = TypeVar("Result", Reference, Point)


@dataclass(frozen=True)
class Learning:
    """How the integers of every point learn on, on its grid.

    Attributes:
        config: of the run.
        train, validation: images.
    """

    config: Config
    train: Dataset
    validation: Dataset

    @cached_property
    def facts(self) -> list[Any]:
        """What the result depends on, apart from the networks."""
        settings = self.config.model_dump(mode="json", include={"quantization", "finetuning", "compute", "seed"})
        del settings["quantization"]["bits"]  # the grid's
        parts = (self.train, self.validation)
        return [settings, *(_digest(array) for part in parts for array in (part.codes, part.labels))]


@dataclass(frozen=True)
class Subject:
    """What is swept.

    Attributes:
        network: the float SNN, with the T it was fine-tuned for.
        calibration: training images that the quantiser looks at.
        images: of the test split, attacked.
        settings: budget, effort and margin.
        data: name of the data set.
        learning: the fine-tuning of integers; none leaves them as they were rounded.
        rounding: of the weights.
    """

    network: SpikingNetwork
    calibration: Codes
    images: Images
    settings: FidelityConfig
    data: str
    learning: Learning | None = None
    rounding: Rounding = "compensated"

    @cached_property
    def digest(self) -> str:
        """Hash of everything but bits and T: network, images, settings, code."""
        files = float_files(self.network)
        settings = self.settings
        facts = {
            "network": [hashlib.sha256(files[name]).hexdigest() for name in sorted(files)],
            "calibration": _digest(self.calibration),
            "images": [_digest(self.images.codes), _digest(self.images.labels), self.images.seed],
            "settings": [settings.epsilon, settings.margin, settings.confidence, settings.attacks, self.rounding],
            "members": [repr(member) for member in PRESETS[settings.attacks]],
            "code": source_digest(),
            "torch": metadata.version("torch"),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def key(self, steps: int, bits: int | None) -> str:
        """Of all that determines one point; without bits, of the float SNN at T ``steps``."""
        learning = self.learning.facts if self.learning is not None and bits is not None else None
        facts = [self.digest, steps, bits, learning]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def subject_of(bundle: Bundle, config: Config, samples: int | None) -> Subject:
    """The float SNN of a bundle, with the training images its quantiser saw and the test images its run set aside.

    Integers learn on where the configuration gives them epochs.

    Args:
        bundle: of a finished run.
        config: of that run.
        samples: how many of the test images, from the first; all if None.

    Raises:
        SpikeguardError: if the data are not those of the run.
    """
    splits = load_splits(config.data, config.seed)
    require_same_test_split(bundle, splits.test)
    images = Images(splits.test.codes[:samples], splits.test.labels[:samples], config.seed)
    calibration = quantization_images(splits.train, config.seed)
    learning = Learning(config, splits.train, splits.validation) if config.quantization.epochs else None
    return Subject(
        load_float(bundle.path),
        calibration,
        images,
        config.fidelity,
        splits.name,
        learning,
        config.quantization.rounding,
    )


def _digest(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array).data).hexdigest()


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep.

    Attributes:
        subject: what was swept.
        grid: over what.
        references, points: what was found, of each T and of each point.
    """

    subject: Subject
    grid: Grid
    references: tuple[Reference, ...]
    points: tuple[Point, ...]


def run_sweep(subject: Subject, grid: Grid, folder: Path, fresh: bool = False) -> SweepResult:
    """Every point of the grid, and the float SNN at every T of it; those in ``folder`` are taken from there.

    Args:
        subject: what is swept.
        grid: bits and time steps.
        folder: nobody else may be at work in it.
        fresh: forget what is kept there.

    Raises:
        SpikeguardError: if a kept file is not what it should be.
    """
    _tidy(folder, fresh)
    references: list[Reference] = []
    points: list[Point] = []
    total = len(grid.steps) * (len(grid.bits) + 1)
    for steps in grid.steps:
        column = _Column(subject, steps, folder)
        references.append(column.reference())
        _tell(len(references) + len(points), total, f"T {steps}, float SNN", references[-1])
        for bits in grid.bits:
            points.append(column.point(bits))
            _tell(len(references) + len(points), total, f"T {steps}, {bits} bits", points[-1])
    return SweepResult(subject, grid, tuple(references), tuple(points))


@dataclass(frozen=True)
class _Column:
    """The points of one T; what they share is made when the first of them needs it."""

    subject: Subject
    steps: int
    folder: Path

    @property
    def finetuned(self) -> bool:
        return self.steps == self.subject.network.steps

    @cached_property
    def target(self) -> FloatTarget:
        return FloatTarget(at_steps(self.subject.network, self.steps))

    @cached_property
    def on_float(self) -> Crafted:
        return self._craft(ON_FLOAT, self.target, None)

    def reference(self) -> Reference:
        def measure() -> Reference:
            return measure_reference(self.target, self.finetuned, self.subject.images, self.on_float)

        return _kept(self._path(None), Reference, measure)

    def point(self, bits: int) -> Point:
        return _kept(self._path(bits), Point, lambda: self._measure(bits))

    def _measure(self, bits: int) -> Point:
        subject = self.subject
        try:
            network = self._integers(bits)
        except RuleViolations as refusal:
            return refused_point(bits, self.steps, self.finetuned, refusal)
        crafted = self.on_float, self._craft(ON_INTEGER, IntegerTarget(network), bits)
        return measure_point(self.target, network, self.finetuned, subject.images, crafted, subject.settings, bits)

    def _integers(self, bits: int) -> IntegerNetwork:
        """The network of a point, which rests on training and validation images alone.

        Raises:
            RuleViolations: if the target takes no such network.
        """
        network, subject = self.target.network, self.subject
        rounded = quantize(network, subject.calibration, bits, {}, subject.rounding)
        if (learning := subject.learning) is None:
            return rounded.network
        stem, folder = self._stem(bits), self.folder / TRAINED
        records = Records(folder / f"{stem}.safetensors", folder / f"{stem}.csv", subject.key(self.steps, bits))
        parts = subject.calibration, learning.train, learning.validation
        return finetune_integers(learning.config, network, rounded, *parts, records)[0].network

    def _craft(self, attack: Attack, target: GradientTarget, bits: int | None) -> Crafted:
        """The images of one attack on the one model it asks, named after the point."""
        subject, name = self.subject, self._name(bits)
        (model,) = attack.targets
        key = subject.key(self.steps, bits)
        named = replace(attack, name=name)
        folder = self.folder / CRAFTED
        return craft_all({model: target}, subject.images, subject.settings, folder, key, (named,))[name]

    def _name(self, bits: int | None) -> str:
        return f"T {self.steps}, " + ("float" if bits is None else f"{bits} bits")

    def _path(self, bits: int | None) -> Path:
        return self.folder / POINTS / f"{self._stem(bits)}.json"

    def _stem(self, bits: int | None) -> str:
        name = self._name(bits).replace(", ", "-").replace(" ", "-")
        return f"{name}-{self.subject.key(self.steps, bits)}"


def _kept(path: Path, kind: type[Result], measure: Callable[[], Result]) -> Result:
    """What ``path`` holds, or else what is measured now and kept there."""
    if not path.is_file():
        started = time.perf_counter()
        value = replace(measure(), seconds=round(time.perf_counter() - started, 3))
        write_json(path, asdict(value))
        return value
    try:
        return TypeAdapter(kind).validate_json(read_bytes(path, MAX_JSON_BYTES))
    except ValidationError as error:
        raise SpikeguardError(f"{path} holds no point of a sweep; delete it and run again ({error})") from error


def _tidy(folder: Path, fresh: bool) -> None:
    """Remove what a kill left half-written; of a fresh sweep, everything kept."""
    for path in _files(folder, "*" if fresh else ".*.partial"):
        path.unlink()


def _files(folder: Path, pattern: str) -> Iterator[Path]:
    for part in (POINTS, CRAFTED, TRAINED):
        yield from (path for path in sorted((folder / part).glob(pattern)) if path.is_file())


def _tell(done: int, total: int, name: str, result: Reference | Point) -> None:
    if isinstance(result, Reference):
        said = f"clean {result.clean.accuracy:.1%}, worst case {result.worst_case.accuracy:.1%}"
    elif result.arms:
        accuracies = (arm["deployed_accuracy"] for arm in (result.clean, result.worst_case))
        said = "clean {:.1%}, worst case {:.1%}".format(*accuracies)
    else:
        said = "refused"
    console.print(f"[dim]{done}/{total} {name}: {said} ({result.seconds:.0f} s)[/dim]", highlight=False)
