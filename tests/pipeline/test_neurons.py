from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import nir
import pytest
import snntorch
import torch
from hypothesis import given
from hypothesis import strategies as st
from snntorch import utils
from snntorch.export_nir import export_to_nir
from snntorch.import_nir import import_from_nir
from torch import Tensor, nn

from hardware.surrogates import RATE, RULES, AdaptiveSurrogate, SpikeRule, Surrogate
from pipeline import neurons
from pipeline.models.neuron_kernels import BLOCK
from pipeline.neurons import MIN_THRESHOLD, SMALLEST_SHARE, Leaky, Reset

STEPS = 6
SURROGATES = [
    Surrogate("triangle", 1.0),
    Surrogate("triangle", 0.5),
    Surrogate("rectangle", 2.0),
    Surrogate("exponential", 0.7, 0.3),
    Surrogate("arctan", 1.5),
    Surrogate("straight_through"),
]
RESETS: tuple[Reset, ...] = ("zero", "subtract")
KINDS = list(product((1.0, 0.9), RESETS))
# Features in a row, or images whose channels lie last in memory.
SHAPES = {"flat": (4, 7), "images": (3, 2, 4, 5), "channels last": (3, 2, 4, 5)}


class Spike(torch.autograd.Function):
    """[z >= 0] forward, the surrogate backward: one step, so that autograd does the rest."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(z)
        ctx.surrogate = surrogate
        return (z >= 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return grad * ctx.surrogate.gradient(z), None


def restated(current: Tensor, threshold: Tensor, beta: float, reset: Reset, surrogate: Surrogate) -> Tensor:
    """The method's neuron, one line per equation."""
    v = torch.zeros_like(current[0])
    spikes = []
    for t in range(STEPS):
        u = beta * v + current[t if len(current) > 1 else 0]
        s: Tensor = Spike.apply(u - threshold, surrogate)  # type: ignore[no-untyped-call]
        v = u * (1 - s) if reset == "zero" else u - threshold * s
        spikes.append(s)
    return torch.stack(spikes)


def stepped(layer: Leaky, current: Tensor, steps: int = STEPS) -> Tensor:
    """Time step by time step, as in a plain snnTorch model."""
    membrane, spikes = layer.reset_mem(), []
    for t in range(steps):
        spike, membrane = layer(current[t if len(current) > 1 else 0], membrane)
        spikes.append(spike)
    return torch.stack(spikes)


def random_current(layout: str, static: bool, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (1 if static else STEPS, *SHAPES[layout])
    current = (0.6 * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.15).to(dtype)
    if layout == "channels last":
        current = current.movedim(2, -1).contiguous().movedim(-1, 2)
        assert not current.is_contiguous()
    return current.requires_grad_()


def weights_of(spikes: Tensor) -> Tensor:
    return torch.randn(spikes.shape, generator=torch.Generator().manual_seed(5), dtype=spikes.dtype)


def gradients(spikes: Tensor, current: Tensor, layer: Leaky) -> tuple[Tensor, Tensor]:
    by_current, by_threshold = torch.autograd.grad((spikes * weights_of(spikes)).sum(), [current, layer.threshold])
    return by_current, by_threshold


@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: s.name)
@pytest.mark.parametrize(("beta", "reset"), KINDS)
@pytest.mark.parametrize("static", [True, False], ids=["static", "changing"])
def test_spikes_and_gradients_are_the_equations(surrogate: Surrogate, beta: float, reset: Reset, static: bool) -> None:
    current = random_current("flat", static)
    layer = Leaky(0.4, beta=beta, reset_mechanism=reset, spike_grad=surrogate).double()

    expected = restated(current, layer.threshold, beta, reset, surrogate)
    by_autograd = gradients(expected, current, layer)
    assert 0.1 < float(expected.detach().mean()) < 0.9
    for spikes in (layer.sequence(current, STEPS), stepped(layer, current)):
        assert torch.equal(spikes, expected)
        for ours, plain in zip(gradients(spikes, current, layer), by_autograd, strict=True):
            assert float(plain.abs().sum()) > 0
            torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize(("beta", "reset"), KINDS)
