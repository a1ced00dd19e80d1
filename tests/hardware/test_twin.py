from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from numpy.typing import NDArray
from torch import Tensor

from hardware import twin as twin_module
from hardware import twin_neurons
from hardware.bounds import exact_in_float32
from hardware.errors import RuleViolations, SpikeguardError
from hardware.network import (
    DECAY_UNITY,
    INPUT,
    STATE_LIMIT,
    InputSpec,
    IntegerNetwork,
    Population,
    Synapse,
)
from hardware.reference import run_reference
from hardware.surrogates import RATE, AdaptiveSurrogate, Rate, Surrogate
from hardware.twin import Rules, Twin
from hardware.twin_convolutions import exact_convolution, phase_weights, unfolded_convolution
from tests.hardware.strategies import build_network, cases
from tests.hardware.test_emulator import assert_same, conv_network

Case = tuple[IntegerNetwork, NDArray[np.uint8]]
WIDE = Surrogate("exponential", 2.0)


COMPILED = pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "torch"])


@COMPILED
@pytest.mark.parametrize("rule", [WIDE, Surrogate("arctan", 0.7, 0.3), RATE], ids=lambda rule: rule.name)
@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_gradients_equal_plain_autograd(compiled: bool, rule: Surrogate | Rate, case: Case) -> None:
    """The fused backward against one operation after the other, every step in float64."""
    network, codes = case
    weights = torch.randn(len(codes), network.classes, dtype=torch.float64)
    images = images_of(network, codes).double()
    left, right = images.clone().requires_grad_(), images.clone().requires_grad_()
    plain = plain_logits(network, right, rule)
    with computed(compiled, group=2 * network.steps):
        fused = Twin(network).double()(left, rule)
        assert torch.equal(fused, plain.float())
        (fused.double() * weights).sum().backward()
    (plain * weights).sum().backward()
    assert left.grad is not None
    assert right.grad is not None
    # Logits are float32, so the gradient enters the fused backward rounded to 24 bits.
    assert relative_error(left.grad, right.grad) < 1e-5


@pytest.mark.parametrize("rule", [WIDE, RATE], ids=lambda rule: rule.name)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_gradients_do_not_need_the_type_of_the_states(rule: Surrogate | Rate, case: Case) -> None:
    """Narrow sums and gradients beside wide states, against float64 throughout."""
    network, codes = case
    narrow, wide = image_gradient(Twin(network), codes, rule), image_gradient(Twin(network).double(), codes, rule)
    assume(float(wide.abs().max()) > 1e-12)  # what cancels leaves rounding only
    assert relative_error(narrow, wide) < 1e-3


@pytest.mark.parametrize("warm_start", [False, True])
@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_the_fused_adaptive_rule_is_the_rule_itself(warm_start: bool, case: Case) -> None:
    """Group by group in the kernel, against ``gradient`` called with z of all samples, over three iterations."""
    network, codes = case

    class Unfused:
        def __init__(self) -> None:
            self.rule = AdaptiveSurrogate(0.35, warm_start)

        def gradient(self, z: Tensor) -> Tensor:
            assert z.shape[:2] == (network.steps, len(codes))
            return self.rule.gradient(z)

    names = [p.name for p in network.populations if p.spiking]
    fused = {name: AdaptiveSurrogate(0.35, warm_start) for name in names}
    unfused = {name: Unfused() for name in names}
    twin = Twin(network).double()
    for iteration in range(3):
        moved = np.roll(codes, iteration, axis=-1)
        with computed(compiled=True, group=2 * network.steps):
            actual = image_gradient(twin, moved, fused)
        expected = image_gradient(twin, moved, unfused)
        assume(bool(expected.isfinite().all()))  # through many steps, float32 does not hold every gradient
        assert relative_error(actual, expected) < 1e-9


