"""Looks at accumulating images: critical values, what they let pass, and a check that stops early."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from hardware.formats.bundle import Bundle
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import FloatTarget, GradientTarget, IntegerTarget, Target, correct
from pipeline.fidelity.check import Circumstances, run_check
from pipeline.fidelity.crafting import ATTACKS, Images
from pipeline.fidelity.looks import look_until_decided
from pipeline.fidelity.page import render_report
from pipeline.fidelity.shards import craft_all
from pipeline.sequential import confidences, critical_values, look_sizes, spent
from pipeline.statistics import PairedOutcome, tango_score
from tests.pipeline.builds import QUICK, own_images, untrained, write_build


def test_critical_values_are_the_published_ones() -> None:
    """Five equal looks, 2.5 % one-sided: Reboussin, DeMets, Kim & Lan, Controlled Clinical Trials 21 (2000) 190-207."""
    published = [4.8769, 3.3569, 2.6803, 2.2898, 2.0310]
    assert critical_values([0.2, 0.4, 0.6, 0.8, 1.0], 0.025) == pytest.approx(published, abs=2e-4)


def test_one_look_is_the_ordinary_test() -> None:
    assert critical_values([1.0], 0.05) == pytest.approx([norm.ppf(0.95)], abs=1e-8)
    assert confidences([540], 0.95) == [0.95]


def test_all_looks_together_spend_what_was_allowed() -> None:
    """Brownian motion seen at the shares crosses with the probability that the spending function says."""
    shares, alpha, draws = np.array([0.1, 0.35, 0.7, 1.0]), 0.05, 200_000
    steps = np.random.default_rng(0).standard_normal((draws, 4)) * np.sqrt(np.diff(shares, prepend=0))
    statistics = steps.cumsum(1) / np.sqrt(shares)
    crossed = np.logical_or.accumulate(statistics > critical_values(shares.tolist(), alpha), axis=1)
    for share, rate in zip(shares, crossed.mean(0), strict=True):
        assert rate == pytest.approx(spent(share, alpha), abs=4 * np.sqrt(alpha / draws))
    assert spent(1.0, alpha) == pytest.approx(alpha)


@pytest.mark.parametrize(("samples", "discordant", "looks"), [(540, 0.06, 4), (240, 0.10, 3)])
def test_an_inferior_model_passes_no_oftener_than_with_one_look(samples: int, discordant: float, looks: int) -> None:
    """Difference exactly at the margin; simulation error 0.35 %, and Tango's bound itself is approximate."""
    margin, draws = 0.02, 4000
    sizes = look_sizes(samples, looks)
    critical = [float(norm.ppf(level)) for level in confidences(sizes, 0.95)]
    shares = [(discordant + margin) / 2, (discordant - margin) / 2, 1 - discordant]
    rng = np.random.default_rng(2)
    blocks = [rng.multinomial(size, shares, draws) for size in np.diff(sizes, prepend=0)]
    seen = np.cumsum(blocks, axis=0)
    passes = once = 0
    for draw in range(draws):
        scores = [
            tango_score(PairedOutcome(size, 0, 0, int(table[draw, 0]), int(table[draw, 1])), -margin)
            for size, table in zip(sizes, seen, strict=True)
        ]
        passes += any(score > value for score, value in zip(scores, critical, strict=True))
        once += any(score > norm.ppf(0.95) for score in scores)
    assert passes / draws <= 0.05 + 3 * 0.0035
    assert once / draws > 0.08, "looking as often without paying for it would pass far too many"


def test_looks_are_equally_far_apart_and_never_more_than_images() -> None:
    assert look_sizes(540, 4) == [135, 270, 405, 540]
    assert look_sizes(10, 1) == [10]
    assert look_sizes(3, 10) == [1, 2, 3]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_build(tmp_path_factory.mktemp("looks") / "bundle")


def noise(images: Images) -> dict[str, Crafted]:
    """Every arm the image itself, lighter by its position."""
    count = len(images.labels)
    codes = np.minimum(images.codes, 254) + 1
    made = Crafted(codes.astype(np.uint8), np.zeros(count, np.bool_), images.indices.astype(np.float64), None, 0)
    return {attack.name: made for attack in ATTACKS}


@pytest.mark.parametrize("margin", [0.5, 0.001])
def test_it_stops_when_the_deciding_arms_are_decided_and_not_before(margin: float) -> None:
    same = FloatTarget(untrained())
    targets: dict[str, Target] = {"float": same, "integer": same}
    images = own_images(60)
    settings = QUICK.model_copy(update={"looks": 6, "margin": margin})
    shown: list[int] = []

    def craft(part: Images) -> dict[str, Crafted]:
        shown.extend(part.indices.tolist())
        return noise(part)

    look = look_until_decided(targets, images, settings, craft, "the float SNN")
    assert look.row is not None
    stopped = look.row["planned"][look.row["looks"] - 1]
    assert shown == list(range(stopped)), "every image once, under its own number"
    assert (stopped < 60) == (margin == 0.5)
    assert len(look.images.labels) == stopped
    for made in look.crafted.values():
        assert made.strength.tolist() == list(range(stopped))
    verdicts = {arm["verdict"] for arm in look.arms if arm["deciding"]}
    assert verdicts == ({"pass"} if margin == 0.5 else {"inconclusive"})
    assert all(arm["samples"] == stopped for arm in look.arms)
    assert look.row["confidence"] == confidences(look.row["planned"], settings.confidence)[look.row["looks"] - 1]


def test_a_check_that_looks_twice_attacks_every_image_as_one_that_looks_once(bundle: Bundle, tmp_path: Path) -> None:
    """With a margin that nothing proves; only the confidence of the bounds is another."""
    images = own_images(6)
    settings = QUICK.model_copy(update={"looks": 2, "margin": 0.0001})
    report = run_check(bundle, images, settings, tmp_path / "twice", Circumstances(data="random")).report
    assert report["sequential"]["planned"] == [3, 6]
    assert report["samples"] == 6
    assert "Looked 2 of 2 planned times" in render_report(report, [])
    targets: dict[str, GradientTarget] = {
        "float": FloatTarget(untrained()),
        "integer": IntegerTarget(bundle.network),
    }
    whole = craft_all(targets, images, QUICK, tmp_path / "once", "")
    arms = {arm["name"]: arm for arm in report["arms"]}
    for name, made in whole.items():
        for model, target in (("reference", targets["float"]), ("deployed", targets["integer"])):
            assert arms[name][f"{model}_accuracy"] == correct(target, made.codes, images.labels).mean()
