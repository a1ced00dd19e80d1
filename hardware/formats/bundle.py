"""Reads a bundle: a folder that holds one deployed network in every format, and proof that it is complete.

``manifest.json`` lists every file with its size and SHA-256. A bundle is never edited, so each difference
between the manifest and the folder is an error, and all of them are named at once.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, JsonValue

from hardware.bounds import require_no_wrap
from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.files import MAX_JSON_BYTES, read_arrays, read_bytes, sha256_of
from hardware.formats.counterexamples import Counterexamples, load_counterexamples, no_counterexamples
from hardware.formats.float_golden import FloatGolden, read_float_golden
from hardware.formats.network_file import ARRAYS_FILE, JSON_FILE, load_network
from hardware.formats.strict import StrictModel, parse_strict
from hardware.network import IntegerNetwork
from hardware.trace import Trace, unpack_trace

MANIFEST_FILE = "manifest.json"
GOLDEN_FILE = "golden.npz"
GOLDEN_INPUTS = "inputs"
NIR_FILE = "model.nir"
NIR_CUBA_FILE = "model.cuba.nir"
NETX_FILE = "model.net"
COUNTEREXAMPLES_FILE = "counterexamples.npz"
ONNX_FILE = "model.onnx"
ONNX_STEP_FILE = "model.step.onnx"
ONNX_INT8_FILE = "model.int8.onnx"
ONNX_FLOAT_FILE = "model.float.onnx"
FLOAT_GOLDEN_FILE = "golden.float.npz"
REQUIRED_FILES = (JSON_FILE, ARRAYS_FILE, GOLDEN_FILE)
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
REMEDY = "bundles are never edited; export it again or fetch an intact copy"


class FileRecord(StrictModel):
    """What the manifest says of one file."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class Manifest(StrictModel):
    """Contents of ``manifest.json``.

    Attributes:
        files: every file of the bundle but the manifest itself, by name.
        semantics: the network's semantics card.
        versions: of the software that wrote the bundle.
        provenance: plain JSON facts about where the network came from.
    """

    format: Annotated[str, Field(pattern=r"^spikeguard\.bundle/1$")]
    files: dict[str, FileRecord]
    semantics: dict[str, JsonValue]
    versions: dict[str, str]
    provenance: dict[str, JsonValue]


@dataclass(frozen=True)
class Golden:
    """Inputs with the trace the network is meant to leave.

    Attributes:
        codes: uint8 ``(samples, [steps,] *shape)``.
        trace: of the reference.
    """

    codes: NDArray[np.uint8]
    trace: Trace


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files all are what its manifest says."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Path of one of its files.

        Raises:
            SpikeguardError: if the bundle has no such file.
        """
        if name not in self.manifest.files:
            present = ", ".join(sorted(self.manifest.files))
            raise SpikeguardError(f"{self.path} has no {name} (it has {present}); export it with that format")
        return self.path / name

    def __contains__(self, name: str) -> bool:
        return name in self.manifest.files

    @cached_property
    def network(self) -> IntegerNetwork:
        """The integer network.

        Raises:
            SpikeguardError: if its files are not well formed, the manifest describes another network, or a sum
                could wrap on 24-bit hardware.
        """
        network = load_network(self.path)
        if json.loads(json.dumps(network.semantics_card())) != self.manifest.semantics:
            raise SpikeguardError(f"{self.path}: the semantics card is not that of its network; {REMEDY}")
        require_no_wrap(network)
        return network

    @cached_property
    def golden(self) -> Golden:
        """The golden inputs and their trace.

        Raises:
            SpikeguardError: if they are not well formed or not of this network.
        """
        path = self.file(GOLDEN_FILE)
        arrays = read_arrays(path)
        codes = arrays.pop(GOLDEN_INPUTS, None)
        if codes is None or codes.dtype != np.uint8:
            raise SpikeguardError(f"{path} has no golden inputs of type uint8; {REMEDY}")
        trace = unpack_trace(arrays)
        if len(codes) != trace.samples:
            raise SpikeguardError(f"{path} has {len(codes)} inputs and {trace.samples} traces; {REMEDY}")
        if set(trace.populations) != set(self.network.by_name):
            raise SpikeguardError(f"{path} holds traces of other populations than the network's; {REMEDY}")
        return Golden(codes, trace)

    @cached_property
    def float_golden(self) -> FloatGolden:
        """The golden activity of the float SNN, on the golden inputs.

        Raises:
            SpikeguardError: if there is none, or it is not well formed or of other inputs.
        """
        golden = read_float_golden(self.file(FLOAT_GOLDEN_FILE))
        if len(golden.activity.logits) != len(self.golden.codes):
            raise SpikeguardError(f"{self.path}: {FLOAT_GOLDEN_FILE} is not of the golden inputs; {REMEDY}")
        return golden

    @cached_property
    def counterexamples(self) -> Counterexamples:
        """Images that fooled this network or earlier builds; none if the bundle has no such file.

        Raises:
            SpikeguardError: if they are not well formed or not of this network.
        """
        if COUNTEREXAMPLES_FILE not in self:
            return no_counterexamples(self.network.input.shape)
        return load_counterexamples(self.file(COUNTEREXAMPLES_FILE), self.network)


def open_bundle(path: Path) -> Bundle:
    """Open a bundle folder and check every byte of it against its manifest.

    Raises:
        SpikeguardError: if there is no readable manifest; ``RuleViolations`` names each missing, unlisted or
            altered file.
    """
    if not path.is_dir():
        raise SpikeguardError(f"{path} is not a bundle folder; give the folder that holds {MANIFEST_FILE}")
    manifest_path = path / MANIFEST_FILE
    manifest = parse_strict(Manifest, read_bytes(manifest_path, MAX_JSON_BYTES), str(manifest_path))
    problems = [*_name_violations(manifest)]
    if not problems:
        problems = [*_presence_violations(path, manifest), *_content_violations(path, manifest)]
    if problems:
        raise RuleViolations(str(path), problems)
    return Bundle(path, manifest)


def _name_violations(manifest: Manifest) -> list[Violation]:
    return [
        Violation(repr(name), "name is a plain file name", repr(name), FILE_NAME.pattern, REMEDY)
        for name in manifest.files
        if not FILE_NAME.fullmatch(name) or name == MANIFEST_FILE
    ]


def _presence_violations(path: Path, manifest: Manifest) -> list[Violation]:
    present = {entry.name for entry in path.iterdir()} - {MANIFEST_FILE}
    missing = sorted(set(manifest.files) - present)
    unlisted = sorted(present - set(manifest.files))
    unnamed = [name for name in REQUIRED_FILES if name not in manifest.files]
    return [
        *(Violation(name, "listed file exists", "missing", "present", REMEDY) for name in missing),
        *(Violation(name, "file is listed", "unlisted", "listed in the manifest", REMEDY) for name in unlisted),
        *(Violation(name, "bundle has this file", "not listed", "listed", REMEDY) for name in unnamed),
    ]


def _content_violations(path: Path, manifest: Manifest) -> list[Violation]:
    problems = []
    for name, expected in manifest.files.items():
        file = path / name
        if file.is_symlink() or (file.exists() and not file.is_file()):
            problems.append(Violation(name, "is a plain file", "a link or folder", "a file", REMEDY))
        elif not file.exists():
            continue
        elif (size := file.stat().st_size) != expected.bytes:
            problems.append(Violation(name, "size", f"{size:,} bytes", f"{expected.bytes:,}", REMEDY))
        elif (found := sha256_of(file)) != expected.sha256:
            problems.append(Violation(name, "SHA-256", found[:16], expected.sha256[:16], REMEDY))
    return problems
