"""The report page: complete, escaped, self-contained, and loud about what is missing."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from hardware.errors import RuleViolations
from pipeline.fidelity import wording
from pipeline.fidelity.gallery import GalleryItem, LayerSpikes
from pipeline.fidelity.page import render_report
from pipeline.fidelity.plots import perturbation, picture, png_uri

VOID = {"meta", "link", "br", "img", "hr", "input"}
NASTY = '<script>alert("x")</script> & $x_1$ \' " {{ 7 * 7 }}'


def arm(name: str, reference: float, deployed: float, lower: float, **more: Any) -> dict[str, Any]:
    difference = deployed - reference
    return {
        "name": name,
        "attack": "PGD ensemble of 3 on the float SNN",
        "description": "crafted on the reference, replayed on the deployed model",
        "epsilon": 0.1,
        "deciding": False,
        "samples": 540,
        "reference_accuracy": reference,
        "reference_interval": [reference - 0.02, min(1, reference + 0.015)],
        "deployed_accuracy": deployed,
        "deployed_interval": [deployed - 0.02, min(1, deployed + 0.015)],
        "difference": difference,
        "lower_bound": lower,
        "interval": [lower - 0.002, difference + 0.009],
        "discordant": [5, 3],
        "verdict": None,
        "samples_to_decide": None,
        **more,
    }


def runtime(name: str, version: str, samples: int, speed: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "version": version,
        "samples": samples,
        "adversarial_samples": samples,
        "mismatched_spikes": 0,
        "mismatched_membranes": 0,
        "mismatched_readouts": 0,
        "samples_per_second": speed,
        **more,
    }


def point(
    epsilon: float, reference: float, deployed: float, attack: str = "a light attack", deciding: bool = False
) -> dict[str, Any]:
    names = ("reference_accuracy", "reference_interval", "deployed_accuracy", "deployed_interval", "difference")
    made = arm("curve", reference, deployed, -0.01)
    return {"epsilon": epsilon, "attack": attack, "deciding": deciding, **{name: made[name] for name in names}}


def step(name: str, accuracy: float | None, cost: float | None) -> dict[str, Any]:
    interval = None if accuracy is None else [accuracy - 0.02, accuracy + 0.02]
    return {"name": name, "accuracy": accuracy, "interval": interval, "cost": cost, "note": f"about {name}"}


def full_report() -> dict[str, Any]:
    """A pass with every section."""
    layers = ("conv1", "conv2", "hidden", "readout")
    return {
        "schema": "spikeguard.fidelity/1",
        "created": "2026-03-14T15:09:26+00:00",
        "verdict": "pass",
        "outcome": "OK",
        "summary": "The deployed model is as robust as the trained one on emulator, lava, netx, onnxruntime: "
        "worst-case accuracy 83.1% deployed against 83.5% trained on 540 images at epsilon 0.1.",
        "margin": 0.02,
        "confidence": 0.95,
        "samples": 540,
        "seed": 0,
        "steps": 8,
        "bits": 8,
        "epsilon": [0.1],
        "data": {"name": "digits", "test_samples": 540},
        "certified_runtimes": ["reference", "emulator", "lava", "netx", "onnxruntime"],
        "missing_runtimes": [],
        "arms": [
            arm("clean", 0.981, 0.9796, -0.0093, attack="none", description="images as they are", epsilon=0.0,
                deciding=True, verdict="pass"),
            arm("worst case", 0.8352, 0.8315, -0.0137, attack="union of all arms", deciding=True, verdict="pass",
                description="right on the clean image and on every image crafted on either model"),
            arm("noise", 0.975, 0.975, -0.006),
            arm("transfer", 0.842, 0.85, -0.003),
            arm("adaptive", 0.852, 0.84, -0.0225),
            arm("black box, float", 0.87, 0.872, -0.01),
            arm("black box", 0.874, 0.868, -0.0165),
        ],
        "runtimes": [
            runtime("reference", "0.1.0", 32, 210.0),
            runtime("emulator", "0.1.0", 32, 6123.4),
            runtime("lava", "0.10.0", 32, 19.47),
            runtime("netx", "0.6.0", 32, 17.1),
            runtime("onnxruntime", "1.32.0", 540, 2381.0, mismatched_spikes=None, mismatched_membranes=None),
        ],
        "layers": [
            {
                "name": name,
                "spike_agreement": 1 - share,
                "rate_error": share * 0.7,
                "step_agreement": [1 - share * step / 4 for step in range(8)],
                "first_divergence": {"sample": 12, "step": 3, "neuron": 45, "margin": -0.00213} if share else None,
                "teacher_forced": {
                    "spike_agreement": 1 - share / 2,
                    "step_agreement": [1 - share / 2] * 8,
                    "rate_error": share / 3,
                    "first_divergence": None,
                },
            }
            for name, share in zip(layers, (0.0, 0.0021, 0.0057, 0.004), strict=True)
        ],
        "curve": [
            point(0.0, 0.981, 0.9796, "none"), point(0.02, 0.951, 0.948), point(0.05, 0.91, 0.905),
            point(0.1, 0.8352, 0.8315, "the deciding attacks", deciding=True), point(0.2, 0.312, 0.29),
        ],
        "waterfall": {
            "samples": 540,
            "description": "accuracy on the clean image and every image of the worst case",
            "unknown": "The network before its conversion is not in a bundle.",
            "costliest": "weights",
            "steps": [
                step("float SNN", 0.8352, None), step("float64", 0.8352, 0.0), step("thresholds", 0.8371, -0.0019),
                step("weights", 0.8297, 0.0074), step("bias", 0.8315, -0.0018), step("everything", 0.8315, 0.0),
                step("runtimes", None, None),
            ],
        },
        "transfer_matrix": {
            "attack": "quick ensemble", "epsilon": 0.1, "samples": 540, "models": ["float", "integer", "4 bits"],
            "rows": [
                {"crafted_on": "clean images", "accuracies": {"float": 0.98, "integer": 0.979, "4 bits": 0.95}},
                {"crafted_on": "4 bits", "accuracies": {"float": 0.91, "integer": 0.913, "4 bits": 0.712}},
            ],
        },
        "attribution": [
            {"rounded": name, "disagreement": {"conv1": share / 2, "conv2": share}, "logit_error": 3 * share,
             "argmax_flips": flips, "samples": 1256}
            for name, share, flips in (("nothing", 0.0, 0), ("weights", 0.0123, 7), ("everything", 0.0145, 9))
        ],
        "gradient_health": {
            "alarms": [],
            "checks": [
                {"name": "zero gradients, float", "value": 0.0, "limit": "at most 5%", "passed": True,
                 "explanation": "share of attack steps whose whole input gradient was zero"},
                {"name": "accuracy at epsilon 0.5, integer", "value": 0.005, "limit": "at most 1%", "passed": True,
                 "explanation": "PGD of 20 steps on 200 images"},
            ],
        },
        "baseline": {
            "description": "Same network, 40 epochs of plain cross-entropy, converted likewise.",
            "samples": 540,
            "clean_accuracy": 0.985,
            "clean_interval": [0.97, 0.992],
            "attacked_accuracy": 0.061,
            "attacked_interval": [0.044, 0.084],
            "robust_clean_accuracy": 0.981,
            "robust_clean_interval": [0.966, 0.99],
            "robust_attacked_accuracy": 0.842,
            "robust_attacked_interval": [0.81, 0.87],
        },
        "quantization": [{"population": name, "scale": 812.25, "disagreement": 0.0021} for name in layers],
        "proofs": [
            {"population": name, "sum_range": [-61234, 59321], "sum_limit": 131072, "can_wrap": False,
             "membrane_range": [-8388607, 802816], "can_saturate": name == "hidden", "saturation_is_harmless": True,
             "exact_in_float32": True}
            for name in layers
        ],
        "placement": {
            "target": "loihi2", "minimum_cores": 2, "neurons": 778, "synapses": 31234, "weight_bytes": 31234,
            "populations": [{"name": n, "neurons": 256, "synapses": 9216, "weight_bytes": 9216} for n in layers],
        },
        "energy": {"spikes_per_image": 1234.5, "synaptic_operations_per_image": 45678.9,
                   "input_operations_per_image": 6789.0,
                   "estimates": [
                       {"name": "a chip", "least_nj": 1234.56, "most_nj": 2345678.9, "source": "a paper & table 2"},
                       {"name": "another", "least_nj": 0.98765, "most_nj": 0.98765, "source": "another paper"},
                   ],
                   "note": "counted on 100 clean images; energies are estimates"},
        "timings": {"train": 83.2, "finetune": 41.0, "attacks": 62.5, "certification": 9.1, "judgement": 0.42},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "numpy": "2.4.6", "onnxruntime": "1.32.0"},
        "reproduce": "spikeguard fidelity runs/demo/bundle --runtime reference,emulator,lava,netx,onnxruntime --seed 0",
    }  # fmt: skip


def failing_report() -> dict[str, Any]:
    report = full_report() | {
        "verdict": "fail",
        "outcome": "ROBUSTNESS_INFERIOR",
        "summary": "The deployed model is less robust than the trained one: worst-case accuracy 61.0% deployed "
        "against 83.5% trained on 540 images at epsilon 0.1.",
    }
    report["arms"][1] = arm("worst case", 0.8352, 0.61, -0.257, deciding=True, verdict="fail")
    return report


def inconclusive_report() -> dict[str, Any]:
    report = full_report() | {"verdict": "inconclusive", "outcome": "INCONCLUSIVE", "summary": None}
    report["arms"][1] |= {"lower_bound": -0.0241, "verdict": "inconclusive", "samples_to_decide": 2431}
    return report


def report_without_lava() -> dict[str, Any]:
    report = full_report() | {"curve": None, "waterfall": None, "transfer_matrix": None}
    report["certified_runtimes"] = ["reference", "emulator", "onnxruntime"]
    report["runtimes"] = [row for row in report["runtimes"] if row["name"] not in ("lava", "netx")]
    report["missing_runtimes"] = [
        {"name": "lava", "reason": "no Python 3.10 was found"},
        {"name": "netx", "reason": "no Python 3.10 was found"},
    ]
    return report


def minimal_report() -> dict[str, Any]:
    """Only what DESIGN demands, everything else absent."""
    report = full_report()
    optional = (
        "created", "summary", "data", "missing_runtimes", "attribution", "baseline", "quantization", "proofs",
        "gradient_health", "placement", "energy", "timings", "versions", "reproduce",
        "curve", "waterfall", "transfer_matrix",
    )  # fmt: skip
    for name in optional:
        del report[name]
    for row in report["layers"]:
        for name in ("step_agreement", "teacher_forced"):
            del row[name]
    for row in report["arms"]:
        for name in ("description", "reference_interval", "deployed_interval", "samples_to_decide"):
            del row[name]
    return report


def gallery(channels: int = 1) -> list[GalleryItem]:
    rng = np.random.default_rng(3)
    items = []
    for sample in range(4):
        clean = rng.integers(0, 256, (channels, 8, 8), dtype=np.uint8)
        moved = np.clip(clean.astype(np.int64) + rng.choice([-25, 0, 25], clean.shape), 0, 255).astype(np.uint8)
        spikes = rng.random((2, 2, 8, 60)) < 0.3
        spikes[1, :, :, 5:] = spikes[0, :, :, 5:]
        layers = tuple(LayerSpikes(f"conv{n + 1}", spikes[0, n], spikes[1, n]) for n in range(2))
        items.append(GalleryItem(sample, 3, "adaptive", clean, moved, (3, 8), (3, 3), layers))
    return items


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order, attributes and text collected."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text = " ".join([*self.text.split(), *data.split()])

    def attributes(self, name: str) -> Iterator[str]:
        return (str(attributes[name]) for _, attributes in self.elements if name in attributes)


REPORTS = {
    "pass": full_report,
    "fail": failing_report,
    "inconclusive": inconclusive_report,
    "without lava": report_without_lava,
    "minimal": minimal_report,
}


@pytest.mark.parametrize("make", REPORTS.values(), ids=REPORTS.keys())
def test_page_is_well_formed_self_contained_and_says_its_verdict(make: Any) -> None:
    report = make()
    html = render_report(report, gallery())
    page = Page(html)
    assert html.startswith("<!doctype html>")
    headings = html.split("<h1>")[1].split("</h1>")[0]
    assert headings == report["verdict"]
    assert all(link.startswith(("#", "data:")) for name in ("src", "href") for link in page.attributes(name))
    assert "script" not in {tag for tag, _ in page.elements}
    assert "url(http" not in html
    assert "@import" not in html
    ids = list(page.attributes("id"))
    assert len(ids) == len(set(ids))
    anchors = {link[1:] for link in page.attributes("href") if link.startswith("#")}
    assert anchors <= set(ids)


def test_facts_of_the_verdict_stand_before_everything_else() -> None:
    hero = render_report(report_without_lava(), []).split("</header>")[0]
    text = Page(hero.split("<main>")[1] + "</header>").text
    assert "2.0 points" in text
    assert "0.1 = 25 codes" in text
    assert "NOT certified on lava: no Python 3.10 was found" in text.replace("✗ ", "")
    assert "onnxruntime" in text


def test_numbers_appear_with_intervals_and_counts() -> None:
    text = Page(render_report(full_report(), [])).text
    for expected in ("83.5 %", "81.5 to 85.0 %", "540", "−1.37", "5 / 3", "not exposed", "image 12, step 3, neuron 45"):
        assert expected in text


def test_curve_waterfall_and_transfer_are_told_in_numbers_and_in_the_words_of_their_plots() -> None:
    html = render_report(full_report(), gallery())
    page = Page(html)
    for expected in ("the weights change the logits of clean images most", "weights about weights 83.0 %", "−0.74",
                     "0.2 (51 codes) a light attack 31.2 %", "4 bits 91.0 % 91.3 % 71.2 %",
                     "not in a bundle"):  # fmt: skip
        assert expected in page.text, expected
    spoken = " ".join(page.attributes("aria-label")).replace("\u00a0", " ")
    for expected in ("at 0.2 reference 31.2 %, deployed 29.0 %", "weights: 83.0 %, change −0.74 points",
                     "each layer reading the reference's spikes. conv1: 0.0 %"):  # fmt: skip
        assert expected in spoken, expected
    assert "Differing spikes by layer: conv1 " in " ".join(page.attributes("alt"))


def test_a_layer_table_without_steps_is_shown_with_its_bars() -> None:
    assert "Share of spikes that differ, by layer. conv1" in render_report(minimal_report(), [])
    assert "by layer and step" not in render_report(minimal_report(), [])


def test_each_kind_of_rounding_is_a_row_under_a_sentence_that_tells_how_to_read_it() -> None:
    html = render_report(full_report(), [])
    section = html.split('<section id="rounding"')[1].split("</section>")[0]
    text = Page(f"<section{section}</section>").text
    assert wording.ATTRIBUTION_NOTE in text
    assert "nothing 0.00 % 0 0 of 1,256" in text
    assert "weights 1.23 % (conv2) 0.0369 7 of 1,256" in text
    assert "everything 1.45 % (conv2) 0.0435 9 of 1,256" in text
    assert text.index("nothing 0.00") < text.index("weights 1.23") < text.index("everything 1.45")
    assert '<a href="#rounding">' in html


def test_energies_are_shown_to_three_digits_with_their_sources_as_estimates() -> None:
    text = Page(render_report(full_report(), [])).text
    assert "a chip 1,230 to 2,350,000 a paper & table 2 another 0.988 another paper" in text
    assert "estimated and not measured" in text
    assert "Input operations per image 6,789" in text
    older = full_report()
    older["energy"] = {name: older["energy"][name] for name in ("spikes_per_image", "synaptic_operations_per_image")}
    assert "estimated and not measured" not in Page(render_report(older, [])).text


def test_samples_to_decide_and_the_meaning_of_the_outcome_are_said() -> None:
    text = Page(render_report(inconclusive_report(), [])).text
    assert "2,431 images would decide" in text
    assert "Too few images" in text
    assert "Same robustness" not in text


def test_a_fail_claims_no_equal_robustness() -> None:
    text = Page(render_report(failing_report(), [])).text
    assert "Robustness was lost" in text
    assert "Same robustness" not in text


def test_absent_sections_are_left_out() -> None:
    page = Page(render_report(minimal_report(), []))
    ids = set(page.attributes("id"))
    assert {"arms", "certification", "layers", "meaning"} <= ids
    assert not {
        "baseline", "curve", "gallery", "health", "integers", "placement", "rounding", "transfer", "waterfall",
    } & ids  # fmt: skip
    nothing = full_report() | {"baseline": None, "placement": None, "energy": None, "gradient_health": None}
    nothing["attribution"] = []
    assert not {"baseline", "health", "placement", "rounding"} & set(Page(render_report(nothing, [])).attributes("id"))


def strings_replaced(value: Any, keep: frozenset[str]) -> Any:
    """The same report, every free word in it hostile."""
    if isinstance(value, dict):
        return {key: item if key in keep else strings_replaced(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [strings_replaced(item, keep) for item in value]
    return NASTY if isinstance(value, str) else value


def test_every_word_of_a_report_is_escaped() -> None:
    hostile = strings_replaced(report_without_lava(), frozenset({"schema", "verdict"}))
    hostile["timings"] = {NASTY: 1.0}
    hostile["attribution"][0]["disagreement"] = {NASTY: 0.5}
    hostile |= {name: full_report()[name] for name in ("curve", "waterfall", "transfer_matrix")}
    hostile["curve"][1]["attack"] = hostile["waterfall"]["costliest"] = hostile["waterfall"]["unknown"] = NASTY
    hostile["waterfall"]["steps"][1] |= {"name": NASTY, "note": NASTY}
    hostile["transfer_matrix"]["rows"][0]["crafted_on"] = hostile["transfer_matrix"]["attack"] = NASTY
    first = replace(gallery()[0].spikes[0], name=NASTY)
    item = replace(gallery()[0], attack=NASTY, spikes=(first,))
    html = render_report(hostile, [item])
    page = Page(html)
    assert "<script" not in html
    assert " ".join(NASTY.split()) in page.text


def test_every_plot_and_picture_has_words() -> None:
    page = Page(render_report(full_report(), gallery()))
    plots = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(plots) == 7
    assert all(plot["role"] == "img" and len(str(plot["aria-label"])) > 30 for plot in plots)
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 20
    assert all(image["alt"] for image in images)


def test_headings_of_tables_have_a_scope() -> None:
    page = Page(render_report(full_report(), gallery()))
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.elements if tag == "th")


def test_answers_are_marked_against_the_label() -> None:
    text = Page(render_report(full_report(), gallery()[:1])).text
    assert "reference 3 ✓ right 8 ✗ wrong deployed 3 ✓ right 3 ✓ right" in text


def test_mismatches_are_shown_as_differing() -> None:
    report = full_report()
    first = {"layer": "hidden", "sample": 4, "step": 2, "neuron": 31}
    report["runtimes"][2] |= {"mismatched_spikes": 1234, "first_mismatch": first}
    text = Page(render_report(report, [])).text
    assert "1,234" in text
    assert "differs" in text
    assert "layer hidden, image 4, step 2, neuron 31" in text


def test_the_corpus_and_the_looks_are_told_if_there_are_any() -> None:
    without = Page(render_report(full_report(), [])).text
    assert "Counterexamples" not in without
    assert "planned times" not in without
    counts = {"replayed": 64, "reference_wrong": 20, "deployed_wrong": 31, "newly_deployed_wrong": 3, "added": 1}
    looks = {"planned": [180, 360, 540], "looks": 2, "confidence": 0.98}
    text = Page(render_report(full_report() | {"corpus": counts, "sequential": looks}, [])).text
    assert (
        "64 replayed first, of which the reference gets 20 wrong and the deployed model 31 (3 that were right" in text
    )
    assert "1 new one kept" in text
    assert "Looked 2 of 3 planned times, after 360 of 540 images" in text


def test_equal_reports_give_equal_pages() -> None:
    assert render_report(full_report(), gallery()) == render_report(full_report(), gallery())


def test_broken_reports_are_refused_with_all_problems() -> None:
    report = full_report() | {"schema": "other/9", "verdict": "perhaps"}
    del report["margin"], report["layers"]
    with pytest.raises(RuleViolations) as caught:
        render_report(report, [])
    assert {v.object for v in caught.value.violations} == {
        "field margin", "field layers", "field schema", "field verdict",
    }  # fmt: skip


def decoded(uri: str) -> Any:
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return np.rint(matplotlib.image.imread(io.BytesIO(content), format="png")[..., :3] * 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pictures_hold_every_pixel_as_a_sharp_square(channels: int) -> None:
    codes = gallery(channels)[0].clean
    shown = decoded(png_uri(picture(codes)))
    assert shown.shape == (160, 160, 3)
    assert np.array_equal(shown[::20, ::20], picture(codes))
    assert np.array_equal(shown, np.repeat(np.repeat(shown[::20, ::20], 20, 0), 20, 1))
    if channels == 3:
        assert np.array_equal(picture(codes)[..., 1], codes[1])
    if channels == 1:
        assert all(np.array_equal(picture(codes)[..., c], codes[0]) for c in range(3))


def test_perturbation_shows_sign_and_size() -> None:
    clean = np.full((1, 1, 4), 100, np.uint8)
    moved = np.array([[[100, 125, 75, 112]]], np.uint8)
    still, brighter, darker, half = perturbation(clean, moved, 25)[0].astype(int)
    assert still.min() > 240
    assert brighter[0] > brighter[2] + 50
    assert darker[2] > darker[0] + 20
    assert still.sum() > half.sum() > brighter.sum()
    colour = perturbation(np.repeat(clean, 3, 0), np.repeat(moved, 3, 0), 25)
    assert colour[0].tolist() == [[128] * 3, [255] * 3, [0] * 3, [189] * 3]


@pytest.mark.parametrize(("epsilon", "expected"), [(0.1, 25), (8 / 255, 8), (0.031, 7), (1.0, 255), (0.0, 0)])
def test_budgets_are_rounded_down_to_codes(epsilon: float, expected: int) -> None:
    assert wording.codes(epsilon) == expected


def test_nearly_all_is_not_all() -> None:
    assert wording.percent(0.99996) == "99.9\u00a0%"
    assert wording.percent(1.0) == "100.0\u00a0%"
    assert wording.percent(0.00001, 2) == "0.01\u00a0%"
    assert wording.points(-0.0037) == "−0.37"
    assert wording.points(-0.000001) == "0.00"
