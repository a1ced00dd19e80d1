"""The waterfall names the kind of number that is to blame, and tells what it does not know."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hardware.formats.bundle import open_bundle
from hardware.network import IntegerNetwork, Synapse
from pipeline.attacks.black_box import random_noise
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import Codes, FloatTarget, IntegerTarget
from pipeline.fidelity import waterfall
from pipeline.fidelity.arms import hits_on, worst_case
from pipeline.fidelity.crafting import ATTACKS, Images
from pipeline.fidelity.waterfall import Contestants, EarlierNetworks, mean_activity, right_on_all, waterfall_row
from pipeline.models.float_file import load_float
from pipeline.models.spiking import SpikingNetwork
from tests.pipeline.conftest import SmallRun

IMAGES = 60
ATTACK = ATTACKS[0]
RUNTIME = {"name": "emulator", "mismatched_spikes": 0, "mismatched_membranes": 0, "mismatched_readouts": 0}


@dataclass(frozen=True)
class Subject:
    """A float SNN whose answers are the labels, so that every loss is the integers'."""

    network: SpikingNetwork
    integers: IntegerNetwork
    images: Images
    crafted: dict[str, Crafted]

    def row(self, integers: IntegerNetwork, earlier: EarlierNetworks | None = None, **runtime: int) -> dict[str, Any]:
        targets = {"reference": FloatTarget(self.network), "deployed": IntegerTarget(integers)}
        hits = {name: hits_on(target, self.images, self.crafted) for name, target in targets.items()}
        means = mean_activity(self.network, integers, self.images.codes)
        return waterfall_row(
            self.network,
            integers,
            self.images,
            self.crafted,
            Contestants(hits["reference"], hits["deployed"], earlier),
            means,
            [RUNTIME | runtime],
            (ATTACK,),
        )


@pytest.fixture(scope="module")
def subject(small_run: SmallRun) -> Subject:
    bundle, network = open_bundle(small_run.bundle), load_float(small_run.bundle)
    with np.load(small_run.config.with_name("digits.npz")) as digits:
        codes = digits["images"][:IMAGES]
    noisy = random_noise(codes, np.arange(IMAGES), budget=12, seed=0)
    labels = FloatTarget(network).logits(noisy).argmax(1)
    assert len(np.unique(labels)) > 5
    crafted = Crafted(noisy, np.zeros(IMAGES, bool), np.zeros(IMAGES), None, 0)
    return Subject(network, bundle.network, Images(codes, labels, 0), {ATTACK.name: crafted})


def rounded_naively(synapse: Synapse) -> Synapse:
    """To 2 bits, each weight for itself, whatever it does to the sums."""
    step = 127 << synapse.exponent
    return replace(synapse, weight=(np.rint(synapse.weight / step) * step).astype(np.int32))


def naive(network: IntegerNetwork) -> IntegerNetwork:
    return replace(network, synapses=tuple(rounded_naively(synapse) for synapse in network.synapses))


def high_thresholds(network: IntegerNetwork) -> IntegerNetwork:
    populations = tuple(replace(one, threshold=3 * one.threshold) for one in network.populations)
    return replace(network, populations=populations)


def lost_bias(network: IntegerNetwork) -> IntegerNetwork:
    *before, readout = network.populations
    shifted = readout.bias + 100_000 * (np.arange(readout.size) == 1)
    return replace(network, populations=(*before, replace(readout, bias=shifted)))


@pytest.mark.parametrize(
    ("damage", "blamed"), [(naive, "weights"), (high_thresholds, "thresholds"), (lost_bias, "bias")]
)
def test_the_costliest_step_is_the_one_that_was_done_badly(
    subject: Subject, damage: Callable[[IntegerNetwork], IntegerNetwork], blamed: str
) -> None:
    row = subject.row(damage(subject.integers))
    assert row["costliest"] == blamed
    costs = {step["name"]: step["cost"] for step in row["steps"]}
    assert costs[blamed] > 0.1


def test_steps_add_up_from_the_float_network_to_the_deployed_one(subject: Subject) -> None:
    row = subject.row(subject.integers)
    steps = {step["name"]: step for step in row["steps"]}
    hits = hits_on(IntegerTarget(subject.integers), subject.images, subject.crafted)
    assert steps["everything"]["accuracy"] == worst_case(list(hits.values())).mean()
    assert steps["everything"]["cost"] == 0  # all its numbers were the integers' before
    assert sum(step["cost"] or 0 for step in row["steps"]) == pytest.approx(
        steps["float SNN"]["accuracy"] - steps["everything"]["accuracy"]
    )
    assert steps["runtimes"]["accuracy"] == steps["everything"]["accuracy"]
    assert "folder of the run" in row["unknown"]


def test_what_is_not_known_has_no_figure(subject: Subject) -> None:
    runtimes = subject.row(subject.integers, mismatched_spikes=1)["steps"][-1]
    assert runtimes["name"] == "runtimes"
    assert runtimes["accuracy"] is runtimes["cost"] is None
    assert "not certified" in runtimes["note"]


def test_a_run_knows_the_networks_before(subject: Subject) -> None:
    other = copy.deepcopy(subject.network)
    for _, neurons in other.neurons():
        neurons.threshold.data *= 3
    row = subject.row(subject.integers, EarlierNetworks(subject.network, other))
    trained, conversion, tuning, *_ = row["steps"]
    assert [trained["name"], conversion["name"], tuning["name"]] == ["trained", "conversion", "fine-tuning"]
    assert trained["accuracy"] == tuning["accuracy"] > conversion["accuracy"]
    assert conversion["cost"] == -tuning["cost"] > 0
    assert row["unknown"] is None


def test_of_a_large_network_the_first_images_are_looked_at(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waterfall, "WORK", 1)
    assert subject.row(subject.integers)["samples"] == waterfall.MIN_IMAGES


def test_an_image_that_is_wrong_once_is_not_looked_at_again() -> None:
    asked: list[int] = []

    def classify(codes: Codes) -> NDArray[np.intp]:
        asked.append(len(codes))
        return codes[:, 0].astype(np.intp)

    shown = [np.array([[1], [0], [1]], np.uint8), np.array([[1], [1], [0]], np.uint8)]
    assert right_on_all(classify, shown, np.array([1, 1, 1])).tolist() == [True, False, False]
    assert asked == [3, 2]


def test_mean_activity_has_the_shapes_of_the_populations(subject: Subject) -> None:
    codes = subject.images.codes[:3]
    means = mean_activity(subject.network, subject.integers, codes)
    _, layers = subject.network.record(subject.network.images(codes))
    for population in subject.integers.populations[:-1]:
        expected = layers[population.name].spikes.float().mean((0, 1))
        assert means[population.name].shape == population.shape
        assert means[population.name].ravel() == pytest.approx(expected.numpy())
