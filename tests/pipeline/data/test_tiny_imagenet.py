from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hardware.errors import RuleViolations, SpikeguardError
from pipeline.data import Dataset
from pipeline.data.tiny_imagenet import load_tiny_imagenet
from tests.pipeline.data.files import wnid, write_jpeg, write_tiny_imagenet

CLASSES = 3


def flat_images(samples: int) -> Dataset:
    """Images of one colour each, which JPEG keeps to a code or two."""
    colours = np.random.default_rng(samples).integers(0, 256, (samples, 3, 1, 1))
    codes = np.broadcast_to(colours, (samples, 3, 64, 64)).astype(np.uint8)
    return Dataset(codes, np.arange(samples, dtype=np.int64) % CLASSES)


TRAIN, TEST = flat_images(9), flat_images(6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_imagenet(tmp_path, TRAIN, TEST, CLASSES)
    return tmp_path


def load(folder: Path) -> tuple[Dataset, Dataset]:
    names = ("wnids.txt", "train", "val/val_annotations.txt", "val/images")
    return load_tiny_imagenet({name: folder / name for name in names}, CLASSES)


def close(first: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], second: object) -> bool:
    return bool(np.abs(first.astype(int) - np.asarray(second, int)).max() <= 3)


def test_images_and_labels_belong_together(folder: Path) -> None:
    train, test = load(folder)
    order = np.argsort(TRAIN.labels, kind="stable")  # class by class
    assert train.labels.tolist() == TRAIN.labels[order].tolist()
    assert close(train.codes, TRAIN.codes[order])
    assert test.labels.tolist() == TEST.labels.tolist()
    assert close(test.codes, TEST.codes)
    assert (train.codes.dtype, train.labels.dtype) == (np.uint8, np.int64)


def test_classes_are_numbered_by_sorted_name(folder: Path) -> None:
    """As readers that go by folder number them; the list is in an order of its own."""
    assert (folder / "wnids.txt").read_text().split()[0] == wnid(CLASSES - 1)
    only = folder / "train" / wnid(0) / "images"
    blue = np.zeros((3, 64, 64), np.uint8)
    blue[2] = 255
    for path in only.iterdir():
        write_jpeg(path, blue)
    train, _ = load(folder)
    assert close(train.codes[train.labels == 0], np.broadcast_to(blue, (3, 3, 64, 64)))


def test_grey_images_become_rgb(folder: Path) -> None:
    grey = np.full((3, 64, 64), 77, np.uint8)
    write_jpeg(folder / "val" / "images" / "val_2.JPEG", grey, "L")
    with Image.open(folder / "val" / "images" / "val_2.JPEG") as image:
        assert image.mode == "L"
    assert close(load(folder)[1].codes[2], grey)


def test_the_test_split_is_the_labelled_validation_images(folder: Path) -> None:
    annotations = folder / "val" / "val_annotations.txt"
    lines = annotations.read_text().splitlines()
    annotations.write_text("\r\n".join(reversed(lines)))  # in another order, and without a last line end
    assert load(folder)[1].labels.tolist() == TEST.labels[::-1].tolist()


def change_wnids(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "wnids.txt").write_text(text)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_wnids(""), "names 0 classes"),
        (change_wnids(f"{wnid(0)}\n{wnid(1)}\n"), "names 2 classes"),
        (change_wnids(f"{wnid(0)}\n{wnid(1)}\n{wnid(1)}\n"), "names 2 classes"),
        (change_wnids(f"{wnid(0)}\n{wnid(1)}\n../../../etc\n"), "1 of them no WordNet names, such as '../../../etc'"),
        (change_wnids(f"{wnid(0)}\n{wnid(1)}\nñ\n"), "is no plain text"),
    ],
)
def test_a_wrong_list_of_classes_is_refused(folder: Path, change: Callable[[Path], object], told: str) -> None:
    change(folder)
    with pytest.raises(SpikeguardError) as caught:
        load(folder)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "../../../secret.JPEG\t{0}\t0",
        "/etc/passwd\t{0}\t0",
        "val_1.png\t{0}\t0",
        "val_1.JPEG\tn99999999\t0",
        "val_1.JPEG {0}",
        "nothing",
    ],
)
def test_a_line_that_names_no_image_and_class_is_refused(folder: Path, line: str) -> None:
    annotations = folder / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text() + line.format(wnid(0)) + "\n")
    with pytest.raises(RuleViolations) as caught:
        load(folder)
    assert [row.object for row in caught.value.violations] == ["line 7"]


def test_every_missing_image_and_class_is_named(folder: Path) -> None:
    for number in (1, 4):
        (folder / "val" / "images" / f"val_{number}.JPEG").unlink()
    with pytest.raises(RuleViolations) as caught:
        load(folder)
    assert [row.object for row in caught.value.violations] == ["val_1.JPEG", "val_4.JPEG"]
    for label in (0, 2):
        images = folder / "train" / wnid(label) / "images"
        images.rename(images.with_name("pictures"))
    with pytest.raises(RuleViolations) as caught:
        load(folder)
    assert [row.object for row in caught.value.violations] == [wnid(0), wnid(2)]


def as_png(path: Path) -> None:
    Image.new("RGB", (64, 64)).save(path, "PNG")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def large(path: Path) -> None:
    write_jpeg(path, np.zeros((3, 65, 64), np.uint8))


def cmyk(path: Path) -> None:
    write_jpeg(path, np.zeros((3, 64, 64), np.uint8), "CMYK")


def text(path: Path) -> None:
    path.write_text("no image")


@pytest.mark.parametrize("spoil", [as_png, truncated, large, cmyk, text])
def test_every_image_that_is_none_is_named(folder: Path, spoil: Callable[[Path], None]) -> None:
    names = ["val_0.JPEG", "val_3.JPEG"]
    for name in names:
        spoil(folder / "val" / "images" / name)
    with pytest.raises(RuleViolations) as caught:
        load(folder)
    assert [row.object for row in caught.value.violations] == names
    assert all(row.limit == "JPEG, 64x64, RGB or grey" for row in caught.value.violations)


def test_a_spoilt_archive_is_not_listed_whole(folder: Path) -> None:
    annotations = folder / "val" / "val_annotations.txt"
    annotations.write_text("".join(f"val_{number}.JPEG\t{wnid(0)}\n" for number in range(100, 150)))
    with pytest.raises(RuleViolations, match="and 30 more like these") as caught:
        load(folder)
    assert len(caught.value.violations) == 20


def test_a_huge_file_is_refused_unread(folder: Path) -> None:
    path = folder / "val" / "images" / "val_0.JPEG"
    path.write_bytes(path.read_bytes() + bytes(2**20))
    with pytest.raises(SpikeguardError, match="more than the 1,048,576 allowed"):
        load(folder)
