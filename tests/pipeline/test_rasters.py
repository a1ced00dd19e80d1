"""Spike rasters: the same neurons of both models, and every spike in the colour of who has it."""

from __future__ import annotations

import numpy as np

from pipeline.fidelity.gallery import LayerSpikes
from pipeline.fidelity.rasters import BETWEEN, NEURONS, ONLY_DEPLOYED, ONLY_REFERENCE, SILENT, SPIKE, raster_pair


def colours(*names: tuple[int, int, int]) -> list[list[int]]:
    return [list(name) for name in names]


def test_a_spike_has_the_colour_of_who_has_it() -> None:
    reference = np.array([[True, True, False, False]])
    deployed = np.array([[True, False, True, False]])
    pair = raster_pair([LayerSpikes("conv1", reference, deployed)])
    assert pair.reference[0, :5].tolist() == colours(SPIKE, ONLY_REFERENCE, SILENT, SILENT, BETWEEN)
    assert pair.deployed[0, :5].tolist() == colours(SPIKE, SILENT, ONLY_DEPLOYED, SILENT, BETWEEN)
    assert pair.text == "conv1 2 of 4"


def test_layers_lie_below_each_other_with_a_line_between() -> None:
    one, two = (np.zeros((3, 5), bool), np.ones((3, NEURONS + 9), bool))
    pair = raster_pair([LayerSpikes("a", one, one), LayerSpikes("b", two, two)])
    assert pair.reference.shape == pair.deployed.shape == (7, NEURONS, 3)
    assert (pair.reference[3] == BETWEEN).all()
    assert (pair.reference[4:] == SPIKE).all()
    assert pair.text == "a 0 of 15; b 0 of 147"


def test_of_many_neurons_those_that_differ_are_shown_and_then_those_that_spike_most() -> None:
    neurons = 3 * NEURONS
    reference = np.zeros((4, neurons), bool)
    reference[:, :NEURONS] = True
    deployed = reference.copy()
    deployed[2, -1] = True
    pair = raster_pair([LayerSpikes("a", reference, deployed)])
    assert (pair.deployed[2, -1] == ONLY_DEPLOYED).all()
    assert (pair.deployed[:, :-1] == SPIKE).all()