@pytest.mark.parametrize("static", [True, False], ids=["static", "changing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_steps_at_once_are_the_steps_one_by_one(
    layout: str, beta: float, reset: Reset, static: bool, dtype: torch.dtype
) -> None:
    current = random_current(layout, static, dtype)
    layer = Leaky(0.4, beta=beta, reset_mechanism=reset).to(dtype)
    at_once, one_by_one = layer.sequence(current, STEPS), stepped(layer, current)
    assert at_once.dtype is dtype
    assert torch.equal(at_once, one_by_one)
    tolerance = 1e-4 if dtype is torch.float32 else 1e-12
    for fused, plain in zip(gradients(at_once, current, layer), gradients(one_by_one, current, layer), strict=True):
        assert fused.dtype is dtype
        torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)


@given(st.data())
def test_neurons_of_any_kind_step_as_they_run(data: st.DataObject) -> None:
    steps, samples, features = (data.draw(st.integers(1, 5)) for _ in range(3))
    layer = Leaky(
        data.draw(st.sampled_from([-1.0, 0.01, 0.25, 0.5, 3.0])),
        beta=data.draw(st.sampled_from([0.0, 0.3, 0.75, 0.999, 1.0])),
        reset_mechanism=data.draw(st.sampled_from(RESETS)),
    )
    # Eighths, so that membranes meet thresholds.
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    current = torch.randint(-4, 9, (data.draw(st.sampled_from([1, steps])), samples, features), generator=generator) / 8
    assert torch.equal(layer.sequence(current, steps), stepped(layer, current, steps))


RULE_SAMPLES: dict[str, SpikeRule] = {
    **{name: Surrogate(name, 0.8, 1.3) for name in RULES},
    "rate": RATE,
}


def settings(rule: SpikeRule, beta: float, reset: Reset) -> neurons._Settings:
    return neurons._Settings(STEPS, beta, reset == "subtract", rule)


