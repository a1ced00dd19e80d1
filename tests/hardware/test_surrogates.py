from __future__ import annotations

import math

import pytest
import torch

from hardware.errors import SpikeguardError
from hardware.surrogate_kernels import RULE_IDS, differentiate
from hardware.surrogates import ENSEMBLE, RULES, AdaptiveSurrogate, Surrogate, adapt_in_torch

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


@pytest.mark.parametrize("member", [*ENSEMBLE, Surrogate("arctan", 2.0, 0.3)], ids=lambda member: member.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_rules_are_the_rules(member: Surrogate, dtype: torch.dtype) -> None:
    z = torch.linspace(-6, 6, 5001, dtype=dtype)
    z = z[(z.abs() - member.width / 2).abs() > 1e-4]  # either side of a rectangle's edge is right
    slopes = torch.empty_like(z)
    real = z.numpy().dtype.type
    differentiate(z.numpy(), RULE_IDS[member.rule], real(member.width), real(member.height), slopes.numpy())
    torch.testing.assert_close(slopes, member.gradient(z), rtol=3e-6 if dtype == torch.float32 else 1e-13, atol=1e-7)


def test_every_rule_is_compiled() -> None:
    assert set(RULE_IDS) == set(RULES)


def test_the_ensemble_is_the_methods_table() -> None:
    """z = 0.2 of members 1 to 17, each by its formula."""
    z = torch.tensor([0.2], dtype=torch.float64)
    triangles = [(w - 0.2) / w**2 for w in (1, 2, 3, 0.5, 0.25)]
    exponentials = [a * math.exp(-b * 0.2) for a in (0.3, 1.0) for b in (0.5, 1, 2)]
    rectangles = [(w / 2 > 0.2) / w for w in (0.25, 0.5, 1, 2, 4)]
    expected = [*triangles, *exponentials, *rectangles, 1.0]
    assert [float(member.gradient(z)) for member in ENSEMBLE] == pytest.approx(expected)
    assert len(ENSEMBLE) == len({member.name for member in ENSEMBLE}) == 17


class TestAdaptiveSurrogate:
    def test_equals_its_plain_restatement_over_iterations(self) -> None:
        generator = torch.Generator().manual_seed(0)
        iterations = 2 * torch.randn(6, 2, 3, 4, generator=generator, dtype=torch.float64)
        rule = AdaptiveSurrogate(0.42)
        w = 2 / math.pi * math.tan(math.pi * 0.42)
        means, deviations = [1.0] * 24, [0.0] * 24
        for z in iterations:
            before, slopes = z.clone(), rule.gradient(z).flatten()
            for neuron, value in enumerate(z.flatten().tolist()):
                mean = 0.9 * means[neuron] + 0.1 * abs(value)
                deviation = 0.9 * deviations[neuron] + 0.1 * abs(abs(value) - mean)
                means[neuron], deviations[neuron] = mean, deviation
                alpha = w / (mean + 1.5 * deviation + 1e-4)
                expected = alpha / 2 / (1 + (math.pi * alpha * value / 2) ** 2)
                assert float(slopes[neuron]) == pytest.approx(expected, rel=1e-9)
            assert torch.equal(z, before)

    @pytest.mark.parametrize("warm_start", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_the_kernel_is_the_torch_form(self, warm_start: bool, dtype: torch.dtype, channels_last: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        iterations = 3 * torch.randn(8, 4, 5, 3, 6, 1, generator=generator, dtype=dtype)
        if channels_last:
            iterations = iterations.movedim(3, -1).contiguous().movedim(-1, 3)
        tolerance = 2e-6 if dtype == torch.float32 else 1e-14
        kernel, plain = AdaptiveSurrogate(0.42, warm_start), AdaptiveSurrogate(0.42, warm_start)
        for z in (*iterations, torch.zeros_like(iterations[0])):
            state = plain.running_means(z)
            expected = adapt_in_torch(z, plain.half_width, *state)
            torch.testing.assert_close(kernel.gradient(z), expected, rtol=tolerance, atol=0)
            for moved, kept in zip(kernel.running_means(z), state, strict=True):
                torch.testing.assert_close(moved, kept, rtol=tolerance, atol=tolerance)

    def test_the_order_in_memory_may_change_between_calls(self) -> None:
        z = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(2))
        other = z.movedim(2, -1).contiguous().movedim(-1, 2)
        assert other.stride() != z.stride()
        one, two = AdaptiveSurrogate(), AdaptiveSurrogate()
        for left, right in ((z, z), (z, other), (other, z)):
            assert torch.equal(one.gradient(left), two.gradient(right))

    def test_other_types_take_the_torch_form(self) -> None:
        z = torch.full((2, 3), 0.3, dtype=torch.bfloat16)
        assert AdaptiveSurrogate().gradient(z).dtype == torch.bfloat16

    def test_a_warm_start_knows_the_first_distance(self) -> None:
        z = torch.tensor([[-0.7, 0.0, 2.0]], dtype=torch.float64)
        rule = AdaptiveSurrogate(0.4, warm_start=True)
        rule.gradient(z)
        mean, deviation = rule.running_means(z)
        assert torch.equal(mean, z.abs())
        assert not deviation.any()

    @pytest.mark.parametrize("share", [0.25, 0.4, 0.45])
    def test_the_share_of_its_area_lies_within_the_typical_distance(self, share: float) -> None:
        """All neurons at one distance: M = |z| and D = 0, so that the distance itself bounds the share."""
        z = torch.full((1, 1), 0.7, dtype=torch.float64)
        rule = AdaptiveSurrogate(share)
        for _ in range(400):
            height = float(rule.gradient(z))
        alpha = 2 / math.pi * math.tan(math.pi * share) / 0.7001
        assert height == pytest.approx(Surrogate("arctan", alpha).gradient(z).item(), rel=1e-4)
        within = torch.linspace(0, 0.7, 100_001, dtype=torch.float64)
        area = torch.trapezoid(Surrogate("arctan", alpha).gradient(within), within)
        assert float(area) == pytest.approx(share, abs=1e-3)

    def test_another_shape_is_refused(self) -> None:
        rule = AdaptiveSurrogate()
        rule.gradient(torch.zeros(8, 5, 3))
        with pytest.raises(SpikeguardError, match=r"\(8, 5, 3\).*\(8, 4, 3\).*new one"):
            rule.gradient(torch.zeros(8, 4, 3))

    @pytest.mark.parametrize("share", [0.0, 0.5, -1.0, math.nan])
    def test_a_share_out_of_range_is_refused(self, share: float) -> None:
        with pytest.raises(SpikeguardError, match=r"between 0 and 0\.5"):
            AdaptiveSurrogate(share)

    def test_keeps_type_and_works_on_its_own_state_only(self) -> None:
        first, second = AdaptiveSurrogate(), AdaptiveSurrogate()
        z = torch.full((2, 3), 0.3)
        one = first.gradient(z)
        assert one.dtype == torch.float32
        assert not torch.equal(first.gradient(z), one)
        assert torch.equal(second.gradient(z), one)
