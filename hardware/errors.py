"""Errors a user can act on: each names the object, the rule and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class SpikeguardError(Exception):
    """Something the user can mend; its message is one clear sentence with the remedy."""


class Missing(SpikeguardError):
    """Software or a file that some part needs is not there; the message says how to get it."""


@dataclass(frozen=True)
class Violation:
    """One broken rule: the object that breaks it, what it has, what is allowed, the way out."""

    object: str
    rule: str
    actual: str
    limit: str
    remedy: str


class RuleViolations(SpikeguardError):
    """Everything that is wrong with one thing, at once.

    Args:
        subject: what was judged, for the first line.
        violations: one row per broken rule; never empty.
    """

    def __init__(self, subject: str, violations: Sequence[Violation]) -> None:
        self.subject = subject
        self.violations = tuple(violations)
        rows = "\n".join(
            f"  {v.object}: {v.rule} (has {v.actual}, allowed {v.limit}); {v.remedy}" for v in self.violations
        )
        super().__init__(f"{subject}: {len(self.violations)} problem(s)\n{rows}")
