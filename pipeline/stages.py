"""The stages of a run: what each one does, as a function from the results before it to files in its folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor, nn

from exporters.bundle import MODEL_FILES, refusals, write_bundle
from hardware.errors import RuleViolations, SpikeguardError
from hardware.files import read_json, write_bytes, write_json
from hardware.formats.network_file import load_network, save_network
from hardware.runtimes.opening import FILES
from pipeline.attacks.black_box import random_noise
from pipeline.attacks.targets import Codes, budget_of
from pipeline.checkpoints import Epoch
from pipeline.config import Config, TrainingConfig, portable_settings
from pipeline.conversion import calibrate, convert, later_in_block
from pipeline.data import Dataset, digest_of
from pipeline.finetuning import finetune
from pipeline.models.float_file import float_files, holds_spiking, load_float, load_rate
from pipeline.models.float_onnx import float_onnx_files
from pipeline.models.spiking import RateNetwork, SpikingNetwork, rebuild
from pipeline.models.tracing import trace_network
from pipeline.models.zoo import NETWORKS, build
from pipeline.objectives import Objective, natural
from pipeline.progress import console, track
from pipeline.quantization import quantize
from pipeline.recipes import (
    augmentation_of,
    compute_of,
    finetune_integers,
    finetuning_objective,
    schedule_of,
    training_objective,
)
from pipeline.training import Records, fit, pixels

if TYPE_CHECKING:
    from pipeline.run import Run

CALIBRATION_IMAGES = 256
GOLDEN_IMAGES = 16


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


def build_network(name: str, run: Run) -> nn.Module:
    """The torch module a configuration names: one of the zoo, or ``package.module:function`` found on the path.

    Raises:
        SpikeguardError: if there is no such function, or it returns something else.
    """
    if name in NETWORKS:
        config = run.config
        return build(name, config.data.name, run.data.classes, config.width, run.data.input_shape)
    module_name, colon, function = name.partition(":")
    if not colon:
        raise SpikeguardError(
            f"network {name!r} is unknown; choose among {', '.join(NETWORKS)} or give package.module:function"
        )
    if run.config.width != 1:
        raise SpikeguardError(f"width is for networks of the zoo; let {name} make itself as wide as it should be")
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


def start_network(run: Run) -> RateNetwork | SpikingNetwork:
    """The configured network as a layer graph, with the weights it comes with: fresh ones, or one's own."""
    name = run.config.network
    torch.manual_seed(run.config.seed)
    traced = trace_network(build_network(name, run), run.data.input_shape)
    outputs = traced.graph.shapes()[traced.graph.layers[-1].name]
    if outputs != (run.data.classes,):
        raise SpikeguardError(f"network {name!r} gives {outputs} outputs for {run.data.classes} classes; mend its end")
    return rebuild(traced, run.config.finetuning.steps)


def train_network(run: Run, folder: Path) -> None:
    """Train the ANN with the configured objective."""
    settings = run.config.training
    network = start_network(run)
    if isinstance(network, SpikingNetwork):
        console.print("[dim]the network spikes already: no ANN to train, nothing to convert[/dim]")
        save_network_files(folder, network)
        return
    objective, label = training_objective(settings), f"train ANN ({settings.objective})"
    epsilon = 0.0 if settings.objective == "natural" else settings.epsilon
    history = _train(run, network, settings, objective, epsilon, label, run.records("train"))
    save_network_files(folder, network, history)


