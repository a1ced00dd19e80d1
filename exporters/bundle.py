"""Writes a bundle: one network in every format it can be deployed in, with golden traces and checksums."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.netx import write_netx
from exporters.nir import write_nir
from exporters.onnx import write_onnx, write_step_onnx
from exporters.onnx_int8 import write_int8_onnx
from hardware.bounds import require_no_wrap
from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.files import atomic_folder, sha256_of, write_arrays, write_bytes, write_json
from hardware.formats.bundle import (
    COUNTEREXAMPLES_FILE,
    FILE_NAME,
    FLOAT_GOLDEN_FILE,
    GOLDEN_FILE,
    GOLDEN_INPUTS,
    MANIFEST_FILE,
    NETX_FILE,
    NIR_CUBA_FILE,
    NIR_FILE,
    ONNX_FILE,
    ONNX_FLOAT_FILE,
    ONNX_INT8_FILE,
    ONNX_STEP_FILE,
    REQUIRED_FILES,
    Bundle,
)
from hardware.formats.counterexamples import Counterexamples, save_counterexamples
from hardware.formats.network_file import save_network
from hardware.network import IntegerNetwork
from hardware.reference import run_reference
from hardware.trace import pack_trace

WRITING_SOFTWARE = ("spikeguard", "numpy", "safetensors", "nir", "h5py", "onnx")


MODEL_WRITERS: Mapping[str, Callable[[IntegerNetwork, Path], None]] = {
    NIR_FILE: partial(write_nir, profile="if", allow_deviations=True),
    NIR_CUBA_FILE: partial(write_nir, profile="cuba", allow_deviations=True),
    NETX_FILE: write_netx,
    ONNX_FILE: write_onnx,
    ONNX_STEP_FILE: write_step_onnx,
    ONNX_INT8_FILE: write_int8_onnx,
}
MODEL_FILES = tuple(MODEL_WRITERS)
UNROLLED_FILES = (ONNX_FILE, ONNX_INT8_FILE)
"""Model files that take one image per sample; the others take inputs that change over time as well."""
EXPORT_TARGETS: Mapping[str, tuple[str, ...]] = {
    "nir": (NIR_FILE, NIR_CUBA_FILE),
    "loihi": (NIR_FILE, NETX_FILE),
    "onnx": (ONNX_FILE, ONNX_STEP_FILE, ONNX_INT8_FILE),
    "all": MODEL_FILES,
}
"""Model files by the name of a deployment target; Lava's processes are built from the NIR file."""
FLOAT_ONNX_TARGETS = ("onnx", "all")
"""Targets that ``FLOAT_ONNX_FILES`` belong to, which are made of the float SNN and handed over ready made."""
FLOAT_ONNX_FILES = (ONNX_FLOAT_FILE, FLOAT_GOLDEN_FILE)


def write_bundle(
    folder: Path,
    network: IntegerNetwork,
    *,
    golden_codes: NDArray[np.uint8],
    float_model_files: Mapping[str, bytes],
    provenance: Mapping[str, Any],
    models: Collection[str] = MODEL_FILES,
) -> None:
    """Write a bundle; the folder appears complete or not at all, and replaces an older one.

    Args:
        folder: of the bundle.
        network: what is deployed.
        golden_codes: uint8 ``(samples, [steps,] *shape)``; the reference's trace of them is stored.
        float_model_files: further files by name, ready made: the float SNN.
        provenance: plain JSON facts about where the network came from.
        models: which of ``MODEL_FILES`` to write; leave out a format that cannot hold the network.

    Raises:
        RuleViolations: if a sum could wrap on 24-bit hardware; everything that any of the formats cannot hold.
    """
    require_no_wrap(network)
    _check_request(network, golden_codes, float_model_files, models)
    with atomic_folder(folder) as partial:
        save_network(network, partial)
        for name, content in float_model_files.items():
            write_bytes(partial / name, content)
        golden = pack_trace(run_reference(network, golden_codes, "traces"))
        write_arrays(partial / GOLDEN_FILE, {GOLDEN_INPUTS: golden_codes, **golden})
        _write_models(network, partial, models)
        files = sorted(file for file in partial.iterdir())
        manifest = {
            "format": "spikeguard.bundle/1",
            "files": {f.name: {"sha256": sha256_of(f), "bytes": f.stat().st_size} for f in files},
            "semantics": network.semantics_card(),
            "versions": _versions(),
            "provenance": dict(provenance),
        }
        try:
            write_json(partial / MANIFEST_FILE, manifest)
        except (TypeError, ValueError) as error:
            raise SpikeguardError(f"provenance of the bundle is not plain JSON ({error})") from error


