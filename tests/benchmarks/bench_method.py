"""What each step of the method buys: clean and robust accuracy of four networks, mean and spread over seeds.

Run it as ``python -m tests.benchmarks.bench_method digits`` or ``… mnist --data-dir DIR --seeds 1 --images 1000``.
The first argument is a preset: its run is trained where it is not there yet, in ``runs/method``. The networks are

- the naturally trained ANN, and the adversarially trained one that the method starts from;
- the SNN converted from it and fine-tuned;
- an SNN of the same topology trained from fresh weights as the other is fine-tuned (loss, schedule, averages), for as
  many epochs as fit into the time that ANN training, conversion and fine-tuning took together.

Attacks run on the test images of the preset, ``strong`` on the first ``--strong-images`` of them; results are kept
in the run's folder, one file for each network, and reused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hardware.files import read_json, write_bytes, write_json
from hardware.surrogates import TRIANGLE
from pipeline.attacks.backward import Adaptive, Backward, Conversion
from pipeline.attacks.ensemble import PRESETS, AnyMember, Member, SquareMember, run_ensemble
from pipeline.attacks.targets import (
    Codes,
    FloatTarget,
    GradientTarget,
    Logits,
    Loss,
    ModuleOracle,
    Oracle,
    batched_logits,
    budget_of,
    to_images,
)
from pipeline.compute import use_cpu
from pipeline.config import load_config
from pipeline.conversion import convert
from pipeline.finetuning import finetune
from pipeline.models.float_file import float_files, load_float, load_rate
from pipeline.models.spiking import RateNetwork
from pipeline.objectives import natural
from pipeline.recipes import augmentation_of, compute_of, finetuning_objective, schedule_of
from pipeline.run import Run
from pipeline.stages import start_network
from pipeline.statistics import wilson_interval
from pipeline.training import Schedule, fit

NATURAL, ROBUST, OURS, DIRECT = "natural ANN", "adversarial ANN", "converted, fine-tuned SNN", "SNN trained directly"
SA_PGD = Member(Adaptive(), "SA-PGD", 100)
PLAIN = Conversion(clipped=False)
"""The way back through a network of ReLUs is its own."""
SNN_COLUMNS: Mapping[str, tuple[AnyMember, ...]] = {
    "PGD 10": (Member(TRIANGLE),),
    "paper": PRESETS["paper"],
    "SA-PGD 100": (SA_PGD,),
    "strong": PRESETS["strong"],
}
ANN_COLUMNS: Mapping[str, tuple[AnyMember, ...]] = {
    "PGD 10": (Member(PLAIN),),
    "strong": (
        Member(PLAIN, "APGD", 100, restarts=3),
        Member(PLAIN, "APGD", 100, loss="DLR"),
        SquareMember(5000),
    ),
}


@dataclass(frozen=True)
class RateTarget:
    """An ANN as attacks see it."""

    network: RateNetwork
    name: str = "ann"

    def logits(self, codes: Codes) -> Logits:
        """Logits in real units."""
        return batched_logits(self.network, codes)

    def oracle(self, backward: Backward, loss: Loss) -> Oracle:
        """An oracle whose proxy is the network itself."""
        return ModuleOracle(_Static(self.network), (), backward, loss)


@dataclass(frozen=True)
class _Static:
    network: nn.Module

    def __call__(self, images: Tensor, rules: Any) -> Tensor:  # noqa: ARG002
        return self.network(images)  # type: ignore[no-any-return]

    def proxy(self, images: Tensor, clipped: bool) -> Tensor:  # noqa: ARG002
        return self.network(images)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Trained:
    """A network's folder, and the seconds its training took."""

    folder: Path
    seconds: float

    def target(self) -> GradientTarget:
        """The network, to be attacked."""
        if (self.folder / "ann.json").is_file():
            return RateTarget(load_rate(self.folder))
        return FloatTarget(load_float(self.folder))