@pytest.mark.parametrize("rule", [*RULE_SAMPLES, "adaptive"])
@pytest.mark.parametrize(("beta", "reset"), KINDS)
@pytest.mark.parametrize("static", [True, False], ids=["static", "changing"])
@pytest.mark.parametrize("layout", ["flat", "channels last"])
def test_what_other_devices_run_is_what_is_compiled(
    rule: str, beta: float, reset: Reset, static: bool, layout: str
) -> None:
    current, threshold = random_current(layout, static).detach(), torch.tensor(0.4, dtype=torch.float64)
    # The adaptive rule keeps state: each way gets one of its own.
    ways = [settings(RULE_SAMPLES.get(rule) or AdaptiveSurrogate(), beta, reset) for _ in range(2)]
    layer = Leaky(0.4, beta=beta, reset_mechanism=reset).double()
    spikes, membranes = layer.sequence(current, STEPS), neurons._integrate(current, threshold, ways[0])
    assert torch.equal((membranes >= threshold).double(), spikes)
    assert 0.1 < float(spikes.detach().mean()) < 0.9

    grad = weights_of(spikes)
    backwards = neurons._backward_compiled, neurons._backward_in_torch
    compiled, plain = (
        backward(current, threshold, grad, way, layout == "channels last")
        for backward, way in zip(backwards, ways, strict=True)
    )
    assert float(plain[0].abs().sum()) > 0
    assert (float(plain[1]) == 0) == (rule == "rate")
    for by_kernel, by_torch in zip(compiled, plain, strict=True):
        torch.testing.assert_close(by_kernel, by_torch, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rule", RULE_SAMPLES)
@pytest.mark.parametrize("static", [True, False], ids=["static", "changing"])
def test_compiled_float32_neurons_are_those_of_torch(rule: str, static: bool) -> None:
    """More neurons than a block of the kernels holds, and not a multiple of it."""
    generator = torch.Generator().manual_seed(1)
    shape = (1 if static else STEPS, 3, BLOCK // 2 + 5)
    current, threshold = 0.5 * torch.randn(shape, generator=generator) + 0.1, torch.tensor(0.4)
    way = settings(RULE_SAMPLES[rule], 1.0, "zero")
    spikes = Leaky(0.4).sequence(current, STEPS)
    assert torch.equal((neurons._integrate(current, threshold, way) >= threshold).float(), spikes)
    compiled, plain = (
        backward(current, threshold, weights_of(spikes), way, False)
        for backward in (neurons._backward_compiled, neurons._backward_in_torch)
    )
    torch.testing.assert_close(compiled[0], plain[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled[1], plain[1], rtol=1e-4, atol=1e-2)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("rule", [Surrogate("triangle", 1.0), RATE, AdaptiveSurrogate()], ids=lambda rule: rule.name)
def test_threads_share_the_neurons_and_change_nothing(rule: SpikeRule) -> None:
    generator = torch.Generator().manual_seed(2)
    neurons_of_three = 3 * SMALLEST_SHARE + 77
    current = torch.randn(2, 1, neurons_of_three, generator=generator, dtype=torch.float64).requires_grad_()
    layer = Leaky(0.4, beta=0.9).double()
    spikes = layer.sequence(current, 2, rule)
    assert torch.equal(spikes, stepped(layer, current, 2))
    shared = gradients(spikes, current, layer)
    torch.set_num_threads(1)
    again = AdaptiveSurrogate() if isinstance(rule, AdaptiveSurrogate) else rule
    alone = gradients(layer.sequence(current, 2, again), current, layer)
    assert torch.equal(shared[0], alone[0])
    torch.testing.assert_close(shared[1], alone[1], rtol=1e-10, atol=1e-10)


def test_an_average_over_time_has_the_gradient_of_its_parts() -> None:
    current = random_current("flat", static=False)
    layer = Leaky(0.4).double()
    weights = weights_of(current)[0]
    of_average = torch.autograd.grad((layer.sequence(current, STEPS).mean(0) * weights).sum(), current)[0]
    of_parts = torch.autograd.grad((layer.sequence(current, STEPS) * weights / STEPS).sum(), current)[0]
    torch.testing.assert_close(of_average, of_parts, rtol=1e-12, atol=1e-14)


def test_the_reset_is_in_the_gradient() -> None:
    """A detached reset would leave (1 - s) alone and lose u times the surrogate."""
    current = torch.tensor([[[0.6]], [[0.1]]], dtype=torch.float64, requires_grad=True)
    spikes = Leaky(0.5).double().sequence(current, 2)
    assert spikes.flatten().tolist() == [1.0, 0.0]
    (gradient,) = torch.autograd.grad(spikes[1].sum(), current)
    slope_now, slope_before = 1 - abs(0.1 - 0.5), 1 - abs(0.6 - 0.5)
    expected = slope_now * (0.0 - 0.6 * slope_before)
    assert gradient[0].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("beta", "reset"), KINDS)
def test_membranes_lead_to_the_spikes(beta: float, reset: Reset) -> None:
    current = random_current("flat", static=False).detach()
    layer = Leaky(0.4, beta=beta, reset_mechanism=reset).double()
    spikes, membranes = layer.sequence(current, STEPS), layer.membranes(current, STEPS)
    assert torch.equal(spikes, (membranes >= layer.threshold).double())
    after = membranes * (1 - spikes) if reset == "zero" else membranes - layer.threshold.detach() * spikes
    assert torch.equal(membranes[1:], beta * after[:-1] + current[1:])


def test_nothing_is_carried_over_between_sequences() -> None:
    current = torch.full((1, 2, 3), 0.3)
    layer = Leaky(1.0)
    first = layer.sequence(current, 5)
    assert torch.equal(layer.sequence(current, 5), first)
    layer(current[0])
    assert torch.equal(layer.sequence(current, 5), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_currents_are_integrated_in_single_precision(dtype: torch.dtype) -> None:
    current = torch.full((1, 1, 1), 1 / 512, dtype=dtype, requires_grad=True)
    spikes = Leaky(1.0).sequence(current, 512)
    assert spikes.dtype is torch.float32
    assert spikes.flatten().nonzero().flatten().tolist() == [511]  # bfloat16 would stand still on the way
    (gradient,) = torch.autograd.grad(spikes.sum(), current)
    assert gradient.dtype is dtype


def test_the_threshold_in_force_never_falls_below_its_floor() -> None:
    layer = Leaky(-1.0)
    below = torch.full((1, 1, 1), MIN_THRESHOLD / 2)
    assert layer.effective_threshold.item() == pytest.approx(MIN_THRESHOLD)
    assert layer.sequence(below, 1).item() == stepped(layer, below, 1).item() == 0
    layer.clamp_threshold()
    assert layer.threshold.item() == pytest.approx(MIN_THRESHOLD)


def test_only_the_threshold_is_stored() -> None:
    assert set(Leaky(0.7, beta=0.5).state_dict()) == {"threshold"}
    assert [name for name, _ in Leaky(0.7, learn_threshold=False).named_parameters()] == []


# What is the same as in snnTorch, and each difference.


def by_snntorch(current: Tensor, threshold: float, **options: Any) -> tuple[list[float], list[float]]:
    """Spikes and membranes of snnTorch's neuron for a current of one neuron."""
    layer = snntorch.Leaky(threshold=threshold, reset_mechanism="zero", **{"beta": 1.0, **options})
    membrane = layer.reset_mem()
    spikes, membranes = [], []
    for value in current.flatten():
        spike, membrane = layer(value.reshape(1), membrane)
        spikes.append(spike.item())
        membranes.append(membrane.item())
    return spikes, membranes


@pytest.mark.parametrize("beta", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.4])
def test_spikes_are_those_of_snntorch_at_the_next_threshold_up(beta: float, threshold: float) -> None:
    current = torch.rand(60, 1, generator=torch.Generator().manual_seed(5))
    next_up = torch.nextafter(torch.tensor(threshold), torch.tensor(math.inf)).item()
    layer = Leaky(next_up, beta=beta)
    spikes, membranes = by_snntorch(current, threshold, beta=beta)
    assert layer.sequence(current, 60).flatten().tolist() == spikes
    assert layer.membranes(current, 60).flatten().tolist() == membranes
    assert 0 < sum(spikes) < 60


def test_a_membrane_on_the_threshold_spikes_here_and_not_in_snntorch() -> None:
    current = torch.tensor([[0.5], [0.5], [0.25]])
    assert Leaky(1.0).sequence(current, 3).flatten().tolist() == [0.0, 1.0, 0.0]
    assert stepped(Leaky(1.0), current, 3).flatten().tolist() == [0.0, 1.0, 0.0]
    assert by_snntorch(current, 1.0)[0] == [0.0, 0.0, 1.0]


def test_the_membrane_given_back_is_after_the_reset_and_in_snntorch_before_it() -> None:
    current = torch.tensor([[0.6], [0.6]])
    spikes, membranes = by_snntorch(current, 1.0)
    assert spikes == [0.0, 1.0]
    assert membranes[1] == pytest.approx(1.2)
    for reset, after in (("zero", 0.0), ("subtract", 0.2)):
        layer = Leaky(1.0, reset_mechanism=reset)  # type: ignore[arg-type]
        _, membrane = layer(current[0], layer.reset_mem())
        spike, membrane = layer(current[1], membrane)
        assert spike.item() == 1.0
        assert membrane.item() == pytest.approx(after, abs=1e-6)
        assert layer.mem is membrane


def test_gradients_pass_the_reset_here_and_not_in_snntorch() -> None:
    triangle = Surrogate("triangle", 1.0)

    def later_by_first(layer: nn.Module) -> float:
        current = torch.tensor([[0.6], [0.1]], requires_grad=True)
        spike, membrane = layer(current[0], layer.reset_mem())  # type: ignore[operator]
        assert spike.item() == 1.0
        later, _ = layer(current[1], membrane)
        return float(torch.autograd.grad(later.sum(), current)[0][0])

    def step(z: Tensor) -> Tensor:
        spikes: Tensor = Spike.apply(z, triangle)  # type: ignore[no-untyped-call]
        return spikes

    detached = snntorch.Leaky(beta=1.0, threshold=0.5, reset_mechanism="zero", spike_grad=step)
    assert later_by_first(detached) == 0.0
    assert later_by_first(Leaky(0.5, spike_grad=triangle)) == pytest.approx(-0.6 * 0.9 * 0.6, rel=1e-5)


class Plain(nn.Module):
    """A model as snnTorch's tutorials write them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(6, 10), Leaky(0.5, **options)
        self.fc2, self.lif2 = nn.Linear(10, 2), Leaky(0.5, **options)

    def forward(self, x: Tensor) -> Tensor:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.reset_mem()
        spikes = []
        for _ in range(STEPS):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
        return torch.stack(spikes)


@pytest.mark.parametrize(("beta", "reset"), KINDS)
def test_a_plain_snntorch_model_learns_with_it(beta: float, reset: Reset) -> None:
    torch.manual_seed(0)
    model = Plain(beta=beta, reset_mechanism=reset)
    x, labels = torch.rand(32, 6), torch.arange(32) % 2
    x[labels == 1, :3] += 1
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).mean(0) * 4, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert model.lif1.threshold.item() != 0.5


def test_hidden_states_are_kept_from_step_to_step_and_reset_by_snntorch() -> None:
    torch.manual_seed(0)
    last = Leaky(0.2, init_hidden=True, output=True)
    model = nn.Sequential(nn.Linear(6, 10), Leaky(0.4, beta=0.9, init_hidden=True), nn.Linear(10, 4), last)
    x = torch.rand(3, 6)

    def run() -> Tensor:
        spikes, membrane = zip(*(model(x) for _ in range(STEPS)), strict=True)
        assert membrane[-1] is last.mem
        return torch.stack([*spikes, *membrane])

    first = run()
    continued = run()
    utils.reset(model)
    assert not last.mem.any()
    assert not last.mem.requires_grad
    assert torch.equal(run(), first)
    assert not torch.equal(continued, first)
    assert model(x[:2])[0].shape == (2, 4)  # a batch of another size starts anew


def test_a_membrane_is_not_given_to_neurons_that_keep_their_own() -> None:
    with pytest.raises(TypeError, match="init_hidden"):
        Leaky(init_hidden=True)(torch.zeros(1, 2), torch.zeros(1, 2))


def per_neuron(layer: Any, count: int) -> nn.Module:
    """The same neurons with a decay and a threshold each: NIR's check of shapes wants that of snnTorch's own, too."""
    layer.beta = layer.beta.expand(count)
    layer.threshold = nn.Parameter(layer.threshold.detach().expand(count).clone())
    spread: nn.Module = layer
    return spread


@pytest.mark.filterwarnings("ignore:nirtorch.extract_nir_graph:DeprecationWarning")
def test_snntorchs_export_and_import_read_it_as_snntorchs_own_neuron() -> None:
    ours = Leaky(0.7, beta=0.75, init_hidden=True)
    theirs = snntorch.Leaky(beta=0.75, threshold=0.7, init_hidden=True, reset_mechanism="zero")
    before, after, written = nn.Linear(6, 5), nn.Linear(5, 2), []
    for layer in (ours, theirs):
        model = nn.Sequential(before, per_neuron(layer, 5), after)
        graph = export_to_nir(model, torch.rand(1, 6), ignore_dims=[0])
        (neuron,) = (node for node in graph.nodes.values() if isinstance(node, nir.LIF))
        written.append(neuron)
    for field in ("tau", "r", "v_leak", "v_threshold", "v_reset"):
        assert getattr(written[0], field).tolist() == getattr(written[1], field).tolist()
    assert written[0].tau.tolist() == pytest.approx([1e-4 / (1 - 0.75)] * 5)
    assert written[0].v_threshold.tolist() == pytest.approx([0.7] * 5)

    back = import_from_nir(export_to_nir(nn.Sequential(before, ours, after), torch.rand(1, 6), ignore_dims=[0]))
    (read,) = (part for part in back.modules() if isinstance(part, snntorch.Leaky))
    assert read.reset_mechanism == ours.reset_mechanism == "zero"
    torch.testing.assert_close(read.beta, ours.beta)
    assert read.threshold.tolist() == pytest.approx(0.7)
