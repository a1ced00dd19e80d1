"""How much of the difference each kind of rounding makes, as rows of the report.

The quantiser measures it on training images, which a check of the bundle does not have to have; so its rows travel in
the bundle's provenance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Set
from typing import Annotated, Any

from pydantic import Field

from hardware.errors import RuleViolations, Violation
from hardware.formats.bundle import MANIFEST_FILE, REMEDY, Bundle
from hardware.formats.network_file import Name
from hardware.formats.strict import StrictModel, parse_strict

MAX_ROWS = 100


class AttributionRecord(StrictModel):
    """JSON of an :class:`~pipeline.attribution.AttributionRow`."""

    rounded: Name
    disagreement: dict[Name, Annotated[float, Field(ge=0, le=1)]]
    logit_error: Annotated[float, Field(ge=0)]
    argmax_flips: Annotated[int, Field(ge=0)]
    samples: Annotated[int, Field(ge=1)]


class _Carried(StrictModel):
    attribution: Annotated[tuple[AttributionRecord, ...], Field(max_length=MAX_ROWS)]


def attribution_rows(bundle: Bundle) -> list[dict[str, Any]]:
    """The rows in a bundle, as ``attribution`` of ``report.json``; none if it was made without.

    Raises:
        RuleViolations: everything about them that is malformed or cannot be of the bundle's network.
    """
    content = json.dumps({"attribution": bundle.manifest.provenance.get("attribution", [])})
    subject = f"attribution in {bundle.path / MANIFEST_FILE}"
    rows = parse_strict(_Carried, content, subject, REMEDY).attribution
    spiking = {population.name for population in bundle.network.populations if population.spiking}
    if problems := [problem for row in rows for problem in _contradictions(row, spiking)]:
        raise RuleViolations(subject, problems)
    return [row.model_dump() for row in rows]


def _contradictions(row: AttributionRecord, spiking: Set[str]) -> Iterator[Violation]:
    if row.disagreement.keys() != spiking:
        named, allowed = (", ".join(sorted(names)) for names in (row.disagreement, spiking))
        yield Violation(row.rounded, "row is of the spiking populations", named, allowed, REMEDY)
    if row.argmax_flips > row.samples:
        limit = f"at most {row.samples}"
        yield Violation(row.rounded, "classes change of images looked at", str(row.argmax_flips), limit, REMEDY)
