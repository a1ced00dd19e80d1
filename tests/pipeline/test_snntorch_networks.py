"""Ready-made spiking networks of snnTorch, read into networks of our own that spike alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import snntorch
import torch
from hypothesis import given
from hypothesis import strategies as st
from snntorch import surrogate, utils
from torch import Tensor, nn

from hardware.errors import RuleViolations, Violation
from pipeline.models.layers import Normalize
from pipeline.models.spiking import SpikingNetwork, rebuild
from pipeline.models.tracing import trace_network
from pipeline.neurons import MIN_THRESHOLD, Leaky

STEPS = 7
SHAPE = (1, 4, 4)
Neurons = Callable[..., nn.Module]


def zero_reset(**settings: Any) -> nn.Module:
    neurons: nn.Module = snntorch.Leaky(**{"beta": 1.0, "reset_mechanism": "zero", **settings})
    return neurons


def hidden(**settings: Any) -> nn.Module:
    return zero_reset(init_hidden=True, **settings)


def sequential(**settings: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3, eps=1e-12),
        hidden(**settings),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 8),
        hidden(**settings),
        nn.Linear(8, 3),
    )


class StepByStep(nn.Module):
    """The tutorials' style: neurons return spikes and membrane, the caller carries the membranes on."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.normalize = Normalize([0.25], [0.5])
        self.fc1, self.fc2, self.fc3 = nn.Linear(16, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.lif1, self.lif2 = zero_reset(**settings), zero_reset(**settings)

    def states(self) -> tuple[Tensor, Tensor]:
        return self.lif1.init_leaky(), self.lif2.reset_mem()  # type: ignore[operator]

    def step(self, x: Tensor, mem1: Tensor, mem2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        current = self.fc1(self.normalize(x).flatten(1))
        spk1, mem1 = self.lif1(current, mem1)
        spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
        return self.fc3(spk2), mem1, mem2

    def forward(self, x: Tensor) -> Tensor:
        logits, _, _ = self.step(x, *self.states())
        return logits


class Residual(nn.Module):
    """A shortcut around neurons that keep their own membranes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.stem, self.lif1 = nn.Conv2d(1, 3, 3, padding=1), zero_reset(**settings)
        self.branch, self.lif2 = nn.Conv2d(3, 3, 3, padding=1), zero_reset(**settings)
        self.a = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        shortcut, _ = self.lif1(self.stem(x))
        spikes = self.lif2(self.a * shortcut + self.branch(shortcut))[0]
        logits: Tensor = self.head(spikes.flatten(1))
        return logits


STYLES: list[Callable[..., nn.Module]] = [sequential, StepByStep, Residual]


def dyadic(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights in eighths, so that float32 sums are exact in any order and membranes often meet the threshold."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            for value in part.parameters():
                value.data = torch.randint(-5, 7, value.shape, generator=generator) / 8
    return module.eval()


def images(samples: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, 5, (samples, *SHAPE), generator=torch.Generator().manual_seed(seed)) / 4


@torch.no_grad()
def simulate(module: nn.Module, x: Tensor, steps: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What snnTorch itself computes: mean logits, and spikes and membranes ``(samples, steps, neurons)`` by layer."""
    neurons = [part for part in module.modules() if isinstance(part, snntorch.Leaky)]
    spikes: list[list[Tensor]] = [[] for _ in neurons]
    membranes: list[list[Tensor]] = [[] for _ in neurons]

    def record(index: int) -> Callable[..., None]:
        def hook(neuron: Any, _: Any, output: Any) -> None:
            spikes[index].append((output[0] if isinstance(output, tuple) else output).flatten(1).bool())
            membranes[index].append(neuron.mem.flatten(1).clone())

        return hook

    hooks = [neuron.register_forward_hook(record(index)) for index, neuron in enumerate(neurons)]
    utils.reset(module)
    logits = []
    states = module.states() if isinstance(module, StepByStep) else ()
    for _ in range(steps):
        if isinstance(module, StepByStep):
            answer, *states = module.step(x, *states)  # type: ignore[assignment]
        else:
            answer = module(x)
        logits.append(answer)
    for handle in hooks:
        handle.remove()
    utils.reset(module)
    return torch.stack(logits).mean(0), [torch.stack(s, 1) for s in spikes], [torch.stack(u, 1) for u in membranes]


def rebuilt(module: nn.Module, steps: int = STEPS, shape: tuple[int, ...] = SHAPE) -> SpikingNetwork:
    traced = trace_network(module, shape)
    assert traced.is_spiking
    network = rebuild(traced, steps)
    assert isinstance(network, SpikingNetwork)
    return network.eval()


SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta": 1, "threshold": 1},
    {"threshold": 0.75},
    {"beta": 0.5},
    {"beta": 0.875, "threshold": torch.tensor([1.25])},
    {"beta": 0.9, "learn_threshold": True, "learn_beta": True},
    {"beta": 1.5, "threshold": 0.5},
    {"beta": 0.75, "reset_delay": False, "spike_grad": surrogate.fast_sigmoid(slope=25)},
]


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ", ".join(settings) or "defaults")
def test_rebuilt_networks_spike_as_in_snntorch(style: Callable[..., nn.Module], settings: dict[str, Any]) -> None:
    module = dyadic(style(**settings))
    network = rebuilt(module)
    expected, spikes, membranes = simulate(module, images(), STEPS)
    logits, activity = network.record(images())
    assert len(activity) == len(spikes) == 2
    for layer, by_snntorch, before_reset in zip(activity.values(), spikes, membranes, strict=True):
        assert torch.equal(layer.spikes, by_snntorch)
        assert 0 < float(by_snntorch.double().mean()) < 1
        if settings.get("reset_delay", True):
            assert torch.equal(layer.membranes, before_reset)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert float(expected.std()) > 0


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_membranes_on_the_threshold_do_not_spike_as_in_snntorch(style: Callable[..., nn.Module]) -> None:
    module = dyadic(style())
    _, spikes, membranes = simulate(module, images(), STEPS)
    network = rebuilt(module)
    _, activity = network.record(images())
    ties = [u == 1.0 for u in membranes]
    for layer, fired, tie in zip(activity.values(), spikes, ties, strict=True):
        assert tie.any()
        assert not fired[tie].any()
        assert not layer.spikes[tie].any()
    for _, neurons in network.neurons():
        neurons.threshold.data.fill_(1.0)
    _, at_threshold = network.record(images())
    assert not torch.equal(next(iter(at_threshold.values())).spikes, spikes[0])


