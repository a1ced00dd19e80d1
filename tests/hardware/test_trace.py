from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardware.errors import SpikeguardError
from hardware.trace import PopulationTrace, Trace, compare_traces, concatenate, pack_trace, unpack_trace

SHAPE = (4, 3, 21)
"""Samples, steps, and neurons that do not fill their last byte."""


def random_trace(rng: np.random.Generator, samples: int = SHAPE[0]) -> Trace:
    shape = (samples, *SHAPE[1:])
    return Trace(
        rng.integers(-99, 99, (samples, 2)),
        {
            "both": PopulationTrace(rng.random(shape) < 0.3, rng.integers(-9, 9, shape).astype(np.int32)),
            "spikes": PopulationTrace(rng.random(shape) < 0.3, None),
            "out": PopulationTrace(None, rng.integers(-9, 9, (samples, SHAPE[1], 2)).astype(np.int32)),
        },
    )


def values(trace: Trace) -> dict[str, NDArray[Any] | None]:
    found: dict[str, NDArray[Any] | None] = {"readouts": trace.readouts}
    for name, population in trace.populations.items():
        found |= {f"{name} spikes": population.spikes, f"{name} membranes": population.membranes}
    return found


def same(left: Trace, right: Trace) -> bool:
    a, b = values(left), values(right)

    def equal(x: NDArray[Any] | None, y: NDArray[Any] | None) -> bool:
        return x is y if x is None or y is None else np.array_equal(x, y)

    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


def test_spikes_take_a_bit_each_in_memory_and_in_files() -> None:
    spikes = np.random.default_rng(0).random((2, 5, 1000)) < 0.2
    trace = Trace(np.zeros((2, 1), np.int64), {"p": PopulationTrace(spikes, None)})
    kept = trace.populations["p"]
    assert kept.spike_bits is not None
    assert kept.spike_bits.nbytes == spikes.size // 8
    assert pack_trace(trace)["spikes.p"].nbytes == spikes.size // 8
    assert kept.spikes is not None
    assert kept.spikes.dtype == np.bool_
    assert np.array_equal(kept.spikes, spikes)


def test_unpacked_spikes_cannot_be_written_to() -> None:
    spikes = PopulationTrace(np.zeros(SHAPE, bool), None).spikes
    assert spikes is not None
    with pytest.raises(ValueError, match="read-only"):
        spikes[0, 0, 0] = True


def test_parts_and_files_give_the_trace_back() -> None:
    trace = random_trace(np.random.default_rng(1))
    assert trace[1:3].samples == 2
    assert same(concatenate([trace[:1], trace[1:3], trace[3:]]), trace)
    assert not same(concatenate([trace[1:], trace[:1]]), trace)
    assert same(unpack_trace(pack_trace(trace)), trace)


def test_what_one_part_lacks_the_whole_lacks() -> None:
    whole, rng = random_trace(np.random.default_rng(2)), np.random.default_rng(3)
    less = random_trace(rng)
    less = Trace(less.readouts, {**less.populations, "both": PopulationTrace(None, less.populations["both"].membranes)})
    joined = concatenate([whole, less])
    assert joined.populations["both"].spikes is None
    assert joined.populations["both"].membranes is not None
    assert joined.populations["spikes"].spikes is not None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_every_difference_is_counted_and_the_first_is_placed(seed: int, flips: int) -> None:
    rng = np.random.default_rng(seed)
    trace = random_trace(rng)
    spikes, membranes = trace.populations["both"].spikes, trace.populations["both"].membranes
    assert spikes is not None
    assert membranes is not None
    differing = np.zeros(SHAPE, bool)
    differing.reshape(-1)[rng.choice(differing.size, flips, replace=False)] = True
    for changed, counts in (
        (PopulationTrace(spikes ^ differing, membranes), (flips, 0)),
        (PopulationTrace(spikes, membranes + differing), (0, flips)),
    ):
        found = compare_traces(trace, Trace(trace.readouts, {**trace.populations, "both": changed}))
        assert (found.spikes, found.membranes, found.readouts) == (*counts, 0)
        assert found.equal == (flips == 0)
        assert found.first == (("both", *np.argwhere(differing)[0]) if flips else None)


def test_earlier_populations_and_steps_come_first() -> None:
    trace = random_trace(np.random.default_rng(4))

    def flipped(name: str, at: tuple[int, int, int]) -> PopulationTrace:
        spikes = trace.populations[name].spikes
        assert spikes is not None
        changed = spikes.copy()
        changed[at] ^= True
        return PopulationTrace(changed, trace.populations[name].membranes)

    def first(both: tuple[int, int, int], spikes: tuple[int, int, int]) -> tuple[str, int, int, int] | None:
        changed = {"both": flipped("both", both), "spikes": flipped("spikes", spikes)}
        return compare_traces(trace, Trace(trace.readouts, {**trace.populations, **changed})).first

    assert first((2, 1, 20), (2, 1, 3)) == ("both", 2, 1, 20)
    assert first((2, 1, 20), (2, 0, 7)) == ("spikes", 2, 0, 7)
    assert first((3, 0, 0), (1, 2, 8)) == ("spikes", 1, 2, 8)


def test_what_a_runtime_does_not_expose_is_not_compared() -> None:
    trace = random_trace(np.random.default_rng(5))
    silent = Trace(trace.readouts, {"both": PopulationTrace(None, None)})
    found = compare_traces(trace, silent)
    assert (found.spikes, found.membranes, found.readouts, found.first) == (None, None, 0, None)
    assert compare_traces(trace, Trace(trace.readouts)).equal


@pytest.mark.parametrize("neurons", [20, 24])
def test_spikes_of_other_neurons_are_refused(neurons: int) -> None:
    """Also where as many bytes hold them."""
    trace = random_trace(np.random.default_rng(6))
    other = Trace(trace.readouts, {"spikes": PopulationTrace(np.zeros((*SHAPE[:2], neurons), bool), None)})
    with pytest.raises(SpikeguardError, match="population spikes: spikes have shape"):
        compare_traces(trace, other)


@pytest.mark.parametrize("neurons", [-1, 0, 16, 25, 2**40])
def test_files_whose_bits_and_neurons_do_not_fit_are_refused(neurons: int) -> None:
    arrays = pack_trace(random_trace(np.random.default_rng(7)))
    with pytest.raises(SpikeguardError, match="not well formed"):
        unpack_trace({**arrays, "neurons.both": np.array(neurons)})
