"""What NIR leaves open is answered, or asked for all at once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware.errors import RuleViolations
from hardware.formats.nir_graph import NirFile, NirNode
from pipeline.importing.conventions import QUESTIONS, WRITERS, Conventions, conventions_of


def graph(*kinds: str, **metadata: object) -> NirFile:
    return NirFile((4,), tuple(NirNode(kind, kind, {}, ()) for kind in ("Input", *kinds, "Output")), metadata)


def asked(file: NirFile, written_by: str | None, *assumed: str) -> dict[str, str]:
    with pytest.raises(RuleViolations) as caught:
        conventions_of(file, written_by, assumed)
    return {row.object: row.actual for row in caught.value.violations}


@pytest.mark.parametrize(
    ("kinds", "questions"),
    [
        ((), {"steps", "input"}),
        (("IF",), {"steps", "input", "dt", "reset", "comparison", "if_gain"}),
        (("LIF",), {"steps", "input", "dt", "reset", "comparison", "decay"}),
        (("CubaLIF",), {"steps", "input", "dt", "reset", "comparison", "decay", "synapse_gain"}),
        (("LI",), {"steps", "input", "dt", "decay"}),
        (("IF", "CubaLI"), set(QUESTIONS)),
    ],
)
def test_a_graph_raises_the_questions_of_its_nodes(kinds: tuple[str, ...], questions: set[str]) -> None:
    assert asked(graph(*kinds), None) == dict.fromkeys(questions, "not said in the file")


@pytest.mark.parametrize(
    ("writer", "left"),
    [("snntorch", {"reset"}), ("norse", set()), ("spikingjelly", set()), ("sinabs", {"reset"})],
)
def test_the_writer_answers_all_but_what_it_has_settings_for(writer: str, left: set[str]) -> None:
    kinds = {"snntorch": ("LIF", "CubaLIF"), "sinabs": ("IF", "LIF", "LI")}.get(writer, ("IF", "LIF", "CubaLIF"))
    assert set(asked(graph(*kinds), writer)) == {"steps", "input", *left}
    assert set(WRITERS[writer]) <= set(QUESTIONS)


def test_what_is_assumed_comes_before_the_writer_and_that_before_nothing() -> None:
    said = ("steps=9", "input=pixels")
    found = conventions_of(graph("IF", "LIF"), "spikingjelly", said)
    assert found == Conventions(9, 1e-4, "zero", "reached", "euler", "times-dt", "decay", "pixels")
    changed = conventions_of(graph("IF", "LIF"), "spikingjelly", (*said, "dt=0.5", "comparison=above"))
    assert changed == replace(found, dt=0.5, comparison="above")


def test_a_step_in_the_metadata_is_an_answer() -> None:
    assert "dt" not in asked(graph("IF", dt=1e-3), None)


@pytest.mark.parametrize(
    ("entry", "where"),
    [
        ("steps=0", "steps"), ("steps=65", "steps"), ("steps=2.5", "steps"), ("dt=0", "dt"), ("dt=-1", "dt"),
        ("dt=nan", "dt"), ("dt=inf", "dt"), ("dt=soon", "dt"), ("reset=hard", "reset"), ("input=images", "input"),
        ("tau=3", "--assume"), ("steps", "--assume"), ("=3", "--assume"),
    ],
)  # fmt: skip
def test_answers_that_are_none_are_refused_with_what_is_allowed(entry: str, where: str) -> None:
    said = ["steps=9", "input=pixels", "reset=zero", entry]
    found = asked(graph("LIF"), "snntorch", *said)
    assert set(found) == {where}