@given(st.data())
def test_any_dense_network_spikes_as_in_snntorch(data: st.DataObject) -> None:
    inputs, hidden_size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    settings = {
        "beta": data.draw(st.sampled_from([0.0, 0.25, 0.6, 0.9, 1.0])),
        "threshold": data.draw(st.sampled_from([0.03125, 0.1, 0.5, 1.0, 3.0])),
    }
    module = dyadic(
        nn.Sequential(nn.Linear(inputs, hidden_size), hidden(**settings), nn.Linear(hidden_size, 2)),
        seed=data.draw(st.integers(0, 1000)),
    )
    steps = data.draw(st.integers(1, 6))
    x = torch.randint(0, 9, (3, inputs), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) / 8
    _, (spikes,), (membranes,) = simulate(module, x, steps)
    _, activity = rebuilt(module, steps, (inputs,)).record(x)
    (layer,) = activity.values()
    assert torch.equal(layer.spikes, spikes)
    assert torch.equal(layer.membranes, membranes)


def test_options_and_thresholds_are_carried_over() -> None:
    network = rebuilt(sequential(beta=0.875, threshold=0.1))
    for layer in network.graph.layers:
        if layer.kind == "spike":
            assert layer.options == {"beta": 0.875, "subtract": False}
    for _, neurons in network.neurons():
        threshold = torch.tensor(0.1)
        assert neurons.threshold > threshold
        assert torch.nextafter(neurons.threshold.detach(), torch.tensor(0.0)) == threshold


def test_neurons_of_our_own_keep_their_threshold_and_reset() -> None:
    module = dyadic(
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(16, 8),
            Leaky(1.0, beta=0.5, reset_mechanism="subtract", init_hidden=True),
            nn.Linear(8, 6),
            Leaky(-1.0, init_hidden=True),
            nn.Linear(6, 3),
        )
    )
    network = rebuilt(module)
    assert [float(neurons.threshold.detach()) for _, neurons in network.neurons()] == [1.0, -1.0]
    options = [layer.options for layer in network.graph.layers if layer.kind == "spike"]
    assert options == [{"beta": 0.5, "subtract": True}, {"beta": 1.0, "subtract": False}]
    expected, spikes, _ = simulate(module, images(), STEPS)
    logits, activity = network.record(images())
    for layer, fired in zip(activity.values(), spikes, strict=True):
        assert torch.equal(layer.spikes, fired)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_a_network_that_has_run_is_read_as_one_that_has_not_and_keeps_its_state(
    style: Callable[..., nn.Module],
) -> None:
    module = dyadic(style(learn_threshold=True))
    fresh = rebuilt(module)(images())
    module(images())
    module(images()).sum().backward()
    held = [part.mem for part in module.modules() if isinstance(part, snntorch.Leaky)]
    copies = [mem.detach().clone() for mem in held]
    assert any(copy.any() for copy in copies)
    assert torch.equal(rebuilt(module)(images()), fresh)
    after = [part.mem for part in module.modules() if isinstance(part, snntorch.Leaky)]
    assert all(now is before for now, before in zip(after, held, strict=True))
    assert all(torch.equal(now, copy) for now, copy in zip(after, copies, strict=True))


def refused(module: nn.Module) -> tuple[Violation, ...]:
    with pytest.raises(RuleViolations) as caught:
        trace_network(module, SHAPE)
    return caught.value.violations


