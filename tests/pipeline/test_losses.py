from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hardware.errors import SpikeguardError
from pipeline.attacks.ensemble import LOSSES
from pipeline.attacks.losses import cross_entropy, difference_of_logits_ratio, targeted_difference_of_logits_ratio


def logits_of(seed: int, classes: int = 6) -> Tensor:
    return torch.randn((5, classes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([0, 1, 2, 3, 0])


@given(seed=st.integers(0, 1000))
def test_dlr_is_the_published_formula_image_by_image(seed: int) -> None:
    logits = logits_of(seed)
    for row, label, value in zip(
        logits.numpy(), LABELS.tolist(), difference_of_logits_ratio(logits, LABELS), strict=True
    ):
        first, _, third = np.sort(row)[::-1][:3]
        expected = -(row[label] - np.delete(row, label).max()) / (first - third)
        assert value.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(seed=st.integers(0, 1000), rank=st.integers(2, 6))
def test_targeted_dlr_is_the_published_formula_towards_the_nth_class(seed: int, rank: int) -> None:
    loss, first_logits, logits = targeted_difference_of_logits_ratio(rank), logits_of(seed), logits_of(seed + 5000)
    loss(first_logits, LABELS)
    for asked, row, label, value in zip(first_logits, logits.numpy(), LABELS, loss(logits, LABELS), strict=True):
        others = [c for c in asked.argsort(descending=True).tolist() if c != label]
        first, _, third, fourth = np.sort(row)[::-1][:4]
        expected = -(row[label] - row[others[rank - 2]]) / (first - (third + fourth) / 2)
        assert value.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-3, 1.0, 1e4]), shift=st.floats(-100, 100))
def test_the_ratios_are_blind_to_scale_and_shift(seed: int, scale: float, shift: float) -> None:
    logits = logits_of(seed)
    for loss in (difference_of_logits_ratio, targeted_difference_of_logits_ratio(2)):
        torch.testing.assert_close(loss(scale * logits + shift, LABELS), loss(logits, LABELS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_rises_as_the_image_gets_wrong(name: str) -> None:
    loss = LOSSES[name]()
    logits = torch.linspace(0, 1, 12).expand(2, 12).clone()
    labels = torch.tensor([11, 11])
    right = loss(logits, labels)
    logits[:, 11] = -1
    assert torch.all(loss(logits, labels) > right)


def test_no_gradient_is_lost_where_the_cross_entropy_is_saturated() -> None:
    """What sections on raw sums warn of, and the reason for the ratio."""
    logits = torch.tensor([[3e4, 1e4, 0.0]], requires_grad=True)
    assert not torch.autograd.grad(cross_entropy(logits, torch.tensor([0])).sum(), logits)[0].any()
    assert torch.autograd.grad(difference_of_logits_ratio(logits, torch.tensor([0])).sum(), logits)[0].any()


def test_ties_give_no_infinities() -> None:
    flat = torch.zeros(2, 5)
    for name in ("CE", "DLR", "DLR target 2"):
        assert torch.isfinite(LOSSES[name]()(flat, torch.tensor([0, 4]))).all()


@pytest.mark.parametrize(("name", "classes"), [("DLR", 2), ("DLR target 2", 3)])
def test_too_few_classes_are_refused_with_a_way_out(name: str, classes: int) -> None:
    with pytest.raises(SpikeguardError, match=f"{classes + 1} classes.*cross-entropy"):
        LOSSES[name]()(torch.zeros(1, classes), torch.tensor([0]))


@pytest.mark.parametrize("rank", [5, 9])
def test_a_rank_beyond_the_classes_is_refused_with_a_way_out(rank: int) -> None:
    loss = LOSSES[f"DLR target {rank}"]()
    with pytest.raises(SpikeguardError, match=f"class {rank} .* 4; choose"):
        loss(torch.zeros(1, 4), torch.tensor([0]))
