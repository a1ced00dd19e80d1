from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hardware.errors import RuleViolations
from pipeline.data.augmentation import Augmentation, cutout, horizontal_flip, random_crop

SHAPES = st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
SEEDS = st.integers(0, 2**31)


def numbered(shape: tuple[int, ...]) -> Tensor:
    """Images in which every pixel differs and none is black."""
    count = int(torch.Size(shape).numel())
    return (torch.arange(count, dtype=torch.float32) + 1).reshape(shape)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """One image moved by whole pixels, black where nothing was; pixel by pixel."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                result[:, y, x] = image[:, y - down, x - right]
    return result


@given(SHAPES, st.integers(0, 5), SEEDS)
def test_a_crop_is_a_shift_with_black_moving_in(shape: tuple[int, ...], padding: int, seed: int) -> None:
    images = numbered(shape)
    cropped = random_crop(images, generator(seed), padding)
    assert cropped.shape == images.shape
    shifts = range(-padding, padding + 1)
    for before, after in zip(images, cropped, strict=True):
        assert any(torch.equal(after, shifted(before, down, right)) for down in shifts for right in shifts)


def test_every_shift_occurs_equally_often_and_for_each_image_by_itself() -> None:
    images = numbered((1, 1, 9, 9)).expand(9000, 1, 9, 9)
    cropped = random_crop(images, generator(0), 1)
    counts = [
        int((cropped == shifted(images[0], down, right)).flatten(1).all(1).sum())
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
    ]
    assert sum(counts) == 9000
    assert all(850 < count < 1150 for count in counts)  # expected 1000, standard deviation 30


def test_by_default_a_crop_moves_by_up_to_four() -> None:
    images = torch.zeros(2000, 1, 16, 16)
    images[:, :, 8, 8] = 1
    where = random_crop(images, generator(0)).nonzero()[:, 2:] - 8
    assert len(where) == 2000
    assert (where.min().item(), where.max().item()) == (-4, 4)


@given(SHAPES, SEEDS)
def test_a_flip_mirrors_an_image_or_leaves_it(shape: tuple[int, ...], seed: int) -> None:
    images = numbered(shape)
    flipped = horizontal_flip(images, generator(seed))
    assert flipped.shape == images.shape
    for before, after in zip(images, flipped, strict=True):
        assert torch.equal(after, before) or torch.equal(
            after, torch.stack([row.flip(0) for row in before.flatten(0, 1)]).reshape(before.shape)
        )


@given(SHAPES, SEEDS)
def test_the_same_flip_twice_is_none(shape: tuple[int, ...], seed: int) -> None:
    images = numbered(shape)
    assert torch.equal(horizontal_flip(horizontal_flip(images, generator(seed)), generator(seed)), images)


def test_half_of_the_images_are_flipped() -> None:
    images = torch.tensor([1.0, 0.0]).expand(4000, 1, 1, 2)
    share = horizontal_flip(images, generator(0))[:, 0, 0, 1].mean().item()
    assert 0.46 < share < 0.54


@given(SHAPES, st.integers(1, 12), SEEDS)
def test_cutout_blackens_one_square_cut_at_the_border(shape: tuple[int, ...], size: int, seed: int) -> None:
    images = numbered(shape)
    cut = cutout(images, generator(seed), size)
    for before, after in zip(images, cut, strict=True):
        black = (after == 0).all(0)
        assert torch.equal((after == 0).any(0), black)  # the same in all channels
        assert torch.equal(after[:, ~black], before[:, ~black])
        assert black.any()
        rows, columns = black.any(1).nonzero().flatten(), black.any(0).nonzero().flatten()
        for covered, length in ((rows, before.shape[1]), (columns, before.shape[2])):
            first, last = int(covered[0]), int(covered[-1])
            assert len(covered) == last - first + 1 <= size
            assert len(covered) == size or first == 0 or last == length - 1
        assert int(black.sum()) == len(rows) * len(columns)


def test_the_square_has_any_pixel_as_its_centre() -> None:
    """8x8 in 32x32: whole when 4 rows are free before the centre and 3 after it, half over the border in a corner."""
    cut = cutout(torch.ones(20_000, 1, 32, 32), generator(0), 8)
    rows = (cut == 0).any(3).sum(2).flatten()
    assert (rows.min().item(), rows.max().item()) == (4, 8)
    assert abs((rows == 8).double().mean().item() - 25 / 32) < 0.015
    covered = (cut == 0).double().mean(0)[0]
    assert abs(covered[16, 16].item() - (8 / 32) ** 2) < 0.01
    assert abs(covered[0, 0].item() - (5 / 32) ** 2) < 0.01  # centres 0 .. 4
    assert abs(covered[31, 31].item() - (4 / 32) ** 2) < 0.01  # centres 28 .. 31


@given(SHAPES, SEEDS, st.integers(0, 3), st.booleans(), st.integers(0, 5))
def test_the_seed_makes_the_batch(shape: tuple[int, ...], seed: int, crop_padding: int, flip: bool, size: int) -> None:
    augmentation = Augmentation(crop_padding, flip, size)
    images = numbered(shape)
    first, second = augmentation(images, generator(seed)), augmentation(images, generator(seed))
    assert torch.equal(first, second)
    assert first.shape == images.shape
    assert torch.equal(images, numbered(shape))  # untouched


def test_another_seed_makes_another_batch() -> None:
    images = numbered((16, 3, 8, 8))
    for augmentation in (Augmentation(crop_padding=2), Augmentation(flip=True), Augmentation(cutout=3)):
        assert not torch.equal(augmentation(images, generator(0)), augmentation(images, generator(1)))


def test_off_is_the_identity_and_draws_nothing() -> None:
    images = numbered((4, 3, 8, 8))
    source = generator(3)
    before = source.get_state()
    assert Augmentation()(images, source) is images
    assert torch.equal(source.get_state(), before)


def test_the_order_is_crop_flip_cutout() -> None:
    images = numbered((8, 3, 12, 12))
    source = generator(5)
    expected = cutout(horizontal_flip(random_crop(images, source, 2), source), source, 4)
    assert torch.equal(Augmentation(2, True, 4)(images, generator(5)), expected)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float64, torch.bfloat16])
def test_the_type_of_the_pixels_stays(kind: torch.dtype) -> None:
    images = torch.ones(4, 1, 8, 8, dtype=kind)
    assert Augmentation(2, True, 3)(images, generator(0)).dtype == kind


def test_negative_pixels_are_refused_together() -> None:
    with pytest.raises(RuleViolations) as caught:
        Augmentation(crop_padding=-1, cutout=-2)
    assert [row.object for row in caught.value.violations] == ["crop_padding", "cutout"]
