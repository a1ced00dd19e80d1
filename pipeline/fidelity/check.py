"""The fidelity check: does the deployed model withstand the same attacks as the trained one, where it runs?"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from hardware.bounds import prove
from hardware.emulator import run_emulator
from hardware.errors import SpikeguardError
from hardware.formats.bundle import Bundle
from hardware.formats.counterexamples import Counterexamples, merge
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import Codes, FloatTarget, GradientTarget, IntegerTarget, budget_of
from pipeline.config import FidelityConfig
from pipeline.fidelity.arms import overall
from pipeline.fidelity.attribution import attribution_rows
from pipeline.fidelity.certification import NO_OTHERS, Open, certify, is_certified
from pipeline.fidelity.corpus import as_crafted, behaviour_of, gather, replay_row
from pipeline.fidelity.crafting import Images
from pipeline.fidelity.curve import curve_rows
from pipeline.fidelity.gallery import GalleryItem, choose_items, with_spikes
from pipeline.fidelity.health import examine, health_row
from pipeline.fidelity.looks import look_until_decided
from pipeline.fidelity.page import SCHEMA
from pipeline.fidelity.references import earlier_build, float_reference, identity_of
from pipeline.fidelity.resources import energy_row, placement_row
from pipeline.fidelity.shards import craft_all
from pipeline.fidelity.transfer import at_bits, transfer_row
from pipeline.fidelity.waterfall import Contestants, EarlierNetworks, mean_activity, waterfall_row
from pipeline.fidelity.wording import divergence, percent
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
    """A finished check: ``report.json``'s content, images for the page, and the corpus with what the check found."""

    report: dict[str, Any]
    gallery: list[GalleryItem]
    counterexamples: Counterexamples

    @property
    def exit_code(self) -> int:
        """Of the command line."""
        return EXIT_CODES[self.report["outcome"]]