def test_kernels_do_not_mind_a_gradient_that_only_some_steps_have() -> None:
    """A readout that reads two populations: the gradient at the first one's spikes is no average over time."""
    network = conv_network()
    first, readout = network.populations[0], network.readout
    rng = np.random.default_rng(4)
    second = replace(first, name="second", shape=(3,), bias=np.array([9, -4, 0]))
    synapses = (
        network.synapses[0],
        Synapse(first.name, "second", "dense", rng.integers(-9, 10, (3, first.size)).astype(np.int32), 8),
        Synapse(first.name, "out", "dense", rng.integers(-9, 10, (3, first.size)).astype(np.int32), 8),
        Synapse("second", "out", "dense", rng.integers(-9, 10, (3, 3)).astype(np.int32), 8),
    )
    network = IntegerNetwork(network.input, (first, second, replace(readout, name="out")), synapses, 5)
    codes = rng.integers(0, 16, (7, 1, 6, 6)).astype(np.uint8)
    twin = Twin(network).double()
    with computed(compiled=True, group=3 * network.steps):
        fused = image_gradient(twin, codes, WIDE)
    with computed(compiled=False, group=7 * network.steps):
        assert relative_error(fused, image_gradient(twin, codes, WIDE)) < 1e-9


@pytest.mark.parametrize("clipped", [False, True])
@settings(max_examples=60, deadline=None, derandomize=True)  # a drawn kink could fall to either side by rounding
@given(case=cases(leaky=False))
def test_proxy_equals_its_plain_restatement(clipped: bool, case: Case) -> None:
    network, codes = case
    images = images_of(network, codes).double()
    left, right = images.clone().requires_grad_(), images.clone().requires_grad_()
    proxy, plain = Twin(network).double().proxy(left, clipped), plain_proxy(network, right, clipped)
    assert proxy.dtype == torch.float32
    assert relative_error(proxy, plain) < 1e-6
    weights = torch.randn(plain.shape, dtype=torch.float64)
    (proxy.double() * weights).sum().backward()
    (plain * weights).sum().backward()
    assert left.grad is not None
    assert right.grad is not None
    assert relative_error(left.grad, right.grad) < 1e-5


def test_clipped_proxy_is_the_long_run_rate_of_a_subtractive_network() -> None:
    """One layer, 4,000 steps: spikes per step approach clip(x / threshold, 0, 1)."""
    network = conv_network()
    first = replace(network.populations[0], reset="subtract", bias=network.populations[0].bias - 3)
    dense = np.random.default_rng(1).integers(-9, 10, (3, first.size)).astype(np.int32)
    readout = replace(network.readout, bias=np.array([5, -5, 1]), scale=40.0)
    synapses = (network.synapses[0], Synapse("conv", "out", "dense", dense, 8))
    network = IntegerNetwork(network.input, (first, replace(readout, name="out")), synapses, 4000)
    images = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    twin = Twin(network)
    assert relative_error(twin.proxy(images, clipped=True), twin(images)) < 0.01
    assert relative_error(twin.proxy(images, clipped=False), twin(images)) > 1


def test_gradient_of_one_neuron_by_hand() -> None:
    """Two steps, threshold mantissa 9, scale 10: z = (v - 9.5) / 10, and dv_1 / dr_1 = (1 - s) - r g."""
    network = single_neuron()
    twin = Twin(network, Surrogate("triangle", 1.0))
    image = torch.tensor([[4 / 255]], requires_grad=True)
    twin(image).sum().backward()
    # r_1 = 0.4, no spike; r_2 = 0.8, no spike: the codes are 4 and 8 weight units.
    g1, g2 = 1 - (9.5 - 4) / 10, 1 - (9.5 - 8) / 10
    carried = 1 - 0.4 * g1
    expected = (g1 + g2 * (1 + carried)) / 10 * 255 / 2
    assert image.grad is not None
    assert float(image.grad) == pytest.approx(expected, rel=1e-6)


