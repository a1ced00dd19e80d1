from __future__ import annotations

import math

import pytest
import torch

from hardware.surrogates import RULES, Surrogate

POINTS = [-3.0, -1.0, -0.6, -0.25, 0.0, 0.25, 0.6, 1.0, 3.0]


@pytest.mark.parametrize(
    ("rule", "width", "expected"),
    [
        ("triangle", 1.0, lambda z: max(0.0, 1 - abs(z))),
        ("triangle", 2.0, lambda z: max(0.0, 2 - abs(z)) / 4),
        ("triangle", 0.5, lambda z: max(0.0, 0.5 - abs(z)) / 0.25),
        ("rectangle", 1.0, lambda z: float(abs(z) < 0.5)),
        ("rectangle", 0.5, lambda z: 2.0 * (abs(z) < 0.25)),
        ("rectangle", 4.0, lambda z: 0.25 * (abs(z) < 2)),
        ("exponential", 2.0, lambda z: math.exp(-0.5 * abs(z))),
        ("exponential", 0.5, lambda z: math.exp(-2 * abs(z))),
        ("arctan", 2.0, lambda z: 1 / (1 + (math.pi * z) ** 2)),
        ("straight_through", 1.0, lambda _: 1.0),
    ],
)
def test_rules_are_their_formulas(rule: str, width: float, expected: object) -> None:
    z = torch.tensor(POINTS, dtype=torch.float64)
    before = z.clone()
    gradient = Surrogate(rule, width).gradient(z)
    assert gradient.tolist() == pytest.approx([expected(p) for p in POINTS])  # type: ignore[operator]
    assert torch.equal(z, before)
    scaled = Surrogate(rule, width, height=0.3).gradient(z)
    assert scaled.tolist() == pytest.approx((0.3 * gradient).tolist())


def test_unit_area_of_the_normalised_rules() -> None:
    z = torch.linspace(-400, 400, 1_600_001, dtype=torch.float64)
    for rule, width in [("triangle", 3.0), ("rectangle", 2.0), ("arctan", 5.0)]:
        area = torch.trapezoid(Surrogate(rule, width).gradient(z), z)
        assert float(area) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_keep_shape_and_type(rule: str, dtype: torch.dtype) -> None:
    z = torch.zeros((2, 3, 4), dtype=dtype)
    gradient = Surrogate(rule).gradient(z)
    assert gradient.shape == z.shape
    assert gradient.dtype == dtype
    assert bool((gradient > 0).all())
