"""Augmentations of training images, whole batches at a time.

They come before everything else, the network's own normalisation included: what is filled with zeros is black.
Random numbers are drawn where the generator is, so a generator on the CPU gives the same batches on any device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hardware.errors import RuleViolations, Violation


def random_crop(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Shift each image by up to ``padding`` pixels along both axes; what moves in is black.

    Equal to a random crop, of the image's own size, out of the image with a black border of ``padding`` pixels.

    Args:
        images: ``(samples, channels, height, width)``.
        generator: of the shifts, each as likely as any other.
        padding: pixels.
    """
    samples, _, height, width = images.shape
    top, left = (_uniform(2 * padding + 1, samples, generator).to(images.device) for _ in "yx")
    padded = functional.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view of every crop: (..., top, left, height, width)
    return windows[torch.arange(samples, device=images.device), :, top, left]


def horizontal_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: ``(samples, channels, height, width)``.
        generator: of the choice.
    """
    flipped = _uniform(2, len(images), generator).to(images.device, torch.bool)
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


def cutout(images: Tensor, generator: torch.Generator, size: int) -> Tensor:
    """Black out one square per image (DeVries & Taylor, "Improved Regularization of CNNs with Cutout", 2017).

    Its centre is any pixel with equal probability, so the square may hang over the border. It covers
    ``size // 2`` pixels before the centre in each direction, and the rest from there on.

    Args:
        images: ``(samples, channels, height, width)``.
        generator: of the centres.
        size: side of the square in pixels.
    """
    samples, _, height, width = images.shape
    rows = _covered(height, size, samples, generator).to(images.device)
    columns = _covered(width, size, samples, generator).to(images.device)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _covered(length: int, size: int, samples: int, generator: torch.Generator) -> Tensor:
    """Bool ``(samples, length)``: where a stretch of ``size`` around a random centre lies."""
    start = _uniform(length, samples, generator)[:, None] - size // 2
    positions = torch.arange(length, device=start.device)
    return (positions >= start) & (positions < start + size)


def _uniform(choices: int, samples: int, generator: torch.Generator) -> Tensor:
    return torch.randint(choices, (samples,), generator=generator, device=generator.device)


@dataclass(frozen=True)
class Augmentation:
    """What is done to a batch of training images: crop, flip, Cutout, in this order; by default nothing.

    Attributes:
        crop_padding: pixels a random crop may shift by; 0 for none, 4 is usual for 32x32 images.
        flip: whether images are mirrored at random.
        cutout: side of the blackened square in pixels; 0 for none.

    Raises:
        RuleViolations: if a number of pixels is negative.
    """

    crop_padding: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        problems = [
            Violation(name, "number of pixels", str(pixels), "0 or more", "0 turns it off")
            for name, pixels in (("crop_padding", self.crop_padding), ("cutout", self.cutout))
            if pixels < 0
        ]
        if problems:
            raise RuleViolations("augmentation", problems)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch ``(samples, channels, height, width)``; the batch itself stays as it is."""
        if self.crop_padding:
            images = random_crop(images, generator, self.crop_padding)
        if self.flip:
            images = horizontal_flip(images, generator)
        if self.cutout:
            images = cutout(images, generator, self.cutout)
        return images