def test_surrogates_can_be_given_per_population_and_shared() -> None:
    network = conv_network()
    codes = np.random.default_rng(0).integers(0, 16, (4, 1, 6, 6)).astype(np.uint8)
    twin = Twin(network)
    other = twin.with_surrogate({"conv": WIDE})
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(twin.buffers(), other.buffers(), strict=True))
    wide = image_gradient(twin.with_surrogate(WIDE), codes)
    assert torch.equal(image_gradient(other, codes), wide)
    assert not torch.equal(image_gradient(twin, codes), wide)


def test_rules_of_a_call_come_before_the_twins_own() -> None:
    network = conv_network()
    codes = np.random.default_rng(0).integers(0, 16, (4, 1, 6, 6)).astype(np.uint8)
    twin = Twin(network)
    for rules in (WIDE, RATE, {"conv": WIDE}, {"conv": RATE}):
        assert torch.equal(image_gradient(twin, codes, rules), image_gradient(twin.with_surrogate(rules), codes))
    gradients = [image_gradient(twin, codes, rules) for rules in (None, WIDE, RATE)]
    assert not any(torch.equal(a, b) for a, b in pairwise(gradients))


def test_an_adaptive_rule_moves_with_every_call_and_starts_anew_with_a_new_instance() -> None:
    network = conv_network()
    codes = np.random.default_rng(0).integers(0, 16, (4, 1, 6, 6)).astype(np.uint8)
    twin = Twin(network)

    def run() -> list[Tensor]:
        rules = {p.name: AdaptiveSurrogate() for p in network.populations if p.spiking}
        return [image_gradient(twin, codes, rules) for _ in range(3)]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    used = AdaptiveSurrogate()
    image_gradient(twin, codes, used)
    with pytest.raises(SpikeguardError, match="new one for each layer"):
        image_gradient(twin, codes[:2], used)


def test_a_rule_sees_all_steps_of_a_population() -> None:
    shapes = []

    class Spy:
        def gradient(self, z: Tensor) -> Tensor:
            shapes.append(tuple(z.shape))
            return torch.ones_like(z)

    image_gradient(Twin(conv_network(), Spy()), np.zeros((3, 1, 6, 6), np.uint8))
    assert shapes == [(5, 3, 4, 6, 6)]


def test_repeated_calls_carry_no_state() -> None:
    network = conv_network()
    codes = np.random.default_rng(0).integers(0, 16, (4, 1, 6, 6)).astype(np.uint8)
    twin = Twin(network)
    assert torch.equal(image_gradient(twin, codes), image_gradient(twin, codes))
    one_by_one = torch.cat([twin(images_of(network, codes[i : i + 1])) for i in range(4)])
    assert torch.equal(one_by_one, twin(images_of(network, codes)))
    assert not list(twin.parameters())


def test_pixels_are_rounded_to_codes_and_pass_gradients() -> None:
    network = conv_network()
    codes = np.random.default_rng(0).integers(1, 15, (2, 1, 6, 6)).astype(np.uint8)
    twin = Twin(network, WIDE)
    exact = images_of(network, codes)
    for offset in (-0.4, 0.4):
        moved = (exact + offset / network.input.max_code).requires_grad_()
        logits = twin(moved)
        (logits * torch.arange(1, 4)).sum().backward()
        assert torch.equal(logits, twin(exact))
        assert moved.grad is not None
        assert torch.equal(moved.grad, image_gradient(twin, codes))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_images_outside_the_unit_range_are_refused(value: float) -> None:
    images = torch.zeros(1, 1, 6, 6)
    images[0, 0, 2, 2] = value
    with pytest.raises(SpikeguardError, match=r"\[0, 1\]"):
        Twin(conv_network())(images)


def test_images_and_codes_of_another_shape_are_refused() -> None:
    twin = Twin(conv_network())
    with pytest.raises(SpikeguardError, match="reads"):
        twin(torch.zeros(1, 4, 1, 6, 6))
    with pytest.raises(RuleViolations, match="shape"):
        twin.trace(np.zeros((1, 1, 6, 5), np.uint8))


