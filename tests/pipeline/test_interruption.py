"""An interrupt ends the work, even if the code it fell into lost the exception."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest

from pipeline.interruption import listen, raise_if_interrupted
from pipeline.progress import track

SIGNALS = pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    listen()
    yield
    listen()  # forgets what was asked
    for kind, handler in before.items():
        signal.signal(kind, handler)


@SIGNALS
def test_a_signal_raises_where_it_falls(kind: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(kind)


@SIGNALS
def test_a_swallowed_signal_ends_the_work_at_the_next_advance(kind: signal.Signals) -> None:
    advanced = 0

    def work() -> None:
        nonlocal advanced
        with track("work", 3) as advance:
            for _ in range(3):
                advance()
                advanced += 1
                with contextlib.suppress(BaseException):  # as a destructor does
                    signal.raise_signal(kind)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert advanced == 1


def test_nothing_is_raised_unasked_and_a_new_command_starts_afresh() -> None:
    raise_if_interrupted()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    listen()
    raise_if_interrupted()
