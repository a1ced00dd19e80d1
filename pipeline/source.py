"""Which code made a result: results of other code are not reused."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

PACKAGES = ("hardware", "exporters", "pipeline")


@cache
def source_digest() -> str:
    """SHA-256 over this project's own code."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()
