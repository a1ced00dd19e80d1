from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardware.errors import RuleViolations, SpikeguardError, Violation
from pipeline.models.layers import Add, Normalize, Scale
from pipeline.models.spiking import RateNetwork, rebuild
from pipeline.models.tracing import TracedNetwork, trace_network

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


def traced_and_equal(module: nn.Module, shape: tuple[int, ...] = SHAPE) -> TracedNetwork:
    """The graph, known to give the module's logits."""
    traced = trace_network(module, shape)
    network = rebuild(traced, 1)
    assert isinstance(network, RateNetwork)
    images = torch.rand(5, *shape)
    with torch.no_grad():
        expected = module.eval()(images)
        torch.testing.assert_close(network.eval()(images), expected, rtol=1e-6, atol=1e-6)
    assert float(expected.std()) > 0
    return traced


@pytest.mark.parametrize("style", [WrittenWithModules, WrittenWithFunctions, WrittenWithMethods])
def test_a_network_of_ones_own_gives_the_same_logits_as_a_graph(style: type[nn.Module]) -> None:
    module = shaken(style())
    traced = traced_and_equal(module)
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


Forward = Callable[[Tensor], Tensor]


class Pooled(nn.Module):
    """A conv and neurons, then features of one row per image in one of many ways, then logits."""

    def __init__(self, features: Forward, count: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.features = features
        self.head = nn.Linear(count, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(torch.relu(self.conv(x))))
        return logits


def unpacked(x: Tensor) -> Tensor:
    samples, _, _, _ = x.shape
    return x.reshape(samples, -1)


@pytest.mark.parametrize(
    ("features", "kinds"),
    [
        (lambda x: x.view(x.size(0), -1), ["flatten"]),
        (lambda x: x.view(x.size(dim=0), -1), ["flatten"]),
        (lambda x: x.view((x.shape[0], -1)), ["flatten"]),
        (lambda x: x.view(x.size()[0], 256), ["flatten"]),
        (lambda x: x.view(-1, 256), ["flatten"]),
        (lambda x: x.reshape(x.shape[0], -1), ["flatten"]),
        (lambda x: torch.reshape(x, (x.size(0), -1)), ["flatten"]),
        (unpacked, ["flatten"]),
        (lambda x: x.flatten(1), ["flatten"]),
        (lambda x: torch.flatten(input=x, start_dim=1), ["flatten"]),
        (nn.Flatten(), ["flatten"]),
        (lambda x: x.mean((2, 3)), ["avg_pool", "flatten"]),
        (lambda x: x.mean(dim=[-1, -2]), ["avg_pool", "flatten"]),
        (lambda x: torch.mean(x, (3, 2), keepdim=True).flatten(1), ["avg_pool", "flatten"]),
        (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), ["avg_pool", "flatten"]),
        (lambda x: F.adaptive_avg_pool2d(x, (2, 2)).flatten(1), ["avg_pool", "flatten"]),
        (lambda x: F.avg_pool2d(x, kernel_size=4).flatten(1), ["avg_pool", "flatten"]),
        (nn.Sequential(nn.AdaptiveAvgPool2d((4, 4)), nn.Flatten()), ["avg_pool", "flatten"]),
        (nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten()), ["avg_pool", "flatten"]),
        (nn.Sequential(nn.Identity(), nn.AvgPool2d(4, stride=4), nn.Flatten()), ["dropout", "avg_pool", "flatten"]),
    ],
)
def test_the_usual_ways_to_pool_and_flatten_are_read(features: Forward, kinds: list[str]) -> None:
    count = features(torch.zeros(1, 4, 8, 8)).shape[1]
    graph = traced_and_equal(shaken(Pooled(features, count))).graph
    assert [layer.kind for layer in graph.layers[2:-1]] == kinds