def networks_of(run: Run, direct_epochs: int | None = None) -> dict[str, Trained]:
    """Train what is missing."""
    seconds = run.ensure("finetune")
    ours = seconds["train"] + seconds["convert"] + seconds["finetune"]
    that_fit = max(1, round(ours / (seconds["finetune"] / run.config.finetuning.epochs)))
    return {
        NATURAL: _natural(run),
        ROBUST: Trained(run.result("train"), seconds["train"]),
        OURS: Trained(run.result("finetune"), ours),
        DIRECT: _direct(run, direct_epochs or that_fit),
    }


def _natural(run: Run) -> Trained:
    def train(folder: Path) -> None:
        network, settings = start_network(run), run.config.training
        parameters: list[dict[str, object]] = [{"params": list(network.parameters())}]
        fit(
            network,
            natural(),
            run.data.train,
            run.data.validation,
            _with_epochs(schedule_of(settings), max(settings.epochs // 4, 1)),
            epsilon=0.0,
            seed=run.config.seed,
            label=NATURAL,
            parameter_groups=parameters,
            augment=augmentation_of(settings),
            compute=compute_of(run.config.compute),
        )
        _save(network, folder)

    return _kept(run.folder / "natural", train)


def _direct(run: Run, epochs: int) -> Trained:
    """The learning rate is the larger one of the two stages: weights are fresh."""

    def train(folder: Path) -> None:
        settings = run.config.finetuning
        start = start_network(run)
        assert isinstance(start, RateNetwork)
        network = convert(start, settings.steps)
        rate = max(run.config.training.learning_rate, settings.learning_rate)
        schedule = Schedule(epochs, settings.batch_size, rate, settings.weight_decay, settings.averaging)
        finetune(
            network,
            finetuning_objective(settings),
            run.data.train,
            run.data.validation,
            schedule,
            epsilon=settings.epsilon,
            seed=run.config.seed,
            label=DIRECT,
            augment=augmentation_of(settings),
            compute=compute_of(run.config.compute),
        )
        _save(network, folder)

    return _kept(run.folder / "direct", train)


def _with_epochs(schedule: Schedule, epochs: int) -> Schedule:
    return Schedule(epochs, schedule.batch_size, schedule.learning_rate, schedule.weight_decay, schedule.averaging)


def _kept(folder: Path, train: Any) -> Trained:
    record = folder / "seconds.json"
    if not record.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        train(folder)
        write_json(record, {"seconds": time.perf_counter() - start})
    return Trained(folder, float(read_json(record)["seconds"]))


def _save(network: Any, folder: Path) -> None:
    for name, content in float_files(network).items():
        write_bytes(folder / name, content)


@dataclass(frozen=True)
class Task:
    """One network under all its attacks."""

    name: str
    trained: Trained
    codes: Codes
    labels: NDArray[np.int64]
    epsilon: float
    seed: int
    strong_images: int

    def __call__(self) -> dict[str, Any]:
        """Share of images that withstand each attack, ``strong`` among the first ``strong_images`` only; it counts what
        the columns before it found, too.
        """
        use_cpu(1)
        target = self.trained.target()
        # Not beside the network: a stage whose folder holds anything else is done again.
        store = self.trained.folder.parent / "attacked" / f"{self._key()}.json"
        found: dict[str, Any] = read_json(store) if store.is_file() else {}
        columns = ANN_COLUMNS if isinstance(target, RateTarget) else SNN_COLUMNS
        indices = np.arange(len(self.codes))
        survive = target.logits(self.codes).argmax(1) == self.labels
        found["clean"] = float(survive.mean())
        if isinstance(target, FloatTarget):
            _, activity = target.network.record(to_images(self.codes[:500]))
            found["spikes"] = float(sum(layer.spikes.sum() for layer in activity.values()) / len(self.codes[:500]))
        for column, members in columns.items():
            if column == "strong":
                indices, survive = indices[: self.strong_images], survive[: self.strong_images]
                if len(found.get("strong mask", ())) != len(indices):
                    found.pop("strong", None)
            if column in found:
                survive &= np.array(found[f"{column} mask"], bool)
                continue
            # A member's outcome does not depend on the others, so what has fallen already need not be tried again.
            rows = indices[survive] if column == "strong" else indices
            result = run_ensemble(
                target,
                members,
                self.codes[rows],
                self.labels[rows],
                indices[rows],
                budget=budget_of(self.epsilon),
                seed=self.seed,
            )
            mask = np.zeros(len(indices), bool)
            mask[rows] = ~result.crafted.fooled
            survive &= mask
            found[column], found[f"{column} mask"] = float(mask.mean()), mask.astype(int).tolist()
            write_json(store, found)
        return found

    def _key(self) -> str:
        digest = hashlib.sha256(self.codes.tobytes() + self.labels.tobytes())
        for path in sorted(self.trained.folder.glob("*.safetensors")):
            digest.update(path.read_bytes())
        digest.update(json.dumps([self.epsilon, self.seed]).encode())
        return digest.hexdigest()[:16]


def main() -> None:
    """Train, attack and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="digits")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--images", type=int, default=None, help="first test images; default: all of the preset's")
    parser.add_argument("--strong-images", type=int, default=None, help="first of them for strong; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="networks attacked at the same time")
    parser.add_argument("--threads", type=int, default=1, help="of torch while networks are trained")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument(
        "--direct-epochs",
        type=int,
        help="of direct training, where other work disturbed the times it would follow from",
    )
    options = parser.parse_args()
    use_cpu(options.threads)
    folder_of_data = (f"data.dir={options.data_dir}",) if options.data_dir else ()
    tasks: list[Task] = []
    for seed in range(options.seeds):
        overrides = (f"seed={seed}", "fidelity.baseline=false", *folder_of_data, *options.overrides)
        config = load_config(options.preset, overrides)
        run = Run(config, Path("runs/method") / f"{options.preset}-{seed}", "")
        codes, labels = run.data.test.codes[: options.images], run.data.test.labels[: options.images]
        tasks += [
            Task(name, trained, codes, labels, config.fidelity.epsilon, seed, options.strong_images or len(labels))
            for name, trained in networks_of(run, options.direct_epochs).items()
        ]
    if options.train_only:
        return
    with ProcessPoolExecutor(options.workers) as pool:
        results = [future.result() for future in [pool.submit(task) for task in tasks]]
    print_table(options.preset, tasks, results)


def print_table(preset: str, tasks: Sequence[Task], results: Sequence[Mapping[str, Any]]) -> None:
    """Means over the seeds, lowest and highest in brackets, or the 95 % interval of a single seed."""
    first = tasks[0]
    seeds = len({task.seed for task in tasks})
    strong_images = min(first.strong_images, len(first.labels))
    title = (
        f"{preset}: {len(first.labels)} test images ({strong_images} for strong), "
        f"epsilon {first.epsilon:g}, {seeds} seed(s)"
    )
    table = Table(title=title, title_justify="left")
    columns = ("clean", *SNN_COLUMNS)
    for heading in ("network", *columns, "spikes per image", "training s"):
        table.add_column(heading)
    for name in dict.fromkeys(task.name for task in tasks):
        chosen = [(task, result) for task, result in zip(tasks, results, strict=True) if task.name == name]
        cells = []
        for column in columns:
            values = [result[column] for _, result in chosen if column in result]
            samples = strong_images if column == "strong" else len(first.labels)
            ends = (
                (min(values), max(values))
                if len(values) > 1
                else wilson_interval(round(sum(values) * samples), samples)
            )
            cells.append(f"{np.mean(values):.1%} ({ends[0]:.1%} – {ends[1]:.1%})" if values else "")
        spikes = [result["spikes"] for _, result in chosen if "spikes" in result]
        seconds = f"{np.mean([task.trained.seconds for task, _ in chosen]):.0f}"
        table.add_row(name, *cells, f"{np.mean(spikes):,.0f}" if spikes else "", seconds)
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
