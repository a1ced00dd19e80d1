from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from rich.progress import Task, TaskID

from pipeline import progress
from pipeline.progress import _Count, track


def counted(per: int, total: int, completed: int) -> str:
    task = Task(TaskID(0), "", total, completed, _get_time=lambda: 0.0)
    return _Count(per).render(task).plain


@pytest.mark.parametrize(
    ("per", "total", "completed", "shown"),
    [(1, 40, 3, "3/40"), (16, 640, 0, "0/40"), (16, 640, 32, "2/40"), (16, 640, 47, "2.9/40"), (3, 6, 6, "2/2")],
)
def test_units_are_counted_together_and_tenths_show_what_is_under_way(
    per: int, total: int, completed: int, shown: str
) -> None:
    assert counted(per, total, completed) == shown


def test_the_bar_shows_label_count_and_note(capsys: pytest.CaptureFixture[str]) -> None:
    with track("train", 6, per=3, done=3) as advance:
        advance("loss 1.23", 3)
    shown = capsys.readouterr().err
    assert all(words in shown for words in ("train", "2/2", "loss 1.23"))


def test_a_costly_note_is_made_now_and_then_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    made: list[float] = []

    def note() -> str:
        made.append(clock)
        return "note"

    with track("train", 100) as advance:
        for step in range(100):
            clock = step / 10
            advance(note)
    assert 18 <= len(made) <= 20
    assert min(later - earlier for earlier, later in pairwise(made)) >= 0.5


def test_work_within_other_work_speaks_in_the_note_of_its_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with track("score", 2) as advance:
        with track("attack", 6, per=2, done=2) as part:
            part("not shown", units=2)
        progress_of_part = capsys.readouterr().err
        advance("one")
        advance("two")
    shown = progress_of_part + capsys.readouterr().err
    assert all(words in shown for words in ("score", "2/2", "two"))
    assert "not shown" not in shown
    with track("later", 1) as advance:
        advance("a bar of its own again")
    assert "later" in capsys.readouterr().err


def test_a_part_tells_its_label_and_its_count() -> None:
    told: list[str] = []

    def outer(note: Callable[[], str], units: int) -> None:
        assert units == 0
        told.append(note())

    part = progress._speaking_through(outer, "attack", 3, per=2, done=2)
    part("a note", units=2)
    part(units=2)
    assert told == ["attack 2/3", "attack 3/3"]
