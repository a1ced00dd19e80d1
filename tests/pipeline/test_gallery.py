"""The gallery: images that an attack changed and that fooled, the attacks in turn, and both models' spikes on them."""

from __future__ import annotations

import numpy as np

from hardware.emulator import run_emulator
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import FloatTarget, IntegerTarget
from pipeline.fidelity.crafting import Images
from pipeline.fidelity.gallery import choose_items, with_spikes
from tests.pipeline.attack_samples import target
from tests.pipeline.samples import random_images

CODES = random_images((1, 8, 8), 6, 2)
IMAGES = Images(CODES, np.zeros(6, np.int64), 5)


def made(fooled: list[int], changed: list[int]) -> Crafted:
    codes = CODES.copy()
    codes[changed] ^= 1
    return Crafted(codes, np.isin(np.arange(6), fooled), np.zeros(6), None, 1)


def test_attacks_take_turns_and_no_image_comes_twice_or_unchanged() -> None:
    targets = {"float": target("float"), "integer": target("integer")}
    crafted = {"one": made([0, 1, 2, 3], [1, 2, 3]), "two": made([1, 4], [1, 4, 5])}
    items = choose_items(IMAGES, crafted, targets)
    assert [(item.attack, item.sample) for item in items] == [("one", 1), ("two", 4), ("one", 2), ("one", 3)]
    assert all(item.largest_change == 1 for item in items)


def test_spikes_are_those_of_both_models_on_the_adversarial_image() -> None:
    reference, deployed = target("float"), target("integer")
    assert isinstance(reference, FloatTarget)
    assert isinstance(deployed, IntegerTarget)
    chosen = choose_items(IMAGES, {"one": made([2], [2])}, {"float": reference, "integer": deployed})
    (item,) = with_spikes(chosen, reference.network, deployed.network)
    _, layers = reference.network.record(reference.network.images(item.adversarial[None]))
    trace = run_emulator(deployed.network, item.adversarial[None], "spikes")
    assert [layer.name for layer in item.spikes] == list(layers)
    for layer in item.spikes:
        spikes = trace.populations[layer.name].spikes
        assert spikes is not None
        assert np.array_equal(layer.reference, layers[layer.name].spikes[0].numpy())
        assert np.array_equal(layer.deployed, spikes[0])
