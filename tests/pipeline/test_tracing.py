from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardware.errors import RuleViolations, SpikeguardError, Violation
from pipeline.models.layers import Normalize
from pipeline.models.spiking import RateNetwork
from pipeline.models.tracing import trace_network

SHAPE = (2, 8, 8)


class WrittenWithModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize([0.4, 0.6], [0.3, 0.5])
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.pool = nn.AvgPool2d(2)
        self.conv = nn.Conv2d(4, 5, 3, stride=2)
        self.norm = nn.BatchNorm2d(5, eps=1e-3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.body(self.normalize(x)))
        x = torch.relu(self.norm(self.conv(x)))
        logits: Tensor = self.head(self.drop(x.flatten(1)))
        return logits


class WrittenWithFunctions(WrittenWithModules):
    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.relu(self.body[1](self.body[0](self.normalize(x)))), 2)
        x = F.relu(self.norm(self.conv(x)), inplace=False)
        x = F.dropout(torch.flatten(x, 1), 0.5, self.training)
        logits: Tensor = self.head(x)
        return logits


class WrittenWithMethods(WrittenWithModules):
    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.body(self.normalize(x)), kernel_size=(2, 2), stride=2)
        logits: Tensor = self.head(self.norm(self.conv(x)).relu().flatten(start_dim=1))
        return logits


def shaken(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.add_(0.2 * torch.rand(value.shape))
    return module


@pytest.mark.parametrize("style", [WrittenWithModules, WrittenWithFunctions, WrittenWithMethods])
def test_a_network_of_ones_own_gives_the_same_logits_as_a_graph(style: type[nn.Module]) -> None:
    module = shaken(style())
    traced = trace_network(module, SHAPE)
    network = RateNetwork(traced.graph)
    for name, holder in traced.modules.items():
        network.layers[name].load_state_dict(holder.state_dict())
    images = torch.rand(5, *SHAPE)
    with torch.no_grad():
        assert torch.equal(network.eval()(images), module.eval()(images))
    kinds = [layer.kind for layer in traced.graph.layers if layer.kind != "dropout"]
    assert kinds == [
        "normalize",
        "conv",
        "batch_norm",
        "relu",
        "avg_pool",
        "conv",
        "batch_norm",
        "relu",
        "flatten",
        "linear",
    ]


def test_tracing_changes_nothing_in_the_callers_module() -> None:
    module = WrittenWithModules()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trace_network(module, SHAPE)
    assert module.training
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def refused(module: nn.Module, shape: tuple[int, ...] = SHAPE) -> tuple[Violation, ...]:
    with pytest.raises(RuleViolations) as caught:
        trace_network(module, shape)
    return caught.value.violations


class ManyProblems(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Sigmoid(), nn.MaxPool2d(2))
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.act = nn.ReLU()
        self.second_pool = nn.MaxPool2d(2)
        self.shortcut = nn.Conv2d(4, 4, 1)
        self.norm = nn.GroupNorm(2, 4)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second_pool(self.act(self.grouped(self.stem(x))))
        x = self.norm(x + self.shortcut(x))
        logits: Tensor = self.head(torch.flatten(self.average(F.gelu(x)), 1))
        return F.softmax(logits, 1)


def test_everything_that_cannot_be_deployed_is_told_at_once_with_its_place() -> None:
    rows = {row.object: row for row in refused(ManyProblems())}
    told = {"stem.1", "stem.2", "grouped", "second_pool", "norm", "average"}
    assert told <= set(rows)
    assert len(rows) == len(refused(ManyProblems())) == len(told) + 3  # and the sum, gelu, softmax
    assert rows["stem.2"].actual == rows["second_pool"].actual == "MaxPool2d"
    assert "AvgPool2d" in rows["stem.2"].remedy
    assert "grouped" in rows["grouped"].actual
    assert any("residual" in row.actual for row in rows.values())
    assert any("softmax" in row.remedy for row in rows.values())


def test_supported_layers_beside_refused_ones_are_not_blamed() -> None:
    module = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3, 2)
    )
    assert [row.object for row in refused(module)] == ["2"]


def behind(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), layer, nn.Flatten(), nn.Linear(256, 3))


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(1),
        nn.AdaptiveAvgPool2d(8),
        nn.AvgPool2d(3, stride=1, padding=1),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d((2, 1)),
        nn.AvgPool2d(2, divisor_override=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 4, 1),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.InstanceNorm2d(4),
        nn.LeakyReLU(),
        nn.ReLU6(),
        nn.GELU(),
        nn.Tanh(),
        nn.Upsample(scale_factor=1),
        nn.Flatten(2),
    ],
    ids=str,
)
def test_a_layer_that_cannot_be_deployed_is_refused(layer: nn.Module) -> None:
    (row,) = refused(behind(layer))
    assert row.object == "2"
    assert row.remedy


class Odd(nn.Module):
    """A network whose forward ends in something odd."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(128, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def logits(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.flatten(x, 1))
        return result


class Scaled(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x) * self.scale


class Pair(Odd):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)
        return logits, logits


class TwoInputs(Odd):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.logits(x) + self.logits(y)


class Reshaped(Odd):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.view(x.size(0), -1))
        return logits


class OverridenDivisor(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return self.logits(F.avg_pool2d(F.relu(x), 1, divisor_override=2))


@pytest.mark.parametrize("module", [Scaled, Pair, TwoInputs, Reshaped, OverridenDivisor])
def test_an_odd_forward_is_refused_in_a_table(module: type[nn.Module]) -> None:
    assert refused(module())


def test_reshaping_by_hand_is_answered_with_flatten() -> None:
    assert any("flatten" in row.remedy for row in refused(Reshaped()))


class Branching(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x) if x.sum() > 0 else self.logits(-x)


def test_control_flow_on_values_is_one_sentence() -> None:
    with pytest.raises(SpikeguardError, match="Branching cannot be traced"):
        trace_network(Branching(), SHAPE)


def test_wrong_shapes_name_the_layer() -> None:
    (row,) = refused(WrittenWithModules(), (1, 8, 8))
    assert "shape" in row.rule
    assert "(1, 8, 8)" in row.actual
    (row,) = refused(WrittenWithModules(), (2, 16, 16))
    assert row.object == "head"
    assert "(45,)" in row.actual
