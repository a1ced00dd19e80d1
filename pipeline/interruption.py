"""Ctrl-C and SIGTERM end a command as KeyboardInterrupt, even where the first exception is lost.

Python raises from a signal handler wherever the main thread happens to be. In a destructor, in a callback from C or
within somebody's ``except BaseException`` the exception is swallowed, and the command would go on as if nobody had
asked. So the handler leaves a note as well, and whatever advances a progress bar reads it.
"""

from __future__ import annotations

import signal
import threading

_requested = threading.Event()


def listen() -> None:
    """Let both signals raise KeyboardInterrupt from now on. For the main thread."""
    _requested.clear()
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, _interrupt)


def raise_if_interrupted() -> None:
    """Raise again what a signal raised before.

    Raises:
        KeyboardInterrupt: if a signal came after :func:`listen`.
    """
    if _requested.is_set():
        raise KeyboardInterrupt


def _interrupt(_signal: int, _frame: object) -> None:
    _requested.set()
    raise KeyboardInterrupt
