from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest

from hardware.formats.counterexamples import Counterexamples, no_counterexamples
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import Codes, Logits, Target
from pipeline.fidelity import corpus as corpora
from pipeline.fidelity.certification import select_subset
from pipeline.fidelity.corpus import as_crafted, behaviour_of, gather, minimize, replay_row
from pipeline.fidelity.crafting import Images
from tests.pipeline.attack_samples import SHAPE, clean, own_answers, target

SAMPLES, BUDGET = 24, 30


@dataclass
class Counter:
    """Answers class 1 where the first pixels of an image are, together, brighter than a limit."""

    name: str
    pixels: int
    limit: int

    def logits(self, codes: Codes) -> Logits:
        light = codes.reshape(len(codes), -1)[:, : self.pixels].astype(np.int64).sum(1)
        return np.stack([np.full(len(codes), self.limit), light], 1).astype(np.float64)


def changed(codes: Codes, seed: int = 0) -> Codes:
    moved = codes + np.random.default_rng(seed).integers(-BUDGET, BUDGET + 1, codes.shape)
    return moved.clip(0, 255).astype(np.uint8)


def models() -> dict[str, Target]:
    """A random network and a coarse build of it, which differ often."""
    return {"float": target("float"), "integer": target("integer", bits=3)}


def crafted(codes: Codes) -> Crafted:
    return Crafted(codes, np.zeros(len(codes), np.bool_), np.zeros(len(codes)), 0.0, len(codes))


IMAGES = Images(clean(SAMPLES), own_answers("float", clean(SAMPLES)), 0)
MADE = {name: crafted(changed(IMAGES.codes, seed)) for seed, name in enumerate(("one", "two", "three"))}


def test_a_change_is_shrunk_to_the_pixel_that_does_it_and_as_far_as_it_goes() -> None:
    counters: Mapping[str, Target] = {"float": Counter("a", 1, 120), "integer": Counter("b", 1, 120)}
    before = np.full((3, *SHAPE), 100, np.uint8)
    after = changed(before)
    after[:, 0, 0, 0] = 164  # what 6 of its 16 parts would still do
    labels = np.zeros(3, np.int64)
    kind = behaviour_of(counters, after, labels)
    assert kind.tolist() == [3, 3, 3]
    shrunk = minimize(counters, before, after, labels, kind).astype(np.int64) - before
    assert (shrunk.reshape(3, -1)[:, 0] == 64 * 6 // 16).all()
    assert not shrunk.reshape(3, -1)[:, 1:].any()


def test_a_minimised_image_does_what_it_did_with_no_larger_change() -> None:
    before, targets = IMAGES.codes, models()
    after = MADE["one"].codes
    kind = behaviour_of(targets, after, IMAGES.labels)
    assert len(set(kind.tolist())) > 1
    shrunk = minimize(targets, before, after, IMAGES.labels, kind)
    assert np.array_equal(behaviour_of(targets, shrunk, IMAGES.labels), kind)
    old, new = (codes.astype(np.int64) - before for codes in (after, shrunk))
    assert (np.abs(new) <= np.abs(old)).all()
    assert (new * old >= 0).all()
    assert np.abs(new).sum() < np.abs(old).sum() / 2


def test_what_differs_or_fooled_is_gathered_and_nothing_else() -> None:
    targets = models()
    found = gather(targets, IMAGES, MADE, no_counterexamples(SHAPE), np.zeros(0, np.int64))
    assert len(found) > 5
    kinds = behaviour_of(targets, found.codes, found.labels)
    assert (kinds > 0).all()
    assert np.array_equal(found.reference_wrong, kinds >= 2)
    assert np.array_equal(found.deployed_wrong, kinds % 2 == 1)
    assert {1, 2} <= set(kinds.tolist())
    untouched = (found.codes == found.clean).reshape(len(found), -1).all(1)
    assert np.isin(kinds[untouched], (1, 2)).all(), "an image that both get wrong as it is was fooled by nobody"
    assert np.abs(found.codes.astype(np.int64) - found.clean).max() <= BUDGET
    assert len(set(found.hashes)) == len(found)


def test_what_a_corpus_shows_already_is_not_added_again() -> None:
    targets = models()
    found = gather(targets, IMAGES, MADE, no_counterexamples(SHAPE), np.zeros(0, np.int64))
    some = found[np.arange(3)]
    again = gather(targets, IMAGES, MADE, found, behaviour_of(targets, found.codes, found.labels))
    assert len(again) == 0
    rest = gather(targets, IMAGES, MADE, some, behaviour_of(targets, some.codes, some.labels))
    assert len(rest) == len(found) - 3


def test_one_check_adds_a_limited_number_with_every_behaviour_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "MAX_ADDED", 4)
    found = gather(models(), IMAGES, MADE, no_counterexamples(SHAPE), np.zeros(0, np.int64))
    assert len(found) == 4
    assert {1, 2} <= set(behaviour_of(models(), found.codes, found.labels).tolist())


def test_a_replay_counts_who_is_wrong_now_and_what_changed() -> None:
    blank = np.zeros((5, *SHAPE), np.uint8)
    before = Counterexamples(
        blank, blank, np.arange(5), np.array([0, 0, 1, 1, 0], np.bool_), np.array([1, 1, 0, 1, 0], np.bool_)
    )
    row = replay_row(before, np.array([1, 0, 2, 3, 1]), added=2)
    assert row == {
        "images": 7,
        "replayed": 5,
        "reference_wrong": 2,
        "deployed_wrong": 3,
        "only_reference_wrong": 1,
        "only_deployed_wrong": 2,
        "newly_deployed_wrong": 1,
        "no_longer_deployed_wrong": 1,
        "added": 2,
    }


def test_runtimes_are_certified_on_the_corpus_before_anything_else() -> None:
    assert as_crafted(no_counterexamples(SHAPE)) == {}
    found = gather(models(), IMAGES, MADE, no_counterexamples(SHAPE), np.zeros(0, np.int64))
    subset = select_subset(IMAGES, as_crafted(found) | MADE, 5)
    assert subset.adversarial == 5
    assert np.array_equal(subset.codes[:5], found.codes[:5])
