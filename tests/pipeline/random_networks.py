"""SNNs in which no parameter is trivially 0 or 1 and every layer spikes: the zoo's, and graphs drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.conversion import convert
from pipeline.models.graph import Layer, LayerGraph, LayerKind, Options, Shape, output_shape
from pipeline.models.spiking import RateNetwork, SpikingNetwork, rebuild
from pipeline.models.tracing import trace_network
from pipeline.models.zoo import NETWORKS, build
from pipeline.neurons import Leaky

Rng = np.random.Generator
CLASSES, CHANNELS = 3, 2
SIDES = {name: 8 if name == "vgg11-tiny" else entry.side for name, entry in NETWORKS.items()}
WIDTHS = {"digits-cnn": 0.25, "cnn-28": 0.2, "vgg11-tiny": 1 / 32, "resnet-20": 0.2, "resnet-32": 0.2}
SMALLEST = 1 / 32


def zoo_network(
    name: str, seed: int = 0, steps: int = 4, *, beta: float = 1.0, subtract: bool = False
) -> SpikingNetwork:
    """A network of the zoo, few channels wide, converted, in eval mode, and with every parameter drawn at random."""
    torch.manual_seed(seed)
    shape = (CHANNELS, SIDES[name], SIDES[name])
    rate = rebuild(trace_network(build(name, "made up", CLASSES, WIDTHS.get(name, SMALLEST), shape), shape), 1)
    assert isinstance(rate, RateNetwork)
    return settled(convert(rate, steps, beta=beta, subtract=subtract))


@torch.no_grad()
def settled(network: SpikingNetwork) -> SpikingNetwork:
    """The network in eval mode, its parameters but for the weights drawn anew, in place.

    Layer by layer, batch norm's statistics are set near those of its input and thresholds near a percentile of
    theirs: near, because statistics that fit would leave nothing to fold.
    """
    for key, value in network.eval().named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(value, std=0.2)

    def settle(layer: Layer, read: Sequence[Tensor]) -> Tensor:
        module = network.layers[layer.name]
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            var, mean = torch.var_mean(read[0].flatten(0, 1).transpose(0, 1).flatten(1), 1, correction=0)
            # Floored, lest a channel that is nearly constant on these images be all that later ones hear.
            module.running_var.copy_((var + 0.01) * _uniform(var, 0.6, 1.6))
            module.running_mean.copy_(mean + 0.2 * var.sqrt() * torch.randn(var.shape))
            nn.init.uniform_(module.weight, 0.5, 1.5)
        elif isinstance(module, Leaky):
            threshold = torch.quantile(read[0].flatten()[: 2**20], 0.9) * _uniform(module.threshold, 0.7, 1.3)
            module.threshold.copy_(threshold.clamp(min=0.05))
        elif layer.kind == "scale":
            nn.init.uniform_(module.value, 0.4, 0.9)  # type: ignore[arg-type]
        return network.advance(layer.name, read)

    shape = network.graph.input_shape
    network.graph.evaluate(torch.randint(0, 256, (1, 8, *shape)) / 255, settle)
    return network


def _uniform(like: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(like.shape)


@st.composite
def spiking_networks(draw: st.DrawFn) -> SpikingNetwork:
    """Small SNNs on graphs drawn at random, chains and residual ones."""
    seed = draw(st.integers(0, 2**32 - 1))
    return random_network(seed, draw(st.integers(1, 4)), draw(st.sampled_from([1.0, 0.75])), draw(st.booleans()))


def random_network(seed: int, steps: int = 3, beta: float = 1.0, subtract: bool = False) -> SpikingNetwork:
    """An SNN on a graph drawn at random."""
    torch.manual_seed(seed)
    network = SpikingNetwork(_Drawing(np.random.default_rng(seed), beta, subtract).graph(), steps)
    for name, buffer in network.named_buffers():
        if name.startswith("layers.normalize"):
            buffer.copy_(_uniform(buffer, 0.2, 0.7))
    return settled(network)


class _Drawing:
    """A layer graph in the making: each method appends layers and returns the name of the last."""

    def __init__(self, rng: Rng, beta: float, subtract: bool) -> None:
        self.rng = rng
        self.neuron: Options = {"beta": beta, "subtract": subtract}
        side = int(rng.integers(3, 9))
        self.input_shape: Shape = (
            int(rng.integers(1, 4)),
            side,
            side if rng.random() < 0.5 else int(rng.integers(3, 9)),
        )
        self.shapes: dict[str, Shape] = {"input": self.input_shape}
        self.layers: list[Layer] = []

    def graph(self) -> LayerGraph:
        """Image - stem - stages - head."""
        image = "input"
        if self.rng.random() < 0.7:
            image = self.add("normalize", {"features": self.input_shape[0]}, image)
        stem = self.stem(image)
        spikes = self.summed(stem) if self.rng.random() < 0.3 else self.spike(stem)
        for _ in range(self.rng.integers(0, 4)):
            stage = self.rng.choice(["pool", "conv", "identity", "strided", "pooled", "carried", "image"])
            spikes = getattr(self, f"stage_{stage}")(spikes, image)
        self.head(spikes)
        return LayerGraph(self.input_shape, tuple(self.layers))

    def stem(self, image: str) -> str:
        """One conv of the image, or the sum of two that reach differently far."""
        if self.rng.random() < 0.3:
            return self.same(image, int(self.rng.integers(1, 5)))
        first = self.conv(image)
        if self.rng.random() < 0.3 and self.layers[-1].kind == "conv":
            stride, padding = int(self.layers[-1].options["stride"]), int(self.layers[-1].options["padding"])
            kernel = int(self.layers[-1].options["kernel_size"])
            other = self.conv(image, kernel + 2, stride, padding + 1, channels=self.shapes[first][0])
            first = self.add("add", {}, first, other)
        return self.normed(first)

    def stage_pool(self, spikes: str, _image: str) -> str:
        """Pooled spikes, where their size allows it."""
        height, width = self.shapes[spikes][1:]
        sizes = [size for size in (2, 3, 4) if height % size == 0 and width % size == 0]
        return self.add("avg_pool", {"kernel_size": int(self.rng.choice(sizes))}, spikes) if sizes else spikes

    def stage_conv(self, spikes: str, _image: str) -> str:
        """Any kernel, stride and padding."""
        return self.spike(self.normed(self.conv(spikes)))

    def stage_identity(self, spikes: str, _image: str) -> str:
        """The spikes themselves, by a factor, beside a branch of one conv or two."""
        branch = self.same(spikes, self.shapes[spikes][0])
        if self.rng.random() < 0.5:
            branch = self.same(self.spike(branch), self.shapes[spikes][0])
        return self.spike(self.add("add", {}, self.scaled(spikes), self.scaled(branch)))

    def stage_strided(self, spikes: str, _image: str) -> str:
        """A conv shortcut of the branch's stride."""
        channels, stride = int(self.rng.integers(1, 5)), int(self.rng.integers(1, 4))
        branch = self.same(self.spike(self.same(spikes, channels, stride)), channels)
        shortcut = self.normed(self.conv(spikes, 1, stride, 0, channels))
        return self.spike(self.add("add", {}, self.scaled(shortcut), self.scaled(branch)))

    def stage_pooled(self, spikes: str, _image: str) -> str:
        """Pooled spikes beside a conv that reads the same spikes at the same stride, or the pooled ones."""
        pooled = self.stage_pool(spikes, "")
        if pooled == spikes:
            return spikes
        stride = int(self.layers[-1].options["kernel_size"])
        channels = self.shapes[spikes][0]
        branch = self.same(*((pooled, channels) if self.rng.random() < 0.5 else (spikes, channels, stride)))
        return self.spike(self.add("add", {}, self.scaled(pooled), self.scaled(branch)))

    def stage_carried(self, spikes: str, _image: str) -> str:
        """Sums that never spike on their way, as where activations come before convs."""
        return self.summed(self.same(spikes, int(self.rng.integers(1, 5))))

    def summed(self, carried: str) -> str:
        """Branches added to a current one after the other."""
        for _ in range(self.rng.integers(1, 3)):
            branch = self.same(self.spike(self.normed(carried)), self.shapes[carried][0])
            carried = self.add("add", {}, self.scaled(carried), self.scaled(branch))
        return self.spike(self.normed(carried))

    def stage_image(self, spikes: str, image: str) -> str:
        """The image once more, where the pixels are still as many."""
        if self.shapes[spikes][1:] != self.input_shape[1:]:
            return self.stage_conv(spikes, image)
        channels = int(self.rng.integers(1, 5))
        return self.spike(self.normed(self.add("add", {}, self.same(spikes, channels), self.same(image, channels))))

    def head(self, spikes: str) -> None:
        """Perhaps an average over the image, perhaps dense neurons, and the readout."""
        _, height, width = self.shapes[spikes]
        if height == width and height > 1 and self.rng.random() < 0.4:
            spikes = self.add("avg_pool", {"kernel_size": height}, spikes)
        features = self.add("flatten", {}, spikes)
        if self.rng.random() < 0.4:
            features = self.spike(self.normed(self.linear(features, int(self.rng.integers(1, 7)))))
            if self.rng.random() < 0.5:
                branch = self.linear(features, self.shapes[features][0])
                features = self.spike(self.add("add", {}, self.scaled(features), branch))
        self.linear(features, CLASSES)

    def conv(
        self,
        source: str,
        kernel: int | None = None,
        stride: int | None = None,
        padding: int | None = None,
        channels: int | None = None,
    ) -> str:
        """Of what is not given, anything that leaves a pixel."""
        padding = int(self.rng.integers(0, 4)) if padding is None else padding
        if kernel is None:
            kernel = int(self.rng.integers(1, min(5, min(self.shapes[source][1:]) + 2 * padding) + 1))
        options = {
            "in_channels": self.shapes[source][0],
            "out_channels": channels or int(self.rng.integers(1, 5)),
            "kernel_size": kernel,
            "stride": stride or int(self.rng.integers(1, 4)),
            "padding": padding,
            "bias": bool(self.rng.random() < 0.5),
        }
        return self.add("conv", options, source)

    def same(self, source: str, channels: int, stride: int = 1) -> str:
        """A conv that gives a pixel for each, or for every ``stride``-th, and perhaps batch norm."""
        kernel = int(self.rng.choice([1, 3, 5]))
        return self.normed(self.conv(source, kernel, stride, kernel // 2, channels))

    def linear(self, source: str, features: int) -> str:
        """With or without a bias."""
        options = {
            "in_features": self.shapes[source][0],
            "out_features": features,
            "bias": bool(self.rng.random() < 0.5),
        }
        return self.add("linear", options, source)

    def normed(self, source: str) -> str:
        """Batch norm, or not."""
        shape = self.shapes[source]
        options = {"features": shape[0], "eps": 1e-5, "momentum": 0.1, "spatial": len(shape) == 3}
        return self.add("batch_norm", options, source) if self.rng.random() < 0.6 else source

    def scaled(self, source: str) -> str:
        """A factor, or not."""
        return self.add("scale", {"learned": True}, source) if self.rng.random() < 0.6 else source

    def spike(self, source: str) -> str:
        """Neurons."""
        return self.add("spike", self.neuron, source)

    def add(self, kind: LayerKind, options: Options, *sources: str) -> str:
        """One layer."""
        layer = Layer(f"{kind}{len(self.layers)}", kind, options, inputs=sources)
        shape = output_shape(layer, [self.shapes[source] for source in sources])
        assert shape, (layer, [self.shapes[source] for source in sources])
        self.layers.append(layer)
        self.shapes[layer.name] = shape
        return layer.name