def with_neurons(neurons: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), neurons, nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("neurons", "actual", "remedy"),
    [
        (snntorch.Leaky(0.9, init_hidden=True), "subtract", "zero"),
        (snntorch.Leaky(0.9, init_hidden=True, reset_mechanism="none"), "none", "zero"),
        (hidden(beta=torch.full((8,), 0.9)), "per neuron", "scalars"),
        (hidden(threshold=torch.ones(8)), "per neuron", "scalars"),
        (hidden(graded_spikes_factor=torch.ones(8)), "per neuron", "scalars"),
        (hidden(graded_spikes_factor=2.0), "graded", "defaults"),
        (hidden(state_quant=lambda mem: mem), "quantisation", "defaults"),
        (hidden(threshold=MIN_THRESHOLD / 2), "0.015", "factor"),
        (hidden(threshold=-1.0), "-1", "factor"),
        (hidden(threshold=float("nan")), "nan", "factor"),
        (hidden(spike_grad=lambda z: (z >= 0).float()), "spike function", "surrogate"),
        (hidden(spike_grad=torch.sigmoid), "spike function", "surrogate"),
        (snntorch.RLeaky(0.9, init_hidden=True, linear_features=8), "RLeaky", "recurrent"),
        (snntorch.Synaptic(0.9, 0.8, init_hidden=True), "Synaptic", "snntorch.Leaky"),
        (snntorch.RSynaptic(0.9, 0.8, init_hidden=True, linear_features=8), "RSynaptic", "snntorch.Leaky"),
        (snntorch.Lapicque(0.9, init_hidden=True), "Lapicque", "snntorch.Leaky"),
        (snntorch.Alpha(0.9, 0.8, init_hidden=True), "Alpha", "supported"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_neurons_that_cannot_be_deployed_are_refused(neurons: nn.Module, actual: str, remedy: str) -> None:
    (row,) = refused(with_neurons(neurons))
    assert row.object == "2"
    assert actual in row.actual
    assert remedy in row.remedy


@pytest.mark.filterwarnings("ignore:Inhibition")
def test_inhibition_is_refused() -> None:
    (row,) = refused(with_neurons(hidden(inhibition=True)))
    assert "inhibition" in row.actual


class OverTime(StepByStep):
    def forward(self, x: Tensor) -> Tensor:
        mem1, mem2 = self.states()
        recorded = []
        for _ in range(STEPS):
            logits, mem1, mem2 = self.step(x, mem1, mem2)
            recorded.append(logits)
        return torch.stack(recorded)


def test_a_loop_over_time_is_refused_once_for_every_layer() -> None:
    rows = refused(OverTime())
    again = {row.object for row in rows if "again" in row.actual}
    assert again == {"normalize", "fc1", "fc2", "fc3", "lif1", "lif2"}
    assert all("one time step" in row.remedy for row in rows)
    assert len(rows) == len(again) + 1  # and the stack of what was recorded


def test_output_neurons_are_refused_and_answered_with_the_average_of_their_current() -> None:
    class Ending(StepByStep):
        def forward(self, x: Tensor) -> Tensor:
            spikes: Tensor = self.lif1(self.fc1(x.flatten(1)))[0]
            return spikes

    sequential_end = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), hidden(output=True))
    for module in (sequential_end, Ending()):
        (row,) = refused(module)
        assert row.rule == "the network ends in logits"
        assert "average" in row.remedy


class MembraneOut(StepByStep):
    def forward(self, x: Tensor) -> Tensor:
        _, mem = self.lif1(self.fc1(x.flatten(1)), self.lif1.init_leaky())  # type: ignore[operator]
        logits: Tensor = self.fc3(self.fc2(mem))
        return logits


class StatesIn(StepByStep):
    def forward(self, x: Tensor, mem1: Tensor) -> Tensor:  # type: ignore[override]
        return self.step(x, mem1, self.lif2.init_leaky())[0]  # type: ignore[operator]


class StartsElsewhere(StepByStep):
    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, torch.full((12,), 0.5), self.lif2.init_leaky())[0]  # type: ignore[operator]


class StateOfAnother(StepByStep):
    def forward(self, x: Tensor) -> Tensor:
        spk, mem = self.lif1(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(self.lif2(self.fc2(spk), mem)[0])
        return logits


class TakesOneImage(StepByStep):
    def __init__(self) -> None:
        super().__init__(init_hidden=True)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc3(self.lif2(self.fc2(self.lif1(self.fc1(x.flatten(1)))[0])))
        return logits


class Mixed(StepByStep):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc3(torch.relu(self.fc2(self.lif1(self.fc1(x.flatten(1)))[0])))
        return logits


@pytest.mark.parametrize(
    ("module", "actual", "remedy"),
    [
        (MembraneOut, "membrane", "pass on the spikes"),
        (StatesIn, "second input", "init_leaky"),
        (StartsElsewhere, "state", "init_leaky"),
        (StateOfAnother, "membrane", "pass on the spikes"),
        (TakesOneImage, "getitem", "supported"),
        (Mixed, "relu", "snntorch.Leaky"),
    ],
)
def test_other_uses_of_states_are_refused(module: type[StepByStep], actual: str, remedy: str) -> None:
    assert any(actual in row.actual and remedy in row.remedy for row in refused(module()))