def refusals(network: IntegerNetwork) -> dict[str, tuple[Violation, ...]]:
    """Of each model file that cannot hold a network, why; its name is a key of ``MODEL_WRITERS``."""
    refused = {}
    with TemporaryDirectory(prefix="spikeguard-") as folder:
        for name, write in MODEL_WRITERS.items():
            try:
                write(network, Path(folder) / name)
            except RuleViolations as error:
                refused[name] = error.violations
    return refused


def export_target(bundle: Bundle, target: str, folder: Path, float_onnx: Mapping[str, bytes]) -> None:
    """A new bundle of the same network with the model files of one of ``EXPORT_TARGETS``.

    Args:
        bundle: stays as it is; its golden inputs and its other files (the float SNN) go into the new one.
        target: a key of ``EXPORT_TARGETS``.
        folder: of the new bundle.
        float_onnx: contents of ``FLOAT_ONNX_FILES``, for the targets that have them and bundles with a float SNN.

    Raises:
        RuleViolations: everything that the target's formats cannot hold.
    """
    own = {*REQUIRED_FILES, *MODEL_FILES, *FLOAT_ONNX_FILES}
    others = {name: bundle.file(name).read_bytes() for name in bundle.manifest.files if name not in own}
    write_bundle(
        folder,
        bundle.network,
        golden_codes=bundle.golden.codes,
        float_model_files={**others, **float_onnx},
        provenance=bundle.manifest.provenance,
        models=EXPORT_TARGETS[target],
    )


def grow_bundle(bundle: Bundle, counterexamples: Counterexamples, folder: Path) -> None:
    """A new bundle that is the same but for its counterexamples.

    Args:
        bundle: stays as it is.
        counterexamples: the grown corpus.
        folder: of the new bundle.

    Raises:
        SpikeguardError: if there is something in the folder's place, or it lies in the bundle.
    """
    if folder.exists():
        raise SpikeguardError(f"{folder} exists already, and a bundle is never edited; name a new folder")
    if bundle.path.resolve() in folder.resolve().parents:
        raise SpikeguardError(f"{folder} lies in the bundle itself, which is never edited; name another folder")
    with atomic_folder(folder) as partial:
        records = dict(bundle.manifest.model_dump(mode="json")["files"])
        for name in records:
            shutil.copyfile(bundle.file(name), partial / name)
        corpus = partial / COUNTEREXAMPLES_FILE
        save_counterexamples(corpus, counterexamples)
        records[COUNTEREXAMPLES_FILE] = {"sha256": sha256_of(corpus), "bytes": corpus.stat().st_size}
        write_json(partial / MANIFEST_FILE, {**bundle.manifest.model_dump(mode="json"), "files": records})


def _write_models(network: IntegerNetwork, folder: Path, models: Collection[str]) -> None:
    problems: list[Violation] = []
    for name in MODEL_FILES:
        if name in models:
            try:
                MODEL_WRITERS[name](network, folder / name)
            except RuleViolations as error:
                problems += [
                    Violation(f"{name}: {v.object}", v.rule, v.actual, v.limit, v.remedy) for v in error.violations
                ]
    if problems:
        raise RuleViolations("bundle", problems)


def _check_request(
    network: IntegerNetwork,
    golden_codes: NDArray[np.uint8],
    float_model_files: Mapping[str, bytes],
    models: Collection[str],
) -> None:
    """Refuse what would make a bundle that cannot be opened or verified."""
    problems = []
    reserved = {*REQUIRED_FILES, *MODEL_FILES, MANIFEST_FILE}
    for name in float_model_files:
        if name in reserved or not FILE_NAME.fullmatch(name):
            limit = f"{FILE_NAME.pattern}, none of the bundle's own"
            problems.append(Violation(repr(name), "name is free and plain", repr(name), limit, "rename the file"))
    for name in sorted(set(models) - set(MODEL_FILES)):
        problems.append(Violation(name, "model file is known", name, ", ".join(MODEL_FILES), "choose among them"))
    if golden_codes.dtype != np.uint8 or not len(golden_codes):
        actual = f"{golden_codes.dtype} {golden_codes.shape}"
        rule = "golden inputs are 8-bit codes"
        problems.append(Violation("golden inputs", rule, actual, "uint8, 1 or more", "give some images as codes"))
    unrolled = [name for name in UNROLLED_FILES if name in models]
    if golden_codes.ndim == len(network.input.shape) + 2 and unrolled:
        rule = "the unrolled graph takes one image per sample"
        remedy = f"leave out {', '.join(unrolled)}; {ONNX_STEP_FILE} takes inputs that change over time"
        problems.append(Violation("golden inputs", rule, str(golden_codes.shape), "(samples, *shape)", remedy))
    if problems:
        raise RuleViolations("bundle", problems)


def _versions() -> dict[str, str]:
    """Versions of the installed software that wrote the files."""
    versions = {}
    for name in WRITING_SOFTWARE:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions
