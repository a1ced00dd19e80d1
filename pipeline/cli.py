"""The command line: its entry point, and what becomes of errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer
from rich.markup import escape

from hardware.errors import RuleViolations, SpikeguardError
from pipeline.commands import checking, making, terminal, using
from pipeline.interruption import listen
from pipeline.target_tables import VIOLATION_COLUMNS, violation_rows

app = typer.Typer(
    name="spikeguard",
    help="Train spiking networks that withstand attacks, export them, and prove that the deployed model does too.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS = (
    making.demo,
    making.run,
    making.export,
    using.emulate,
    checking.fidelity,
    checking.selftest,
    making.sweep,
    checking.verify,
    checking.conformance,
    checking.check,
    using.serve,
    using.info,
)
for command in COMMANDS:
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: every error is one sentence on stderr and an exit code, never a traceback."""
    listen()
    try:
        code = app(args=arguments, standalone_mode=False)
        if code == terminal.INTERRUPTED:  # typer answers Ctrl-C with this code and no word
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        terminal.errors.print("interrupted; finished stages and attacks are kept, run the same command to go on")
        sys.exit(terminal.INTERRUPTED)
    except RuleViolations as error:
        terminal.errors.print(f"[red]error:[/red] {escape(error.subject)}", highlight=False, soft_wrap=True)
        terminal.errors.print(terminal.table("", VIOLATION_COLUMNS, violation_rows(error.violations)))
        sys.exit(terminal.ERROR)
    except SpikeguardError as error:
        terminal.errors.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(terminal.ERROR)
    except ModuleNotFoundError as error:
        remedy = "install spikeguard with the extra that brings it ('verify', 'serve' or 'train')"
        terminal.errors.print(
            f"[red]error:[/red] this needs {error.name}, which is not installed; {remedy}", highlight=False
        )
        sys.exit(terminal.ERROR)
    except OSError as error:
        terminal.errors.print(
            f"[red]error:[/red] {escape(str(error))}; check the path", highlight=False, soft_wrap=True
        )
        sys.exit(terminal.ERROR)
    except Exception as error:
        show = getattr(error, "show", None)  # click's usage errors print themselves
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", terminal.USAGE))


if __name__ == "__main__":
    main()