class Summed(nn.Module):
    """Neurons, then a sum in one of many ways, then neurons and logits."""

    def __init__(self, combine: Callable[[Summed, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1)
        self.a, self.b = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor([1.7]))
        self.c: Tensor
        self.register_buffer("c", torch.tensor(0.4))
        self.add, self.scale = Add(), Scale(0.9, learned=True)
        self.combine = combine
        self.head = nn.Linear(3 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.combine(self, x, self.conv2(x)))
        logits: Tensor = self.head(x.flatten(1))
        return logits


def in_place(module: Summed, x: Tensor, y: Tensor) -> Tensor:
    y *= module.a
    y += x
    return y


@pytest.mark.parametrize(
    ("combine", "learned"),
    [
        (lambda m, x, y: m.a * x + m.b * y, [True, True]),
        (lambda m, x, y: x * m.a + y, [True]),
        (lambda m, x, y: torch.mul(x, 0.5) + torch.mul(m.c, y), [False, False]),
        (lambda m, x, y: x / 3 + y.div(m.c), [False, False]),
        (lambda m, x, y: x.mul(-1).add(2 * y), [False, False]),  # noqa: ARG005
        (lambda m, x, y: torch.add(x, y), []),  # noqa: ARG005
        (lambda m, x, y: m.add(m.scale(x), y), [True]),
        (lambda m, x, y: x + y + 0.5 * x, [False]),  # noqa: ARG005
        (in_place, [True]),
    ],
)
def test_the_usual_ways_to_add_and_scale_are_read(
    combine: Callable[[Summed, Tensor, Tensor], Tensor], learned: list[bool]
) -> None:
    graph = traced_and_equal(Summed(combine)).graph
    assert [layer.options["learned"] for layer in graph.layers if layer.kind == "scale"] == learned
    assert sum(layer.kind == "add" for layer in graph.layers) >= 1


class Remembers(WrittenWithModules):
    """Its forward leaves things behind."""

    def forward(self, x: Tensor) -> Tensor:
        self.last_input = x
        self.normalize.mean = self.normalize.mean.clone()
        self.constant = torch.tensor(2.0)
        return super().forward(x) * self.constant


def test_tracing_changes_nothing_in_the_callers_module() -> None:
    module = Remembers()
    attributes = {name: set(vars(part)) for name, part in module.named_modules()}
    before = {key: (value, value.clone()) for key, value in module.state_dict(keep_vars=True).items()}
    trace_network(module, SHAPE)
    assert module.training
    assert {name: set(vars(part)) for name, part in module.named_modules()} == attributes
    for key, value in module.state_dict(keep_vars=True).items():
        assert value is before[key][0]
        assert torch.equal(value, before[key][1])


def test_a_block_is_the_module_that_holds_a_sum_and_its_neurons() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())
            self.body = nn.Sequential(Inner(), nn.ReLU(), Inner())
            self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(192, 3))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.body(self.stem(x)))
            return logits

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
            self.add = Add()

        def forward(self, x: Tensor) -> Tensor:
            total: Tensor = self.add(x, self.branch(x))
            return total

    blocks = {layer.path: layer.block for layer in trace_network(Outer(), SHAPE).graph.layers}
    assert blocks["body.0.branch.1"] == blocks["body.0.add"] == "body.0"
    assert blocks["body.2.branch.0"] == "body.2"
    assert blocks["stem.1"] == blocks["body.1"] == blocks["head.0"] == ""


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
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.AvgPool2d(2)
        self.twice = nn.Conv2d(4, 4, 1)
        self.norm = nn.LayerNorm([4, 2, 2])
        self.factors = nn.Parameter(torch.ones(4, 1, 1))
        self.a = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.grouped(self.stem(x)))
        x = self.act(self.pool(self.conv2(self.conv1(x))))
        x = self.act(self.twice(x))
        x = self.act(self.twice(x))
        x = torch.cat([x, self.norm(x)], 1)
        x = F.gelu(x * x + self.factors * x - 1)
        x = self.a * x + self.a * x
        logits: Tensor = self.head(x.permute(0, 2, 3, 1).flatten(1))
        return F.softmax(logits, 1)


