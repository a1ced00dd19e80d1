"""What NIR leaves open: a graph of differential equations does not say how a simulator steps through it.

Two frameworks run one file to different spikes because each has its own answers, so none is guessed here. They are
named one by one, or come with the name of the framework that wrote the file; whatever is still open is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hardware.errors import RuleViolations, Violation
from hardware.formats.nir_graph import NirFile

Reset = Literal["zero", "subtract"]
Comparison = Literal["above", "reached"]
Decay = Literal["euler", "exponential"]
Gain = Literal["per-step", "times-dt"]
SynapseGain = Literal["per-step", "decay"]
Inputs = Literal["pixels", "spikes"]
MAX_STEPS = 64


@dataclass(frozen=True)
class Conventions:
    """How a NIR graph is stepped through.

    Attributes:
        steps: T.
        dt: seconds per step, in the units of the file's time constants.
        reset: of a membrane after a spike: to zero, or by the threshold.
        comparison: a neuron spikes "above" its threshold (v > threshold) or once it is "reached" (v >= threshold).
        decay: share of a state that is kept per step: 1 - dt / tau (Euler's step) or exp(-dt / tau).
        if_gain: what an ``IF`` adds to its membrane: r x "per-step", or r x "times-dt".
        synapse_gain: what a ``CubaLIF`` adds to its current: w_in x "per-step", or w_in x times the share that
            decays ("decay").
        input: "pixels", 8-bit codes that stand for code / 255, or "spikes", codes that stand for themselves.
    """

    steps: int
    dt: float
    reset: Reset
    comparison: Comparison
    decay: Decay
    if_gain: Gain
    synapse_gain: SynapseGain
    input: Inputs


@dataclass(frozen=True)
class _Question:
    """One thing that NIR leaves open.

    Attributes:
        kinds: of nodes that raise it; none if every graph does.
        answers: words to choose from, or what a number must be.
        asked: in words.
    """

    kinds: tuple[str, ...]
    answers: tuple[str, ...]
    asked: str


NEURONS = ("IF", "LIF", "CubaLIF")
LEAKY = ("LIF", "CubaLIF", "LI", "CubaLI")
QUESTIONS: Mapping[str, _Question] = {
    "steps": _Question((), (f"1..{MAX_STEPS}",), "time steps per inference"),
    "dt": _Question(("IF", *LEAKY), ("a positive number",), "seconds per step"),
    "reset": _Question(NEURONS, get_args(Reset), "what a spike does to the membrane"),
    "comparison": _Question(NEURONS, get_args(Comparison), "whether a neuron spikes at its threshold or above"),
    "decay": _Question(LEAKY, get_args(Decay), "what a time constant keeps per step: 1 - dt/tau or exp(-dt/tau)"),
    "if_gain": _Question(("IF",), get_args(Gain), "whether an IF adds r x, or r x dt"),
    "synapse_gain": _Question(
        ("CubaLIF", "CubaLI"), get_args(SynapseGain), "whether a current jumps by w_in x, or w_in x times its decay"
    ),
    "input": _Question((), get_args(Inputs), "what the input is"),
}
WRITERS: Mapping[str, Mapping[str, Any]] = {
    "snntorch": {"dt": 1e-4, "comparison": "above", "decay": "euler", "synapse_gain": "decay"},
    # Its exporter writes dt / tau_mem_inv for a time constant, dt = 1 ms, so that what is kept per step is that of
    # dt squared; and its currents jump.
    "norse": {
        "dt": 1e-6,
        "reset": "zero",
        "comparison": "above",
        "decay": "euler",
        "if_gain": "per-step",
        "synapse_gain": "per-step",
    },
    "spikingjelly": {
        "dt": 1e-4,
        "reset": "zero",
        "comparison": "reached",
        "decay": "euler",
        "if_gain": "times-dt",
        "synapse_gain": "decay",
    },
    # Time constants are counted in steps.
    "sinabs": {"dt": 1.0, "comparison": "reached", "decay": "exponential", "if_gain": "per-step"},
}
"""Answers that come with the framework that wrote a file, as the network ran there. What a file of it does not tell
stays open: the resets of snntorch and sinabs are settings of their neurons."""


def conventions_of(file: NirFile, written_by: str | None, assumed: Sequence[str]) -> Conventions:
    """All answers for a graph.

    Args:
        file: whose nodes raise the questions; ``dt`` in its metadata is an answer.
        written_by: a key of ``WRITERS``, or None.
        assumed: ``key=value``; they come before the writer's.

    Raises:
        RuleViolations: for every question without an answer, and every answer that is none.
    """
    problems: list[Violation] = []
    answers: dict[str, Any] = dict(WRITERS[written_by]) if written_by else {}
    if isinstance(file.metadata.get("dt"), int | float):
        answers["dt"] = float(file.metadata["dt"])
    for entry in assumed:
        key, equals, text = entry.partition("=")
        if not equals or key not in QUESTIONS:
            rule, limit = "assumption is KEY=VALUE", ", ".join(QUESTIONS)
            problems.append(Violation("--assume", rule, entry, limit, "choose a key"))
        else:
            answers[key] = text
    kinds = {node.kind for node in file.nodes}
    found: dict[str, Any] = {}
    for key, question in QUESTIONS.items():
        limit = " or ".join(question.answers)
        if key not in answers:
            if not question.kinds or kinds & set(question.kinds):
                is_told = not written_by and any(key in known for known in WRITERS.values())
                remedy = f"--assume {key}=…" + (", or --written-by" if is_told else "")
                problems.append(Violation(key, question.asked, "not said in the file", limit, remedy))
            found[key] = question.answers[0]
            continue
        value = _answer(key, answers[key])
        if value is None:
            problems.append(Violation(key, question.asked, str(answers[key]), limit, f"--assume {key}=…"))
        found[key] = value
    if problems:
        raise RuleViolations("what NIR leaves open", problems)
    found["dt"] = found["dt"] if isinstance(found["dt"], float) else 1.0  # nothing asks for it
    return Conventions(**found)


def _answer(key: str, given: Any) -> Any:
    """The answer that a text or number is; None if it is none."""
    if key not in ("steps", "dt"):
        return given if given in QUESTIONS[key].answers else None
    try:
        number = int(given) if key == "steps" else float(given)
    except ValueError:
        return None
    fits = 1 <= number <= MAX_STEPS if key == "steps" else 0 < number < float("inf")
    return number if fits else None
