"""Networks that come with spikeguard, by the name that a configuration gives.

They are those of Özdenizci & Legenstein (TMLR 2024) and two small ones: average pooling instead of max pooling, no
biases (conversion adds them), normalisation first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from hardware.errors import RuleViolations, SpikeguardError, Violation
from pipeline.models.graph import MAX_SIZE
from pipeline.models.layers import Normalize
from pipeline.models.zoo.resnet import resnet_20, resnet_32
from pipeline.models.zoo.small import cnn_28, digits_cnn
from pipeline.models.zoo.vgg import vgg11, vgg11_tiny, vgg16
from pipeline.models.zoo.wide_resnet import wrn_16_4, wrn_28_4

MAX_WIDTH = 64.0


@dataclass(frozen=True)
class Network:
    """A network by name.

    Attributes:
        layers: from the normalisation, the number of classes and the width, a factor on all channels.
        side: of the square images it is for, in pixels.
        any_multiple: whether images of any multiple of ``side`` will do: an average over the image precedes its
            dense layers.
    """

    layers: Callable[[Normalize, int, float], nn.Module]
    side: int
    any_multiple: bool = False

    @property
    def sizes(self) -> str:
        """The images it takes, in words."""
        return f"square images of {'a multiple of ' if self.any_multiple else ''}{self.side} pixels"

    def takes(self, input_shape: tuple[int, ...]) -> bool:
        """Whether images of this shape fit."""
        if len(input_shape) != 3 or min(input_shape) < 1 or input_shape[1] != input_shape[2]:
            return False
        side = input_shape[1]
        return side % self.side == 0 if self.any_multiple else side == self.side


NETWORKS: Mapping[str, Network] = {
    "digits-cnn": Network(digits_cnn, 8),
    "cnn-28": Network(cnn_28, 28),
    "vgg11": Network(vgg11, 32),
    "vgg16": Network(vgg16, 32),
    "vgg11-tiny": Network(vgg11_tiny, 8, any_multiple=True),
    "wrn-16-4": Network(wrn_16_4, 4, any_multiple=True),
    "wrn-28-4": Network(wrn_28_4, 4, any_multiple=True),
    "resnet-20": Network(resnet_20, 4, any_multiple=True),
    "resnet-32": Network(resnet_32, 4, any_multiple=True),
}

NORMALIZATIONS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((78 / 255,), (96 / 255,)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
}
"""Mean and standard deviation of the pixels in [0, 1] of each channel, by data set: those in common use."""

UNKNOWN_MEAN, UNKNOWN_STD = 0.5, 0.25


def build(name: str, data: str, classes: int, width: float, input_shape: tuple[int, ...]) -> nn.Module:
    """A network with fresh weights.

    Args:
        name: one of ``NETWORKS``.
        data: name of the data set, which decides the normalisation; for any not in ``NORMALIZATIONS`` the mean is
            taken to be 0.5 and the standard deviation 0.25.
        classes: outputs.
        width: factor on all channels and hidden features, none of which falls below 1.
        input_shape: ``(channels, height, width)`` of the images.

    Raises:
        SpikeguardError: if no network has this name.
        RuleViolations: for everything that does not fit the network.
    """
    if name not in NETWORKS:
        raise SpikeguardError(f"network {name!r} is unknown; choose among {', '.join(NETWORKS)}")
    network = NETWORKS[name]
    problems = []
    if not network.takes(input_shape):
        fitting = ", ".join(other for other, entry in NETWORKS.items() if entry.takes(input_shape))
        remedy = f"choose {fitting}" if fitting else "resize the images"
        problems.append(Violation("images", "fit the network", str(input_shape), network.sizes, remedy))
    if not 1 <= classes <= MAX_SIZE:
        problems.append(Violation("classes", "are a positive number", str(classes), f"1..{MAX_SIZE}", "check labels"))
    if not 0 < width <= MAX_WIDTH:
        limit = f"above 0, at most {MAX_WIDTH:g}"
        problems.append(Violation("width", "is a positive factor", f"{width:g}", limit, "1 is the published width"))
    channels = input_shape[0] if input_shape else 0
    unknown = (UNKNOWN_MEAN,) * channels, (UNKNOWN_STD,) * channels
    mean, std = NORMALIZATIONS.get(data, unknown)
    if len(mean) != channels:
        remedy = "give these images as data of another name"
        problems.append(Violation("images", f"have the channels of {data}", str(channels), str(len(mean)), remedy))
    if problems:
        raise RuleViolations(f"network {name}", problems)
    return network.layers(Normalize(mean, std), classes, width)