def test_float32_is_chosen_only_where_it_is_proven() -> None:
    rng = np.random.default_rng(3)
    plain = build_network(rng, spatial=True, hidden=2, leaking=0, resets=("zero",), saturating=False, steps=4)
    assert exact_in_float32(plain)
    assert Twin(plain).dtype == torch.float32
    leaky = build_network(rng, spatial=True, hidden=2, leaking=1, resets=("zero",), saturating=False, steps=4)
    assert Twin(leaky).dtype == torch.float64
    assert Twin(plain).double().dtype == torch.float64
    with pytest.raises(SpikeguardError, match="does not hold"):
        Twin(leaky).float()(torch.zeros(1, *leaky.input.shape))


def test_sums_beyond_float32_are_exact_in_float64() -> None:
    """A readout sum above 2**24 that float32 would round."""
    network = single_neuron(weight=2**17 - 1, readout_weight=2**23 + 1)
    codes = np.array([[255]], np.uint8)
    twin = Twin(network)
    assert twin.dtype == torch.float64
    assert_same(run_reference(network, codes), twin.trace(codes))
    assert int(twin.trace(codes).readouts[0, 0]) == 2 * (2**23 + 1)


@COMPILED
def test_sums_of_both_signs_meet_before_a_saturated_membrane(compiled: bool) -> None:
    """Excitation and nearly as much inhibition: one alone, added to the membrane, would be rounded in float32."""
    excitation, inhibition = 2**15 - 1, 255 * (2**15 - 1) + 3
    silent_below_4 = Population("p0", (1,), 1, np.array([-2]), 1.0)
    network = IntegerNetwork(
        InputSpec((2,)),
        (
            silent_below_4,
            Population("p1", (1,), 2**20, np.array([0]), 1.0),
            Population("out", (1,), 0, np.array([0]), 1.0, spiking=False),
        ),
        (
            Synapse(INPUT, "p0", "dense", np.array([[0, 1]], np.int32), 8),
            Synapse(INPUT, "p1", "dense", np.array([[excitation, 0]], np.int32), 16),
            Synapse("p0", "p1", "dense", np.array([[-inhibition]], np.int32), 24),
            Synapse("p1", "out", "dense", np.array([[1]], np.int32), 8),
        ),
        3,
    )
    codes = np.array([[255, 3], [255, 4], [255, 0]], np.uint8)
    twin = Twin(network)
    assert twin.dtype == torch.float32
    expected = run_reference(network, codes)
    membranes = expected.populations["p1"].membranes
    assert membranes is not None
    assert membranes[0, :, 0].tolist() == [STATE_LIMIT, STATE_LIMIT - 3 * 64, STATE_LIMIT]
    with computed(compiled, group=2 * network.steps):
        assert_same(expected, twin.trace(codes))


def test_only_what_needs_it_is_wide() -> None:
    """Decays widen states, and no sums; a sum beyond 2**24 widens its own population, and no other."""
    rng = np.random.default_rng(3)
    leaky = build_network(rng, spatial=True, hidden=2, leaking=1, resets=("zero",), saturating=False, steps=4)
    twin = Twin(leaky)
    types = {name.partition("_")[0]: values.dtype for name, values in twin.named_buffers() if "out" not in name}
    hidden = [i for i, s in enumerate(leaky.synapses) if s.target != "out"]
    assert {twin.get_buffer(f"weight_{i}").dtype for i in hidden} == {torch.float32}
    assert (types["bias"], types["constant"]) == (torch.float64, torch.float64)
    wide = Twin(single_neuron(weight=2**17 - 1, readout_weight=1))
    assert wide.get_buffer("weight_0").dtype == torch.float64
    assert wide.get_buffer("weight_1").dtype == torch.float32


def test_a_missing_rule_is_named() -> None:
    with pytest.raises(SpikeguardError, match="conv"):
        Twin(conv_network())(torch.zeros(1, 1, 6, 6), {"another": WIDE})


