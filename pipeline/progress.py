"""Progress on the terminal: what runs, how far it is, how long it will take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)


@contextmanager
def track(label: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar; call the yielded function with a note (and a number of units, by default 1) to advance it."""
    # Narrow enough for a terminal of 80 columns, note included.
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total, note="")

        def advance(note: str = "", units: int = 1) -> None:
            progress.update(task, advance=units, note=note)

        yield advance
