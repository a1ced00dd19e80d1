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

import numpy as np
from numpy.typing import NDArray

from hardware.bounds import prove
from hardware.emulator import run_emulator
from hardware.formats.bundle import Bundle
from hardware.targets.energy import count_operations, estimate_energy
from hardware.targets.loihi2 import LOIHI2
from hardware.targets.rules import count_activity, placement
from hardware.trace import Trace
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import FloatTarget, GradientTarget, IntegerTarget, Target, budget_of, correct, to_images
from pipeline.config import FidelityConfig
from pipeline.fidelity.arms import Hits, arm_row, make_arm, overall, worst_case
from pipeline.fidelity.certification import certify, is_certified
from pipeline.fidelity.crafting import ATTACKS, Images, craft_all
from pipeline.fidelity.divergence import layer_rows
from pipeline.fidelity.health import examine, health_row
from pipeline.fidelity.page import SCHEMA, GalleryItem
from pipeline.fidelity.wording import percent
from pipeline.models.float_file import load_float

GALLERY_ITEMS = 8
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
    """

    data: str
    missing_runtimes: Sequence[Mapping[str, str]] = ()
    baseline: Mapping[str, Any] | None = None
    quantization: Sequence[Mapping[str, Any]] = ()
    timings: Mapping[str, float] | None = None
    reproduce: str = ""


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
    timings = dict(circumstances.timings or {})
    clock = time.perf_counter()
    float_network = load_float(bundle.path)
    targets: dict[str, GradientTarget] = {
        "float": FloatTarget(float_network),
        "integer": IntegerTarget(bundle.network),
    }
    identity = "".join(sorted(record.sha256 for record in bundle.manifest.files.values()))
    crafted = craft_all(targets, images, settings, folder, identity)
    timings["attacks"] = time.perf_counter() - clock

    clock = time.perf_counter()
    hits = {name: _judge(target, images, crafted) for name, target in targets.items()}
    arms = _arm_rows(hits, settings)
    health = health_row(examine(targets, crafted, images, budget_of(settings.epsilon)))
    timings["judgement"] = time.perf_counter() - clock

    clock = time.perf_counter()
    runtimes = certify(bundle, settings.runtimes, images, crafted, settings.certify)
    timings["certification"] = time.perf_counter() - clock

    verdict, outcome, summary = conclude(arms, runtimes, health, settings)
    sample = images.codes[: max(settings.certify, 100)]
    trace = run_emulator(bundle.network, sample, record="traces")
    _, layers = float_network.record(to_images(sample))
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
        "layers": layer_rows(layers, trace),
        "gradient_health": health,
        "baseline": None if circumstances.baseline is None else dict(circumstances.baseline),
        "quantization": [dict(row) for row in circumstances.quantization],
        "proofs": [asdict(row) for row in prove(bundle.network)],
        "placement": _placement_row(bundle),
        "energy": _energy_row(bundle, sample, trace),
        "timings": timings,
        "versions": versions(),
        "reproduce": circumstances.reproduce,
    }
    return CheckResult(report, _gallery(images, crafted, targets))


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


def _judge(target: Target, images: Images, crafted: Mapping[str, Crafted]) -> dict[str, Hits]:
    return {
        "clean": correct(target, images.codes, images.labels),
        **{name: correct(target, made.codes, images.labels) for name, made in crafted.items()},
    }


def _arm_rows(hits: Mapping[str, Mapping[str, Hits]], settings: FidelityConfig) -> list[dict[str, Any]]:
    reference, deployed = hits["float"], hits["integer"]
    counted = ["clean", *(attack.name for attack in ATTACKS if attack.in_worst_case)]
    arms = [
        make_arm("clean", "none", "images as they are", 0.0, True, (reference["clean"], deployed["clean"])),
        make_arm(
            "worst case",
            "union of the arms",
            "right on the clean image and on every image crafted on either model",
            settings.epsilon,
            True,
            (worst_case([reference[name] for name in counted]), worst_case([deployed[name] for name in counted])),
        ),
        *(
            make_arm(
                attack.name,
                attack.label.format(**settings.model_dump()),
                attack.description,
                settings.epsilon,
                False,
                (reference[attack.name], deployed[attack.name]),
            )
            for attack in ATTACKS
        ),
    ]
    return [arm_row(arm, settings.margin, settings.confidence) for arm in arms]


def _placement_row(bundle: Bundle) -> dict[str, Any]:
    placed = placement(bundle.network, LOIHI2)
    return {
        "target": placed.target,
        "neurons": placed.neurons,
        "synapses": placed.connections,
        "weight_bytes": placed.weight_bytes,
        "memory_bytes": placed.memory_bytes,
        "minimum_cores": placed.minimum_cores,
        "minimum_chips": placed.minimum_chips,
        "populations": [
            {
                "name": row.population,
                "neurons": row.neurons,
                "synapses": row.connections,
                "fan_in": row.fan_in,
                "fan_out": row.fan_out,
                "axons_in": row.axons_in,
                "axons_out": row.axons_out,
                "weight_bytes": row.weight_bytes,
                "state_bytes": row.state_bytes,
                "minimum_cores": row.minimum_cores,
            }
            for row in placed.populations
        ],
    }


def _energy_row(bundle: Bundle, sample: NDArray[np.uint8], trace: Trace) -> dict[str, Any]:
    activity = count_activity(bundle.network, trace)
    operations = count_operations(bundle.network, sample, trace)
    return {
        "spikes_per_image": activity.spikes_per_image,
        "synaptic_operations_per_image": activity.synaptic_operations_per_image,
        "input_operations_per_image": operations.input,
        "neuron_updates_per_image": operations.updates,
        "estimates": [
            {"name": row.name, "least_nj": row.nanojoules[0], "most_nj": row.nanojoules[1], "source": row.source}
            for row in estimate_energy(operations)
        ],
        "note": f"spikes and operations are counted on {len(sample)} clean images; energies are estimates from "
        "published costs per operation, not measurements",
    }


def _gallery(images: Images, crafted: Mapping[str, Crafted], targets: Mapping[str, Target]) -> list[GalleryItem]:
    """Some images that fooled their target, the attacks in turn, no image twice."""
    items: list[GalleryItem] = []
    taken: set[int] = set()
    queues = {name: list(np.flatnonzero(made.fooled)) for name, made in crafted.items()}
    while any(queues.values()) and len(items) < GALLERY_ITEMS:
        for name, queue in queues.items():
            while queue and int(queue[0]) in taken:
                queue.pop(0)
            if queue and len(items) < GALLERY_ITEMS:
                index = int(queue.pop(0))
                taken.add(index)
                pair = np.stack([images.codes[index], crafted[name].codes[index]])
                answers = {model: target.logits(pair).argmax(1) for model, target in targets.items()}
                items.append(
                    GalleryItem(
                        index,
                        int(images.labels[index]),
                        name,
                        pair[0],
                        pair[1],
                        (int(answers["float"][0]), int(answers["float"][1])),
                        (int(answers["integer"][0]), int(answers["integer"][1])),
                    )
                )
    return items


def versions() -> dict[str, str]:
    """Versions of what ran."""
    found = {"python": platform.python_version()}
    for name in SOFTWARE:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