@pytest.mark.parametrize("batch", [1, 5, 16, 33])
@pytest.mark.parametrize("geometry", [(3, 1, 1), (6, 2, 2), (2, 3, 0), (5, 1, 4)])
def test_both_convolutions_are_exact_on_integers(batch: int, geometry: tuple[int, int, int]) -> None:
    kernel, stride, padding = geometry
    generator = torch.Generator().manual_seed(batch)
    activity = torch.randint(0, 256, (batch, 16, 9, 7), generator=generator).float()
    weight = torch.randint(-128, 128, (8, 16, kernel, kernel), generator=generator).float()
    expected = F.conv2d(activity.double(), weight.double(), stride=stride, padding=padding).float()
    assert torch.equal(exact_convolution(activity, weight, stride, padding), expected)
    assert torch.equal(unfolded_convolution(activity, weight, stride, padding), expected)


@pytest.mark.parametrize("kernel", [(4, 4), (2, 6), (3, 3)])
@pytest.mark.parametrize("padding", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (11, 12)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_way_back_by_phases_is_the_transposed_convolution(
    kernel: tuple[int, int], padding: int, size: tuple[int, int], stride: int
) -> None:
    generator = torch.Generator().manual_seed(5)
    activity = torch.randn(3, 5, *size, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, *kernel, generator=generator, dtype=torch.float64)
    phases = phase_weights(weight, stride)
    assert (phases is None) == (stride == 1 or any(k % stride for k in kernel))
    expected = F.conv2d(activity, weight, stride=stride, padding=padding)
    actual = exact_convolution(activity, weight, stride, padding, phases)
    gradient = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (left,) = torch.autograd.grad(expected, activity, gradient)
    (right,) = torch.autograd.grad(actual, activity, gradient)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@contextmanager
def computed(compiled: bool, group: int) -> Iterator[None]:
    """With the kernels or as on another device, and in groups of at most so many samples times steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twin_module, "GROUP_BYTES", 0)
        patch.setattr(twin_module, "GROUP_ROWS", group)
        if not compiled:
            patch.setattr(twin_neurons, "_is_compiled_for", lambda _: False)
        yield


def images_of(network: IntegerNetwork, codes: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(codes.astype(np.float32)) / network.input.max_code


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float(((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).detach())


def image_gradient(twin: Twin, codes: NDArray[np.uint8], rules: Rules | None = None) -> Tensor:
    images = images_of(twin.network, codes).requires_grad_()
    logits = twin(images, rules)
    (logits * torch.arange(1, logits.shape[1] + 1)).sum().backward()
    assert images.grad is not None
    return images.grad


def single_neuron(weight: int = 1, readout_weight: int = 1) -> IntegerNetwork:
    """One pixel, one neuron with threshold mantissa 9 and scale 10, two steps."""
    return IntegerNetwork(
        InputSpec((1,)),
        (
            Population("neuron", (1,), 9, np.zeros(1, np.int64), 10.0),
            Population("out", (1,), 0, np.zeros(1, np.int64), 1.0, spiking=False),
        ),
        (
            Synapse("input", "neuron", "dense", np.array([[weight]], np.int32), 18),
            Synapse("neuron", "out", "dense", np.array([[readout_weight]], np.int32), 25),
        ),
        2,
    )


class _PlainSpike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(z)
        ctx.surrogate = surrogate
        return (z > 0).double()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return gradient * ctx.surrogate.gradient(z), None


def passed_on(exact: Tensor, smooth: Tensor) -> Tensor:
    """The value of ``exact`` with the gradient of ``smooth``."""
    return exact.detach() + (smooth - smooth.detach())


def plain_logits(network: IntegerNetwork, images: Tensor, rule: Surrogate | Rate) -> Tensor:
    """The network step by step in autograd's own operations, float64."""
    changing = images.ndim == len(network.input.shape) + 2
    codes = plain_codes(network, images)
    ever_spiking = spiking_neurons(network, codes)
    state = {p.name: (torch.zeros(()), torch.zeros(())) for p in network.populations}
    readout = torch.zeros(())
    for step in range(network.steps):
        activity = {INPUT: with_constants(network, codes[:, step] if changing else codes)}
        for p in network.populations:
            total = sum(propagated(s, activity[s.source]) for s in network.incoming(p.name))
            assert isinstance(total, Tensor)
            bias = torch.from_numpy(p.bias).double()
            u, v = state[p.name]
            u = decayed(u, p.current_decay) + 64 * total
            v = decayed(v, p.voltage_decay) + u + 64 * bias
            v = passed_on(v.clamp(-STATE_LIMIT, STATE_LIMIT), v)
            if p.spiking:
                # Between 64 threshold and half a unit above lies only what decay or the clip put there.
                fires = (v > 64 * p.threshold).double()
                if isinstance(rule, Rate):
                    smooth = (total + bias) / p.scale * ever_spiking[p.name]
                    u, v = u.detach(), v.detach()
                else:
                    z = (v / 64 - p.threshold - 0.5) / p.scale
                    smooth = _PlainSpike.apply(z, rule)  # type: ignore[no-untyped-call]
                spikes = passed_on(fires, smooth)
                reset = spikes if isinstance(rule, Surrogate) else fires
                v = v * (1 - reset) if p.reset == "zero" else v - 64 * p.threshold * reset
                activity[p.name] = spikes
            else:
                readout = v if p.is_leaky else readout + total + bias
            state[p.name] = (u, v)
    unit = 64 if network.readout.is_leaky else network.steps
    return readout.flatten(1) / (unit * network.readout.scale)


def plain_proxy(network: IntegerNetwork, images: Tensor, clipped: bool) -> Tensor:
    """The static network in autograd's own operations; where a gradient changes, by its formula."""
    codes = plain_codes(network, images)
    changing = images.ndim == len(network.input.shape) + 2
    activity = {INPUT: with_constants(network, codes.mean(1) if changing else codes)}
    x = codes
    for p in network.populations:
        total = sum(propagated(s, activity[s.source]) for s in network.incoming(p.name))
        x = (total + torch.from_numpy(p.bias)) / p.scale
        rate = x / ((p.threshold + 0.5) / p.scale)
        inside = (rate >= 0) & (rate <= 1)
        activity[p.name] = rate * inside + (rate > 1) if clipped else x * (x > 0)
    return x.flatten(1)


def plain_codes(network: IntegerNetwork, images: Tensor) -> Tensor:
    scaled = images * network.input.max_code
    return passed_on(scaled.round(), scaled)


def spiking_neurons(network: IntegerNetwork, codes: Tensor) -> dict[str, Tensor]:
    """Which neurons spike at all, ``(samples, *shape)``, as the reference says."""
    trace = run_reference(network, codes.detach().numpy().astype(np.uint8))
    found = {}
    for p in network.populations[:-1]:
        spikes = trace.populations[p.name].spikes
        assert spikes is not None
        found[p.name] = torch.from_numpy(spikes.any(1).reshape(-1, *p.shape))
    return found


def with_constants(network: IntegerNetwork, codes: Tensor) -> Tensor:
    spec = network.input
    planes = [torch.full((len(codes), 1, *spec.shape[1:]), c, dtype=codes.dtype) for c in spec.constant_codes]
    return torch.cat([codes, *planes], dim=1)


def propagated(synapse: Synapse, activity: Tensor) -> Tensor:
    weight = torch.from_numpy(synapse.weight).double()
    if synapse.kind == "dense":
        return activity.flatten(1) @ weight.T
    return F.conv2d(activity, weight, stride=synapse.stride, padding=synapse.padding)


def decayed(state: Tensor, share: int) -> Tensor:
    smooth = state * (DECAY_UNITY - share) / DECAY_UNITY
    return passed_on(smooth.trunc(), smooth)
