"""The fidelity check: does the deployed model withstand the same attacks as the trained one, where it runs?"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from hardware.bounds import prove
from hardware.emulator import run_emulator
from hardware.errors import SpikeguardError
from hardware.formats.bundle import Bundle
from pipeline.attacks.targets import Codes, FloatTarget, GradientTarget, IntegerTarget, budget_of, to_images
from pipeline.config import FidelityConfig
from pipeline.fidelity.arms import arm_rows, hits_on, overall
from pipeline.fidelity.attribution import attribution_rows
from pipeline.fidelity.certification import certify, is_certified
from pipeline.fidelity.crafting import Images
from pipeline.fidelity.curve import curve_rows
from pipeline.fidelity.divergence import layer_rows, run_teacher_forced
from pipeline.fidelity.gallery import GalleryItem, choose_items, with_spikes
from pipeline.fidelity.health import examine, health_row
from pipeline.fidelity.page import SCHEMA
from pipeline.fidelity.resources import energy_row, placement_row
from pipeline.fidelity.shards import craft_all
from pipeline.fidelity.transfer import at_bits, transfer_row
from pipeline.fidelity.waterfall import Contestants, EarlierNetworks, mean_activity, waterfall_row
from pipeline.fidelity.wording import percent
from pipeline.fidelity.workers import sharing
from pipeline.models.float_file import load_float
from pipeline.models.graph import PIXEL_LEVELS

SOFTWARE = ("spikeguard", "torch", "snntorch", "numpy", "numba", "nir", "onnx", "onnxruntime", "scikit-learn")
EXIT_CODES: Mapping[str, int] = {
    "OK": 0,
    "QUANTIZE": 1,
    "MAP": 1,
    "EXPORT": 1,
    "RUNTIME": 1,
    "ROBUSTNESS_INFERIOR": 3,
    "TRACE_MISMATCH": 3,
    "INCONCLUSIVE": 4,
    "MASKED_GRADIENTS": 4,
}


@dataclass(frozen=True)
class Circumstances:
    """What the report says about the run around the check.

    Attributes:
        data: name of the data set.
        missing_runtimes: runtimes that were wanted but cannot be had here, with the reason.
        baseline: figures of a naturally trained network beside the robust one's, or None.
        quantization: how the scales were chosen.
        timings: seconds by stage before the check.
        reproduce: the shell command that gives this report.
        earlier: the networks before the float SNN, where they are known.
        calibration: training images, for further integer networks; without, there are none.
        jobs: processes that share the attacks.
    """

    data: str
    missing_runtimes: Sequence[Mapping[str, str]] = ()
    baseline: Mapping[str, Any] | None = None
    quantization: Sequence[Mapping[str, Any]] = ()
    timings: Mapping[str, float] | None = None
    reproduce: str = ""
    earlier: EarlierNetworks | None = None
    calibration: Codes | None = None
    jobs: int = 1


@dataclass(frozen=True)
class CheckResult:
    """A finished check: ``report.json``'s content, and images for the page."""

    report: dict[str, Any]
    gallery: list[GalleryItem]

    @property
    def exit_code(self) -> int:
        """Of the command line."""
        return EXIT_CODES[self.report["outcome"]]