def test_everything_that_cannot_be_deployed_is_told_at_once_with_its_place() -> None:
    told = [(row.object, row.actual, row.remedy) for row in refused(ManyProblems())]
    expected = [
        ("stem.1", "Sigmoid", "nn.ReLU"),
        ("stem.2", "MaxPool2d", "AvgPool2d"),
        ("grouped", "grouped", "nn.Conv2d"),
        ("twice", "again", "layer of its own"),
        ("norm", "LayerNorm", "BatchNorm2d"),
        ("cat", "cat", "sum"),
        ("mul", "product of two activities", "learned scalar"),
        ("mul", "factor per feature", "batch norm"),
        ("sub", "sub", "-1"),
        ("gelu", "gelu", "nn.ReLU"),
        ("mul", "used again", "of its own"),
        ("permute", "permute", "flatten"),
        ("softmax", "softmax", "logits"),
        ("conv2", "after conv", "nn.ReLU"),
        ("pool", "after conv", "after the ReLU"),
    ]
    assert [place for place, _, _ in told] == [place for place, _, _ in expected]
    for (_, actual, remedy), (_, operation, way_out) in zip(told, expected, strict=True):
        assert operation in actual
        assert way_out in remedy


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
        nn.AdaptiveAvgPool2d(3),
        nn.AdaptiveAvgPool2d((4, 8)),
        nn.AdaptiveMaxPool2d(1),
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
        nn.BatchNorm2d(4, momentum=None),
        nn.Dropout2d(0.1),
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
    """A network whose forward does something odd with neurons ``(4, 8, 8)``."""

    def __init__(self, oddity: Callable[[Odd, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.bias = nn.Parameter(torch.ones(4, 1, 1))
        self.a = nn.Parameter(torch.tensor(0.5))
        self.drop, self.relu = nn.Dropout(0.5), nn.ReLU(inplace=True)
        self.oddity = oddity
        self.head = nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.flatten(self.oddity(self, torch.relu(self.conv(x))), 1))
        return logits


@pytest.mark.parametrize(
    ("oddity", "operation", "remedy"),
    [
        (lambda m, x: x + m.bias, "constant", "biases"),
        (lambda m, x: x + 1, "constant", "biases"),  # noqa: ARG005
        (lambda m, x: torch.add(x, x, alpha=2), "factor", "biases"),  # noqa: ARG005
        (lambda m, x: x * m.bias, "per feature", "batch norm"),
        (lambda m, x: torch.mul(x, other=x), "product", "sum"),  # noqa: ARG005
        (lambda m, x: x / m.a, "division", "inverse"),
        (lambda m, x: x / 0, "division", "inverse"),  # noqa: ARG005
        (lambda m, x: 1 / x, "product", "sum"),  # noqa: ARG005
        (lambda m, x: x * x.size(1), "sizes", "flatten"),  # noqa: ARG005
        (lambda m, x: -x, "neg", "-1"),  # noqa: ARG005
        (lambda m, x: x**2, "pow", "supported"),  # noqa: ARG005
        (lambda m, x: x.view(x.size(0), 2, -1), "reshape", "flatten"),  # noqa: ARG005
        (lambda m, x: x.view(x.size(0), x.size(1) * 64), "sizes", "flatten"),  # noqa: ARG005
        (lambda m, x: x.view(x.size(1), -1), "reshape", "flatten"),  # noqa: ARG005
        (lambda m, x: x.view(-1, 128), "reshape", "flatten"),  # noqa: ARG005
        (lambda m, x: x.flatten(2), "flatten(2, -1)", "batch"),  # noqa: ARG005
        (lambda m, x: x.mean(1), "mean", "AdaptiveAvgPool2d"),  # noqa: ARG005
        (lambda m, x: x.mean((2, 3), dtype=torch.float64), "arguments", "torch.nn"),  # noqa: ARG005
        (lambda m, x: x.mean(), "mean", "AdaptiveAvgPool2d"),  # noqa: ARG005
        (lambda m, x: F.avg_pool2d(x, 2, 1), "overlapping", "AvgPool2d"),  # noqa: ARG005
        (lambda m, x: F.avg_pool2d(x, 1, divisor_override=2), "divisor", "divisor_override"),  # noqa: ARG005
        (lambda m, x: F.adaptive_avg_pool2d(x, 3), "adaptive", "square"),  # noqa: ARG005
        (lambda m, x: x[:, :2], "getitem", "supported"),  # noqa: ARG005
        (lambda m, x: m.conv(x[:, :2]), "again", "its own"),
        (lambda m, x: torch.maximum(x, 0.5 * x), "maximum", "supported"),  # noqa: ARG005
    ],
)
def test_odd_operations_are_refused(oddity: Callable[[Odd, Tensor], Tensor], operation: str, remedy: str) -> None:
    rows = refused(Odd(oddity))
    assert any(operation in row.actual and remedy in row.remedy for row in rows)
    assert all(row.remedy for row in rows)


def changed_by_a_product(module: Odd, x: Tensor) -> Tensor:  # noqa: ARG001
    y = x
    y *= 0.5
    return torch.relu(x + y)


def changed_by_a_neuron(module: Odd, x: Tensor) -> Tensor:
    current = module.conv2(x)
    return torch.relu(F.relu(current, inplace=True) + -1 * current)


def changed_by_a_module(module: Odd, x: Tensor) -> Tensor:
    current = module.conv2(x)
    return torch.relu(module.relu(current) + -1 * current)


def always_dropped(module: Odd, x: Tensor) -> Tensor:  # noqa: ARG001
    return F.dropout(x, 0.5)


def test_what_a_trace_does_not_show_is_found_by_running_the_module() -> None:
    for oddity in (changed_by_a_product, changed_by_a_neuron, changed_by_a_module, always_dropped):
        with pytest.raises(SpikeguardError, match="other logits"):
            trace_network(Odd(oddity), SHAPE)
    traced_and_equal(Odd(lambda m, x: F.relu(m.conv2(x), inplace=True)))
    traced_and_equal(Odd(lambda m, x: F.dropout(x, 0.5, m.training)))


class Fails(Odd):
    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:
            raise ValueError("no images today")
        return super().forward(x)


def test_a_module_that_cannot_run_is_one_sentence() -> None:
    with pytest.raises(SpikeguardError, match="no images today"):
        trace_network(Fails(lambda _, x: x), SHAPE)


def test_layers_without_parameters_may_be_used_again() -> None:
    traced_and_equal(Odd(lambda m, x: m.drop(m.drop(x))))


def logits_of(module: Odd, x: Tensor) -> Tensor:
    return Odd.forward(module, x)


class Pair(Odd):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = logits_of(self, x)
        return logits, logits


class TwoInputs(Odd):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return logits_of(self, x + y)


class EarlierOutput(Odd):
    def forward(self, x: Tensor) -> Tensor:
        logits = logits_of(self, x)
        _ = 2 * logits
        return logits


@pytest.mark.parametrize("module", [Pair, TwoInputs, EarlierOutput])
def test_one_tensor_goes_in_and_the_logits_come_out(module: type[Odd]) -> None:
    assert refused(module(lambda _, x: x))


class Branching(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self, x) if x.sum() > 0 else logits_of(self, -x)


def test_control_flow_on_values_is_one_sentence() -> None:
    with pytest.raises(SpikeguardError, match="Branching cannot be traced"):
        trace_network(Branching(lambda _, x: x), SHAPE)


def test_wrong_shapes_name_the_layer() -> None:
    (row,) = refused(WrittenWithModules(), (1, 8, 8))
    assert "shape" in row.rule
    assert "(1, 8, 8)" in row.actual
    (row,) = refused(WrittenWithModules(), (2, 16, 16))
    assert row.object == "head"
    assert "(45,)" in row.actual
