from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hardware.errors import RuleViolations, SpikeguardError
from hardware.surrogates import RATE, TRIANGLE
from pipeline.conversion import calibrate, convert
from pipeline.data import load_digits
from pipeline.models.folded import FoldedNetwork
from pipeline.models.layers import Normalize
from pipeline.models.spiking import RateNetwork, SpikingNetwork, rebuild
from pipeline.models.tracing import TracedNetwork, trace_network
from pipeline.models.zoo import NETWORKS, NORMALIZATIONS, build
from pipeline.models.zoo.wide_resnet import WideResNet

CLASSES = 3
# Small images where the network allows them, and so few channels that every network runs in a moment.
SIDES = {name: 8 if entry.any_multiple else entry.side for name, entry in NETWORKS.items()}
WIDTHS = {
    "digits-cnn": 0.25,
    "vgg11-tiny": 1 / 16,
    "cnn-28": 0.2,
    "wrn-16-4": 0.05,
    "wrn-28-4": 0.05,
    "resnet-20": 0.2,
    "resnet-32": 0.2,
}
SMALLEST = 1 / 64


def small(name: str, channels: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return build(name, "made up", CLASSES, WIDTHS.get(name, SMALLEST), (channels, SIDES[name], SIDES[name]))


def traced(name: str) -> TracedNetwork:
    return trace_network(small(name), (2, SIDES[name], SIDES[name]))


def images(name: str, samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (samples, 2, SIDES[name], SIDES[name]), generator=generator) / 255


def spiking(name: str, steps: int = 3) -> SpikingNetwork:
    rate = rebuild(traced(name), 1)
    assert isinstance(rate, RateNetwork)
    network = convert(rate, steps)
    batches = [images(name, 6, seed) for seed in (1, 2)]
    calibrate(network, batches, percentile=99.7, calibration_steps=6, scale=0.3, second_batches=[images(name, 6, 3)])
    return network


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_paper(name: str, classes: int, channels: int, side: int) -> nn.Module:
    """At full width, without memory for it."""
    with torch.device("meta"):
        return build(name, "made up", classes, 1, (channels, side, side))


# What others count, less the classifier's bias, which they have and we do not, and two factors for each block more.
VGG16_CONVOLUTIONS = 14_714_688 - 4_224  # with their biases, in the original
RESNET_SHORTCUTS = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64  # where others pad with zeros
WRN_28_10, WRN_16_4 = 36_479_194, 2_748_890
RESNET_20, RESNET_32 = 269_722, 464_154


@pytest.mark.parametrize(
    ("name", "classes", "channels", "side", "expected"),
    [
        ("digits-cnn", 10, 1, 8, 9 * 16 + 32 + 9 * 16 * 32 + 64 + 128 * 64 + 64 * 10),
        ("cnn-28", 10, 1, 28, 9 * 16 + 32 + 9 * 16 * 32 + 64 + 9 * 32 * 32 + 64 + 7 * 7 * 32 * 10),
        ("vgg16", 10, 3, 32, VGG16_CONVOLUTIONS + 2 * 4224 + 512 * 4096 + 4096 * 4096 + 4096 * 10),
        (
            "vgg11",
            100,
            3,
            32,
            9 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 4 * 512 * 512)
            + 2 * (64 + 128 + 256 + 5 * 512)
            + 8192 * 4096
            + 4096 * 4096
            + 4096 * 100,
        ),
        (
            "vgg11-tiny",
            200,
            3,
            64,
            9 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 4 * 512 * 512)
            + 2 * (64 + 128 + 256 + 5 * 512)
            + 512 * 4096
            + 4096 * 200,
        ),
        ("wrn-16-4", 10, 3, 32, WRN_16_4 - 10 + 2 * 6),
        ("resnet-20", 10, 3, 32, RESNET_20 - 10 + 2 * 9 + RESNET_SHORTCUTS),
        ("resnet-32", 10, 3, 32, RESNET_32 - 10 + 2 * 15 + RESNET_SHORTCUTS),
    ],
)
def test_networks_are_as_large_as_published(name: str, classes: int, channels: int, side: int, expected: int) -> None:
    assert parameters(on_paper(name, classes, channels, side)) == expected


def test_wide_networks_of_28_layers_are_as_large_as_published() -> None:
    with torch.device("meta"):
        widest = WideResNet(Normalize([0.5] * 3, [0.5] * 3), 10, depth=28, widening=10, width=1)
    assert parameters(widest) == WRN_28_10 - 10 + 2 * 12
    assert 5.8e6 < parameters(on_paper("wrn-28-4", 10, 3, 32)) < 5.9e6