def run_check(
    bundle: Bundle,
    images: Images,
    settings: FidelityConfig,
    folder: Path,
    circumstances: Circumstances,
    others: Mapping[str, Open] = NO_OTHERS,
    corpus: Counterexamples | None = None,
    against: Bundle | None = None,
) -> CheckResult:
    """Attack both models, judge every image on both, certify the runtimes, and conclude.

    Args:
        bundle: its files are what is checked.
        images: of the test split.
        settings: budgets, effort, margin, runtimes.
        folder: keeps the crafted images, so that a killed check goes on where it was.
        circumstances: what else the report tells.
        others: runtimes to certify that the settings have no name for, see :func:`certify`.
        corpus: counterexamples of earlier checks, replayed before anything else; None for the bundle's own.
        against: an earlier bundle whose integer network is the reference; None for the float SNN.

    Raises:
        RuntimeFailedError: if a requested runtime did not finish.
        SpikeguardError: if a file of the bundle is not what it should be.
    """
    _require_pixels(bundle)
    attribution, available = attribution_rows(bundle), len(images.labels)
    timings = dict(circumstances.timings or {})
    clock = time.perf_counter()
    reference = float_reference(bundle) if against is None else earlier_build(bundle, against)
    both = {"float": reference.target, "integer": IntegerTarget(bundle.network)}
    targets: dict[str, GradientTarget] = {**both}
    further = _further_networks(bundle, settings, circumstances.calibration)
    known = bundle.counterexamples if corpus is None else corpus
    replayed = behaviour_of(targets, known.codes, known.labels)
    timings["replay"] = time.perf_counter() - clock

    clock = time.perf_counter()
    identity = identity_of(bundle) + reference.identity
    with sharing(circumstances.jobs, {**both, **further}) as workers:

        def craft(part: Images) -> dict[str, Crafted]:
            return craft_all(targets, part, settings, folder, identity, workers=workers)

        look = look_until_decided(targets, images, settings, craft, reference.name)
        images, crafted, arms = look.images, look.crafted, look.arms
        curve = curve_rows(targets, look.hits, images, settings, folder, identity, workers)
        matrix = None
        if further:
            everyone = {**targets, **further}
            calibrated = hashlib.sha256(np.ascontiguousarray(circumstances.calibration).data).hexdigest()
            matrix = transfer_row(everyone, crafted, images, settings, folder, identity + calibrated, workers)
    timings["attacks"] = time.perf_counter() - clock

    clock = time.perf_counter()
    health = health_row(examine(targets, crafted, images, budget_of(settings.epsilon)))
    found = gather(targets, images, crafted, known, replayed)
    timings["judgement"] = time.perf_counter() - clock

    clock = time.perf_counter()
    shown = as_crafted(known) | crafted
    runtimes = certify(bundle, settings.runtimes, images, shown, settings.certify, others)
    timings["certification"] = time.perf_counter() - clock

    verdict, outcome, summary = conclude(arms, runtimes, health, settings, reference.word)
    sample = images.codes[: max(settings.certify, 100)]
    trace = run_emulator(bundle.network, sample, record="traces")
    clock = time.perf_counter()
    waterfall = None
    if reference.network is not None:
        waterfall = waterfall_row(
            reference.network,
            bundle.network,
            images,
            crafted,
            Contestants(look.hits["float"], look.hits["integer"], circumstances.earlier),
            mean_activity(reference.network, bundle.network, sample),
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
        "sequential": look.row,
        "samples": len(images.labels),
        "seed": images.seed,
        "steps": bundle.network.steps,
        "bits": bits[0] if len(bits) == 1 else {s.target: s.bits for s in bundle.network.synapses},
        "epsilon": [settings.epsilon],
        "data": {"name": circumstances.data, "test_samples": available},
        "certified_runtimes": [row["name"] for row in runtimes if is_certified(row)],
        "missing_runtimes": [dict(row) for row in circumstances.missing_runtimes],
        "reference": reference.row,
        "arms": arms,
        "runtimes": runtimes,
        "curve": curve,
        "transfer_matrix": matrix,
        "waterfall": waterfall,
        "corpus": replay_row(known, replayed, len(found)),
        "layers": reference.compare(sample, trace),
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
    if reference.network is not None:
        items = with_spikes(items, reference.network, bundle.network)
    return CheckResult(report, items, merge([known, found]))


def _further_networks(
    bundle: Bundle, settings: FidelityConfig, calibration: Codes | None
) -> dict[str, FloatTarget | IntegerTarget]:
    """Integer networks for the table of who is fooled by whose images."""
    if not settings.transfer_bits:
        return {}
    if calibration is None:
        raise SpikeguardError(
            "fidelity.transfer_bits needs training images to quantise on; leave it empty, or give them"
        )
    return {**at_bits(load_float(bundle.path), calibration, settings.transfer_bits)}


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
    reference: str = "trained",
) -> tuple[str, str, str]:
    """Verdict, outcome and one sentence, from the rows of the report; ``reference`` is the model's word."""
    names = ", ".join(row["name"] for row in runtimes)
    broken = [_mismatch(row) for row in runtimes if not is_certified(row)]
    if broken:
        return (
            "fail",
            "TRACE_MISMATCH",
            f"{'; '.join(broken)}. Attack figures of the emulator do not hold there.",
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
        f"{percent(worst['reference_accuracy'])} {reference}, on {worst['samples']} images "
        f"at epsilon {settings.epsilon:g}"
    )
    if verdict == "pass":
        return verdict, "OK", f"The deployed model is as robust as the {reference} one on {names}: {facts}."
    if verdict == "fail":
        return (
            verdict,
            "ROBUSTNESS_INFERIOR",
            f"The deployed model is less robust than the {reference} one: {facts}.",
        )
    wanted = [arm["samples_to_decide"] for arm in deciding if arm["samples_to_decide"]]
    more = f" About {max(wanted):,} images would decide." if wanted else ""
    return (
        verdict,
        "INCONCLUSIVE",
        f"Too few images to tell at a margin of {settings.margin:g}: {facts}.{more}",
    )


def _mismatch(row: Mapping[str, Any]) -> str:
    """What is wrong with a runtime, and where it first shows among the images that it was certified on."""
    where = "" if row["first_mismatch"] is None else f", first in {divergence(row['first_mismatch'])}"
    return f"{row['name']} does not compute what the integer network means{where}"


def versions() -> dict[str, str]:
    """Versions of what ran."""
    found = {"python": platform.python_version()}
    for name in SOFTWARE:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
