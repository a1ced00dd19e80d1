"""What a deployed model is compared with: the float SNN it was made of, or an earlier build of the integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hardware.emulator import run_emulator
from hardware.errors import RuleViolations, Violation
from hardware.files import sha256_of
from hardware.formats.bundle import COUNTEREXAMPLES_FILE, MANIFEST_FILE, Bundle
from hardware.trace import Trace
from pipeline.attacks.targets import Codes, FloatTarget, IntegerTarget, to_images
from pipeline.fidelity.divergence import build_rows, layer_rows, run_teacher_forced
from pipeline.models.float_file import load_float
from pipeline.models.spiking import SpikingNetwork


@dataclass(frozen=True)
class Reference:
    """The model that the deployed one must not be inferior to.

    Attributes:
        target: it can be asked and attacked.
        name: how labels of arms call it.
        word: says which of the two an accuracy is of.
        row: ``reference`` of ``report.json``.
        identity: tells it apart from others.
        compare: images and the deployed model's trace of them to ``layers`` of ``report.json``.
        network: of the float SNN, if that is the reference.
    """

    target: FloatTarget | IntegerTarget
    name: str
    word: str
    row: dict[str, Any]
    identity: str
    compare: Callable[[Codes, Trace], list[dict[str, Any]]]
    network: SpikingNetwork | None = None


def float_reference(bundle: Bundle) -> Reference:
    """The float SNN in a bundle."""
    network = load_float(bundle.path)

    def compare(codes: Codes, deployed: Trace) -> list[dict[str, Any]]:
        _, layers = network.record(to_images(codes))
        spikes = {name: layer.spikes.numpy() for name, layer in layers.items()}
        return layer_rows(layers, deployed, run_teacher_forced(bundle.network, codes, spikes))

    row: dict[str, Any] = {"kind": "float", "name": "the float SNN", "word": "trained"}
    return Reference(FloatTarget(network), row["name"], row["word"], row, "", compare, network)


def earlier_build(bundle: Bundle, earlier: Bundle) -> Reference:
    """The integer network of an earlier bundle.

    Raises:
        RuleViolations: everything that keeps the two from being shown the same images.
    """
    old, new = earlier.network, bundle.network
    pairs = (
        ("images", old.input.shape, new.input.shape),
        ("codes", old.input.max_code, new.input.max_code),
        ("classes", old.classes, new.classes),
    )
    remedy = "compare builds for the same data"
    if problems := [Violation(name, "are the same", str(a), str(b), remedy) for name, a, b in pairs if a != b]:
        raise RuleViolations(f"{earlier.path} as the reference of {bundle.path}", problems)

    def compare(codes: Codes, deployed: Trace) -> list[dict[str, Any]]:
        return build_rows(old, run_emulator(old, codes, record="traces"), deployed)

    row: dict[str, Any] = {
        "kind": "bundle",
        "name": "the earlier build",
        "word": "earlier",
        "bundle": str(earlier.path),
        "manifest_sha256": sha256_of(earlier.path / MANIFEST_FILE),
        "steps": old.steps,
        "bits": {synapse.name: synapse.bits for synapse in old.synapses},
    }
    target = IntegerTarget(old, "earlier build")
    return Reference(target, row["name"], row["word"], row, identity_of(earlier), compare)


def identity_of(bundle: Bundle) -> str:
    """Tells bundles of other models apart."""
    files = bundle.manifest.files.items()
    return "".join(sorted(record.sha256 for name, record in files if name != COUNTEREXAMPLES_FILE))