@pytest.mark.parametrize(
    ("name", "sides", "dropouts"),
    [
        ("digits-cnn", {8: 1, 4: 1, 0: 1}, 0),
        ("cnn-28", {28: 1, 14: 1, 7: 1}, 0),
        ("vgg11", {32: 1, 16: 2, 8: 3, 4: 2, 0: 2}, 2),
        ("vgg16", {32: 2, 16: 2, 8: 3, 4: 3, 2: 3, 0: 2}, 2),
        ("vgg11-tiny", {8: 1, 4: 2, 2: 3, 1: 2, 0: 1}, 1),
        # The first activation of a block comes before its stride.
        ("wrn-16-4", {8: 5, 4: 4, 2: 4}, 0),
        ("wrn-28-4", {8: 9, 4: 8, 2: 8}, 0),
        ("resnet-20", {8: 7, 4: 6, 2: 6}, 0),
        ("resnet-32", {8: 11, 4: 10, 2: 10}, 0),
    ],
)
def test_images_shrink_where_they_should(name: str, sides: dict[int, int], dropouts: int) -> None:
    """How many layers of neurons there are at each size of the image; 0 stands for features."""
    graph = traced(name).graph
    shapes = [shape for layer, shape in graph.shapes().items() if graph.by_name[layer].kind == "relu"]
    found = [shape[1] if len(shape) == 3 else 0 for shape in shapes]
    assert found == [side for side, count in sides.items() for _ in range(count)]
    assert [layer.options["p"] for layer in graph.layers if layer.kind == "dropout"] == [0.2] * dropouts


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_no_biases_and_start_halfway_between_shortcut_and_branch(name: str) -> None:
    module = small(name)
    layers = [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    assert all(layer.bias is None for layer in layers)
    factors = {value.item() for key, value in module.named_parameters() if key.endswith((".a", ".b"))}
    assert factors == ({0.5} if name.startswith(("wrn", "resnet")) else set())
    assert not any(isinstance(part, nn.MaxPool2d) for part in module.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_only_the_smallest_width_is_left_of_a_vanishing_one(name: str) -> None:
    module = build(name, "made up", 2, 1e-9, (1, SIDES[name], SIDES[name]))
    assert {part.out_channels for part in module.modules() if isinstance(part, nn.Conv2d)} == {1}
    assert module(torch.zeros(2, 1, SIDES[name], SIDES[name])).shape == (2, 2)


def test_width_is_a_factor_on_every_hidden_size() -> None:
    full, half = (
        [part for part in build("vgg11", "made up", 10, width, (3, 32, 32)).modules() if isinstance(part, nn.Conv2d)]
        for width in (1, 0.5)
    )
    assert [layer.out_channels for layer in full] == [64, 128, 256, 512, 512, 512, 512, 512]
    assert [layer.out_channels for layer in half] == [32, 64, 128, 256, 256, 256, 256, 256]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_graphs_compute_what_the_modules_compute(name: str, training: bool) -> None:
    module = small(name).train(training)
    rebuilt = rebuild(trace_network(module, (2, SIDES[name], SIDES[name])), 1).train(training)
    answers, gradients = [], []
    for network in (module.double(), rebuilt.double()):
        torch.manual_seed(1)  # of dropout
        x = images(name, 5).double().requires_grad_()
        logits = network(x)
        answers.append(logits.detach())
        gradients.append(torch.autograd.grad(logits[:, 0].sum(), x)[0])
    assert answers[0].shape == (5, CLASSES)
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
    assert float(gradients[0].abs().sum()) > 0
    assert parameters(rebuilt) == parameters(module)


@pytest.mark.parametrize("name", NETWORKS)
def test_batch_norm_learns_the_same_statistics_in_the_graph(name: str) -> None:
    module = small(name)
    rebuilt = rebuild(trace_network(module, (2, SIDES[name], SIDES[name])), 1).train()
    for network in (module.double(), rebuilt.double()):
        torch.manual_seed(1)
        network(images(name, 5).double())
    means = [
        [part.running_mean for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
        for network in (module, rebuilt)
    ]
    assert len(means[0]) == len(means[1]) > 0
    for ours, theirs in zip(sorted_by_size(means[1]), sorted_by_size(means[0]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def sorted_by_size(means: list[Tensor | None]) -> list[Tensor]:
    """Shortcuts come at another place in a graph than among a module's parts."""
    return sorted((mean for mean in means if mean is not None), key=lambda mean: (len(mean), float(mean[0])))


@pytest.mark.parametrize(("name", "blocks"), [("wrn-16-4", 6), ("wrn-28-4", 12), ("resnet-20", 9), ("resnet-32", 15)])
def test_both_neurons_of_a_residual_block_are_known_to_belong_to_it(name: str, blocks: int) -> None:
    neurons = [layer for layer in traced(name).graph.layers if layer.kind == "relu"]
    inside = [layer.block for layer in neurons if layer.block]
    assert inside == [f"blocks.{index}" for index in range(blocks) for _ in range(2)]
    assert len(neurons) == 2 * blocks + 1  # after the stem, or before the classifier
    assert not (neurons[-1] if name.startswith("wrn") else neurons[0]).block


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_convert_and_fold_without_a_difference(name: str) -> None:
    network = spiking(name).double().eval()
    x = images(name, 4, seed=5).double().requires_grad_()
    logits, activity = network.record(x)
    assert all(0 < float(layer.spikes.double().mean()) < 1 for layer in activity.values())
    folded = FoldedNetwork(network)
    torch.testing.assert_close(folded(x), logits, rtol=1e-12, atol=1e-12)
    plain, fast = (torch.autograd.grad(run(x, TRIANGLE)[:, 0].sum(), x)[0] for run in (network, folded))
    assert float(plain.abs().sum()) > 0
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)
    rates = torch.autograd.grad(folded(x, RATE)[:, 0].sum(), x)[0]
    assert float(rates.abs().sum()) > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_converted_networks_learn_with_all_their_parameters(name: str) -> None:
    network = spiking(name).train()
    torch.manual_seed(2)
    network(images(name, 6))[:, 0].sum().backward()
    gradients = {key: value.grad for key, value in network.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    biases = [key for key in gradients if key.endswith("bias") and "batch_norm" not in key]
    weighted = [layer for layer in network.graph.layers if layer.kind in ("conv", "linear")]
    assert len(biases) == (1 if name.startswith(("wrn", "resnet")) else len(weighted))


@pytest.mark.parametrize("data", NORMALIZATIONS)
def test_a_data_sets_own_mean_and_deviation_come_first(data: str) -> None:
    mean, std = NORMALIZATIONS[data]
    channels = len(mean)
    first = next(module for module in build_for(data, channels).modules() if isinstance(module, Normalize))
    torch.testing.assert_close(first.mean, torch.tensor(mean))
    torch.testing.assert_close(first.std, torch.tensor(std))
    normal = first(torch.tensor(mean).reshape(1, channels, 1, 1))
    assert float(normal.abs().max()) < 1e-6


def build_for(data: str, channels: int) -> nn.Module:
    return build("resnet-20", data, 10, 0.1, (channels, 8, 8))


def test_unknown_data_are_taken_to_lie_around_a_half() -> None:
    first = next(module for module in build_for("my own", 4).modules() if isinstance(module, Normalize))
    assert (first.mean.tolist(), first.std.tolist()) == ([0.5] * 4, [0.25] * 4)


def test_the_digits_are_normalised_with_what_they_measure() -> None:
    pixels = load_digits().codes / 255
    (mean,), (std,) = NORMALIZATIONS["digits"]
    assert float(pixels.mean()) == pytest.approx(mean, abs=0.005)
    assert float(pixels.std()) == pytest.approx(std, abs=0.005)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(SpikeguardError, match="resnet-20"):
        build("resnet-18", "cifar10", 10, 1, (3, 32, 32))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("digits-cnn", (1, 28, 28)),
        ("cnn-28", (1, 32, 32)),
        ("vgg11", (3, 64, 64)),
        ("vgg16", (3, 28, 28)),
        ("vgg11-tiny", (3, 60, 60)),
        ("wrn-28-4", (3, 30, 30)),
        ("resnet-20", (3, 32, 28)),
        ("resnet-20", (0, 32, 32)),
        ("resnet-20", (3, 0, 0)),
        ("resnet-20", (64,)),
    ],
)
def test_images_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuleViolations) as caught:
        build(name, "my own", 10, 1, shape)
    (row,) = caught.value.violations
    assert row.rule == "fit the network"
    assert row.actual == str(shape)
    assert str(NETWORKS[name].side) in row.limit


def test_a_network_for_such_images_is_named() -> None:
    with pytest.raises(RuleViolations, match="cnn-28"):
        build("digits-cnn", "mnist", 10, 1, (1, 28, 28))


def test_everything_that_does_not_fit_is_told_at_once() -> None:
    with pytest.raises(RuleViolations) as caught:
        build("vgg11", "mnist", 0, -1.0, (3, 28, 28))
    assert [row.object for row in caught.value.violations] == ["images", "classes", "width", "images"]
    assert "mnist" in caught.value.violations[-1].rule


@pytest.mark.parametrize("width", [0.0, float("nan"), float("inf"), 1e9])
def test_widths_that_cannot_be_are_refused(width: float) -> None:
    with pytest.raises(RuleViolations, match="width"):
        build("cnn-28", "mnist", 10, width, (1, 28, 28))
