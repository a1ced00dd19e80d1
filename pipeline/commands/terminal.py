"""What all commands print with, and how they end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from hardware.formats.bundle import Bundle

out = Console()
errors = Console(stderr=True)
ERROR, USAGE, FAIL, INTERRUPTED = 1, 2, 3, 130
UNBROKEN = 15  # columns no wider than this keep their words whole on a narrow terminal


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table of plain text."""
    made = Table(title=escape(title), title_justify="left", show_header=any(columns))
    cells = [[str(cell) for cell in row] for row in rows]
    for index, column in enumerate(columns):
        widest = max((len(row[index]) for row in cells), default=0)
        made.add_column(column, overflow="fold", no_wrap=widest <= UNBROKEN)
    for row in cells:
        made.add_row(*(escape(cell) for cell in row))
    return made


def show_files(bundle: Bundle) -> None:
    """Print a bundle's files."""
    rows = ((name, f"{r.bytes:,}", r.sha256[:16]) for name, r in sorted(bundle.manifest.files.items()))
    out.print(table(str(bundle.path), ("file", "bytes", "sha256"), rows))


def command_line() -> str:
    """What the user typed."""
    return shlex.join(["spikeguard", *sys.argv[1:]])


def usage(message: str) -> NoReturn:
    """End because of wrong usage."""
    errors.print(f"[red]error:[/red] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(USAGE)