def _train(
    run: Run,
    network: RateNetwork,
    settings: TrainingConfig,
    objective: Objective,
    epsilon: float,
    label: str,
    records: Records,
) -> list[Epoch]:
    return fit(
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
        write_history(folder, history)


def write_history(folder: Path, history: list[Epoch]) -> None:
    """Write a training's epochs as CSV."""
    rows = [f"{n},{e.loss:.6f},{e.clean:.6f},{e.robust:.6f}" for n, e in enumerate(history, 1)]
    write_bytes(folder / "history.csv", "\n".join(["epoch,loss,clean,robust", *rows, ""]).encode())


def convert_network(run: Run, folder: Path) -> None:
    """ANN to SNN, thresholds calibrated on training images; a network that spikes already stays as it is."""
    source = run.result("train")
    if holds_spiking(source):
        save_network_files(folder, load_float(source))
    else:
        save_network_files(folder, _convert(run, load_rate(source)))


def _convert(run: Run, network: RateNetwork) -> SpikingNetwork:
    settings, compute = run.config.conversion, compute_of(run.config.compute)
    spiking = convert(network, run.config.finetuning.steps, beta=settings.beta, subtract=settings.reset == "subtract")
    spiking.to(compute.device)
    later = settings.second_batches if later_in_block(spiking.graph) else 0
    drawn = [batch.to(compute.device) for batch in calibration_batches(run, settings.batches + later)]
    with track("convert", sum(1 for _ in spiking.neurons())) as advance:
        calibrate(
            spiking,
            drawn[: settings.batches],
            percentile=settings.percentile,
            calibration_steps=settings.calibration_steps,
            scale=settings.scale,
            second_batches=drawn[settings.batches :],
            advance=advance,
        )
    return spiking.cpu()


def calibration_batches(run: Run, batches: int) -> list[Tensor]:
    """Mini-batches of training images in seeded random order, as many as there are images for."""
    codes = torch.from_numpy(run.data.train.codes)
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(run.config.seed))
    return [pixels(codes[part]) for part in order.split(run.config.conversion.batch_size)[:batches]]


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
    network = start_network(run)
    if isinstance(network, RateNetwork):
        short = settings.model_copy(update={"epochs": -(-settings.epochs // 4)})
        _train(run, network, short, natural(), 0.0, "natural ANN", run.records("baseline", "ann"))
        network = _convert(run, network)
    history = _finetune(run, network, natural(), 0.0, "natural SNN", run.records("baseline", "snn"))
    save_network_files(folder, network, history)


def quantization_images(train: Dataset, seed: int) -> Codes:
    """The training images on which the scales of an integer network are chosen: seeded, without replacement."""
    return train.codes[np.random.default_rng(seed).permutation(len(train))[:CALIBRATION_IMAGES]]


def quantize_network(run: Run, folder: Path) -> None:
    """Float SNN to integer network, which may then learn on, on its grid."""
    settings, network = run.config, load_float(run.result("finetune"))
    calibration = quantization_images(run.data.train, settings.seed)
    known = portable_settings(settings)
    provenance = {"config": {name: known[name] for name in WITHOUT_FIDELITY}, "data": settings.data.name}
    result = quantize(network, calibration, settings.quantization.bits, provenance, settings.quantization.rounding)
    if settings.quantization.epochs:
        parts, records = (run.data.train, run.data.validation), run.records("quantize")
        result, history = finetune_integers(settings, network, result, calibration, *parts, records)
        write_history(folder, history)
    save_network(result.network, folder)
    write_json(folder / "scales.json", [asdict(choice) for choice in result.choices])
    write_json(folder / "attribution.json", [asdict(row) for row in result.attribution])


def export_bundle(run: Run, folder: Path) -> None:
    """Integer network and float SNN to a bundle, with golden traces of clean and noisy validation images."""
    clean = run.data.validation.codes[: GOLDEN_IMAGES // 2]
    budget = budget_of(run.config.fidelity.epsilon)
    noisy = random_noise(clean, np.arange(len(clean)), budget=budget, seed=run.config.seed)
    golden = np.concatenate([clean, noisy])
    trained, network = load_float(run.result("finetune")), load_network(run.result("quantize"))
    refused = refusals(network)
    needed = {file for name in run.config.fidelity.runtimes for file in FILES.get(name, ())}
    if broken := [problem for name in sorted(needed & refused.keys()) for problem in refused[name]]:
        raise RuleViolations(f"files for {', '.join(run.config.fidelity.runtimes)}", broken)
    for name, problems in refused.items():
        why = "; ".join(f"{one.object}: {one.rule}" for one in problems)
        console.print(f"[dim]{name} is left out, it cannot hold this network ({escape(why)})[/dim]", highlight=False)
    write_bundle(
        folder,
        network,
        golden_codes=golden,
        float_model_files={**float_files(trained), **float_onnx_files(trained, golden)},
        provenance={
            "config": portable_settings(run.config),
            "data": run.config.data.name,
            "test_split": digest_of(run.data.test),
            "attribution": read_json(run.result("quantize") / "attribution.json"),
        },
        models=[name for name in MODEL_FILES if name not in refused],
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
