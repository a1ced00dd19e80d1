"""Progress on the terminal: what runs, how far it is, how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from pipeline.interruption import raise_if_interrupted

console = Console(stderr=True)

# Long enough to see a few steps of a large network, and its validation between them.
SPEED_ESTIMATE_SECONDS = 600.0
SECONDS_BETWEEN_NOTES = 0.5

Advance = Callable[..., None]
_SHOWN: ContextVar[Advance | None] = ContextVar("shown", default=None)
"""What advances the bar on the terminal, if there is one: work within other work speaks in its note."""


@contextmanager
def track(label: str, total: int, *, per: int = 1, done: int = 0) -> Iterator[Advance]:
    """A progress bar; call the yielded function with a note and a number of units, by default 1, to advance it.

    A note may be a function that makes it: it is called twice a second at most, and may be slow.

    Args:
        label: what is done.
        total: units of work.
        per: units that are counted as one, as batches of an epoch are; the bar itself moves by units.
        done: units that were done before.
    """
    if (outer := _SHOWN.get()) is not None:
        yield _speaking_through(outer, label, total // per, per, done)
        return
    # Narrow enough for a terminal of 80 columns, note included.
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=10),
        _Count(per),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console, speed_estimate_period=SPEED_ESTIMATE_SECONDS) as progress:
        task = progress.add_task(label, total=total, completed=done, note="")

        noted = time.monotonic()

        def advance(note: str | Callable[[], str] = "", units: int = 1) -> None:
            nonlocal noted
            raise_if_interrupted()
            if callable(note) and time.monotonic() - noted < SECONDS_BETWEEN_NOTES:
                progress.advance(task, units)
                return
            noted = time.monotonic()
            progress.update(task, advance=units, note=note() if callable(note) else note)

        shown = _SHOWN.set(advance)
        try:
            yield advance
        finally:
            _SHOWN.reset(shown)


def _speaking_through(outer: Advance, label: str, total: int, per: int, done: int) -> Advance:
    """Progress of a part, told in the note of the bar that shows the whole."""

    def advance(note: str | Callable[[], str] = "", units: int = 1) -> None:  # noqa: ARG001
        nonlocal done
        done += units
        outer(lambda: f"{label} {done // per}/{total}", units=0)

    return advance


class _Count(ProgressColumn):
    """``done/total``, and within one of several counted units its tenths too, as in ``3.4/40``."""

    def __init__(self, per: int) -> None:
        super().__init__()
        self.per = per

    def render(self, task: Task) -> Text:
        """How it looks now."""
        units, total = int(task.completed), int(task.total or 0) // self.per
        tenths = f".{units % self.per * 10 // self.per}" if units % self.per else ""
        return Text(f"{units // self.per}{tenths}/{total}", style="progress.download")