def run_check(
    bundle: Bundle, images: Images, settings: FidelityConfig, folder: Path, circumstances: Circumstances
) -> CheckResult:
    """Attack both models, judge every image on both, certify the runtimes, and conclude.

    Args:
        bundle: its files are what is checked.
        images: of the test split.
        settings: budgets, effort, margin, runtimes.
        folder: keeps the crafted images, so that a killed check goes on where it was.
        circumstances: what else the report tells.

    Raises:
        RuntimeFailedError: if a requested runtime did not finish.
        SpikeguardError: if a file of the bundle is not what it should be.
    """
    _require_pixels(bundle)
    attribution = attribution_rows(bundle)
    timings = dict(circumstances.timings or {})
    clock = time.perf_counter()
    float_network = load_float(bundle.path)
    both: dict[str, FloatTarget | IntegerTarget] = {
        "float": FloatTarget(float_network),
        "integer": IntegerTarget(bundle.network),
    }
    targets: dict[str, GradientTarget] = {**both}
    others = {}
    if settings.transfer_bits and circumstances.calibration is not None:
        others = at_bits(float_network, circumstances.calibration, settings.transfer_bits)
    identity = "".join(sorted(record.sha256 for record in bundle.manifest.files.values()))
    with sharing(circumstances.jobs, {**both, **others}) as workers:
        crafted = craft_all(targets, images, settings, folder, identity, workers=workers)
        hits = {name: hits_on(target, images, crafted) for name, target in targets.items()}
        curve = curve_rows(targets, hits, images, settings, folder, identity, workers)
        matrix = None
        if others:
            everyone = {**targets, **others}
            matrix = transfer_row(everyone, crafted, images, settings, folder, identity, workers)
    timings["attacks"] = time.perf_counter() - clock

    clock = time.perf_counter()
    arms = arm_rows(hits["float"], hits["integer"], settings)
    health = health_row(examine(targets, crafted, images, budget_of(settings.epsilon)))
    timings["judgement"] = time.perf_counter() - clock

    clock = time.perf_counter()
    runtimes = certify(bundle, settings.runtimes, images, crafted, settings.certify)
    timings["certification"] = time.perf_counter() - clock

    verdict, outcome, summary = conclude(arms, runtimes, health, settings)
    sample = images.codes[: max(settings.certify, 100)]
    trace = run_emulator(bundle.network, sample, record="traces")
    _, layers = float_network.record(to_images(sample))
    spikes = {name: layer.spikes.numpy() for name, layer in layers.items()}
    clock = time.perf_counter()
    waterfall = waterfall_row(
        float_network,
        bundle.network,
        images,
        crafted,
        Contestants(hits["float"], hits["integer"], circumstances.earlier),
        mean_activity(sample, spikes, bundle.network),
        runtimes,
    )
    timings["waterfall"] = time.perf_counter() - clock
    bits = sorted({synapse.bits for synapse in bundle.network.synapses})
    report = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": verdict,
        "outcome": outcome,
        "summary": summary,
        "margin": settings.margin,
        "confidence": settings.confidence,
        "samples": len(images.labels),
        "seed": images.seed,
        "steps": bundle.network.steps,
        "bits": bits[0] if len(bits) == 1 else {s.target: s.bits for s in bundle.network.synapses},
        "epsilon": [settings.epsilon],
        "data": {"name": circumstances.data, "test_samples": len(images.labels)},
        "certified_runtimes": [row["name"] for row in runtimes if is_certified(row)],
        "missing_runtimes": [dict(row) for row in circumstances.missing_runtimes],
        "arms": arms,
        "runtimes": runtimes,
        "curve": curve,
        "transfer_matrix": matrix,
        "waterfall": waterfall,
        "layers": layer_rows(layers, trace, run_teacher_forced(bundle.network, sample, spikes)),
        "attribution": attribution,
        "gradient_health": health,
        "baseline": None if circumstances.baseline is None else dict(circumstances.baseline),
        "quantization": [dict(row) for row in circumstances.quantization],
        "proofs": [asdict(row) for row in prove(bundle.network)],
        "placement": placement_row(bundle.network),
        "energy": energy_row(bundle.network, sample, trace),
        "timings": timings,
        "versions": versions(),
        "reproduce": circumstances.reproduce,
    }
    items = choose_items(images, crafted, targets)
    return CheckResult(report, with_spikes(items, float_network, bundle.network))


def _require_pixels(bundle: Bundle) -> None:
    """Refuse a network whose inputs the attacks' budgets do not fit."""
    if bundle.network.input.max_code != PIXEL_LEVELS:
        raise SpikeguardError(
            f"{bundle.path} reads codes up to {bundle.network.input.max_code}; attacks here change 8-bit pixels, "
            "so its robustness cannot be checked"
        )


def conclude(
    arms: Sequence[Mapping[str, Any]],
    runtimes: Sequence[Mapping[str, Any]],
    health: Mapping[str, Any],
    settings: FidelityConfig,
) -> tuple[str, str, str]:
    """Verdict, outcome and one sentence, from the rows of the report."""
    names = ", ".join(row["name"] for row in runtimes)
    broken = [row["name"] for row in runtimes if not is_certified(row)]
    if broken:
        return (
            "fail",
            "TRACE_MISMATCH",
            f"{', '.join(broken)} does not compute what the integer network means; "
            "attack figures of the emulator do not hold there.",
        )
    if health["alarms"]:
        return (
            "inconclusive",
            "MASKED_GRADIENTS",
            f"Gradients look masked ({', '.join(health['alarms'])}), so the attacks prove nothing.",
        )
    deciding = [arm for arm in arms if arm["deciding"]]
    verdict = overall([arm["verdict"] for arm in deciding])
    worst = next(arm for arm in deciding if arm["name"] != "clean")
    facts = (
        f"worst-case accuracy {percent(worst['deployed_accuracy'])} deployed against "
        f"{percent(worst['reference_accuracy'])} trained, on {worst['samples']} images at epsilon {settings.epsilon:g}"
    )
    if verdict == "pass":
        return verdict, "OK", f"The deployed model is as robust as the trained one on {names}: {facts}."
    if verdict == "fail":
        return (
            verdict,
            "ROBUSTNESS_INFERIOR",
            f"The deployed model is less robust than the trained one: {facts}.",
        )
    wanted = [arm["samples_to_decide"] for arm in deciding if arm["samples_to_decide"]]
    more = f" About {max(wanted):,} images would decide." if wanted else ""
    return (
        verdict,
        "INCONCLUSIVE",
        f"Too few images to tell at a margin of {settings.margin:g}: {facts}.{more}",
    )


def versions() -> dict[str, str]:
    """Versions of what ran."""
    found = {"python": platform.python_version()}
    for name in SOFTWARE:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
