"""From the configuration to the parts: where files are looked for, what is said when they are not there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from hardware.errors import RuleViolations, SpikeguardError
from pipeline.config import WITHOUT_FOLDER, DataConfig, DataName
from pipeline.data import Dataset, Splits
from pipeline.data.loading import SOURCES, find_files, load_splits, needs_folder
from tests.pipeline.data.files import (
    random_images,
    write_cifar10,
    write_cifar100,
    write_mnist,
    write_svhn,
    write_tiny_imagenet,
)


def write_200_classes(folder: Path, train: Dataset, test: Dataset) -> None:
    write_tiny_imagenet(folder, train, test, 200)


WRITERS: dict[str, tuple[Callable[[Path, Dataset, Dataset], None], tuple[int, int, int]]] = {
    "mnist": (write_mnist, (1, 28, 28)),
    "fashion-mnist": (write_mnist, (1, 28, 28)),
    "cifar10": (write_cifar10, (3, 32, 32)),
    "cifar100": (write_cifar100, (3, 32, 32)),
    "svhn": (write_svhn, (3, 32, 32)),
    "tiny-imagenet": (write_200_classes, (3, 64, 64)),
}


def settings(name: str, folder: Path | None, **more: Any) -> DataConfig:
    return DataConfig.model_validate({"name": name, "dir": str(folder) if folder else None, **more})


def written(name: str, folder: Path) -> tuple[Dataset, Dataset]:
    """A small data set: three training and two test images of every class."""
    write, shape = WRITERS[name]
    classes = SOURCES[name].classes
    train, test = random_images(3 * classes, shape, classes, 1), random_images(2 * classes, shape, classes, 2)
    write(folder, train, test)
    return train, test


def images_in(part: Dataset) -> set[bytes]:
    return {codes.tobytes() for codes in part.codes}


def test_every_name_of_the_configuration_has_a_loader() -> None:
    assert set(SOURCES) == set(get_args(DataName)) - set(WITHOUT_FOLDER) == set(WRITERS)
    assert [name for name in get_args(DataName) if not needs_folder(name)] == list(WITHOUT_FOLDER)


@pytest.mark.parametrize("name", SOURCES)
def test_test_images_come_from_the_official_test_split_alone(tmp_path: Path, name: str) -> None:
    classes = SOURCES[name].classes
    train, test = written(name, tmp_path / SOURCES[name].folders[0])
    splits = load_splits(settings(name, tmp_path, validation=classes, test=classes), 3)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (2 * classes, classes, classes)
    assert (splits.name, splits.classes, splits.input_shape) == (name, classes, train.codes.shape[1:])
    for part in (splits.train, splits.validation, splits.test):
        assert len(set(np.bincount(part.labels, minlength=classes))) == 1  # as many of every class
    if name != "tiny-imagenet":  # JPEG is lossy
        assert images_in(splits.test) < images_in(test)
        assert images_in(splits.train) | images_in(splits.validation) == images_in(train)


@pytest.mark.parametrize("name", SOURCES)
def test_the_folder_may_be_the_data_sets_own_or_one_that_holds_it(tmp_path: Path, name: str) -> None:
    source = SOURCES[name]
    for number, usual in enumerate(source.folders):
        parent = tmp_path / str(number)
        own = parent / usual
        own.mkdir(parents=True)
        for names in source.files:
            (own / names[0]).parent.mkdir(exist_ok=True)
            (own / names[0]).write_bytes(b"")
        for given in (parent, own):
            assert find_files(name, given) == {names[0]: own / names[0] for names in source.files}


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_every_ending_is_found_and_the_unpacked_file_preferred(tmp_path: Path, name: str) -> None:
    for index, names in enumerate(SOURCES[name].files):
        (tmp_path / names[index % len(names)]).write_bytes(b"")
    assert {path.name for path in find_files(name, tmp_path).values()} == {
        names[index % len(names)] for index, names in enumerate(SOURCES[name].files)
    }
    for names in SOURCES[name].files:
        for other in names:
            (tmp_path / other).write_bytes(b"")
    assert find_files(name, tmp_path) == {names[0]: tmp_path / names[0] for names in SOURCES[name].files}


def test_names_with_a_dot_are_found(tmp_path: Path) -> None:
    train, test = random_images(20, (1, 28, 28), 10, 1), random_images(20, (1, 28, 28), 10, 2)
    write_mnist(tmp_path / "MNIST" / "raw", train, test, ".gz", dot=True)
    splits = load_splits(settings("mnist", tmp_path, validation=10, test=10), 0)
    assert images_in(splits.test) < images_in(test)


@pytest.mark.parametrize("name", SOURCES)
def test_every_missing_file_is_named_with_its_place_and_its_page(tmp_path: Path, name: str) -> None:
    source = SOURCES[name]
    with pytest.raises(RuleViolations) as caught:
        find_files(name, tmp_path)
    rows = caught.value.violations
    assert [row.object for row in rows] == [names[0] for names in source.files]
    for row in rows:
        assert str(tmp_path / row.object) in row.limit
        assert source.page in row.remedy
    assert str(tmp_path) in caught.value.subject
    assert source.folders[0].split("/")[0] in caught.value.subject


def test_only_missing_files_are_named_where_the_others_lie(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    train, test = random_images(20, (3, 32, 32), 10), random_images(10, (3, 32, 32), 10)
    write_cifar10(folder, train, test, ".xz")
    (folder / "data_batch_2.xz").unlink()
    (folder / "test_batch.xz").unlink()
    with pytest.raises(RuleViolations) as caught:
        load_splits(settings("cifar10", tmp_path, validation=10, test=10), 0)
    assert [row.object for row in caught.value.violations] == ["data_batch_2", "test_batch"]
    assert f"{folder / 'test_batch'}, perhaps with .gz or .xz" in str(caught.value)


def test_a_folder_that_is_not_there_and_one_that_is_not_told_of(tmp_path: Path) -> None:
    with pytest.raises(SpikeguardError, match=r"nowhere is no folder.*kriz/cifar\.html"):
        load_splits(settings("cifar10", tmp_path / "nowhere"), 0)
    with pytest.raises(SpikeguardError, match=r"give --data-dir DIR.*housenumbers"):
        load_splits(settings("svhn", None), 0)


def test_the_home_folder_has_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written("mnist", tmp_path / "data" / "mnist")
    assert len(load_splits(settings("mnist", Path("~/data"), validation=10, test=10), 0).test) == 10


@pytest.mark.parametrize("folder", ["mnist", "MNIST/raw", "MNIST"])
def test_mnist_is_not_taken_for_fashion_mnist(tmp_path: Path, folder: str) -> None:
    """Their files have the same names; the wrong ones would be trained on without a word."""
    written("mnist", tmp_path / ("MNIST/raw" if folder == "MNIST" else folder))
    with pytest.raises(SpikeguardError, match="has the name of mnist"):
        load_splits(settings("fashion-mnist", tmp_path / folder, validation=10, test=10), 0)
    assert len(load_splits(settings("mnist", tmp_path / folder, validation=10, test=10), 0).test) == 10


def test_of_two_data_sets_side_by_side_each_is_found(tmp_path: Path) -> None:
    tests = {name: written(name, tmp_path / name)[1] for name in ("mnist",)}
    fashion = random_images(20, (1, 28, 28), 10, 8), random_images(20, (1, 28, 28), 10, 9)
    write_mnist(tmp_path / "fashion-mnist", *fashion)
    for name, test in (("mnist", tests["mnist"]), ("fashion-mnist", fashion[1])):
        assert images_in(load_splits(settings(name, tmp_path, validation=10, test=10), 0).test) < images_in(test)


def test_digits_and_files_of_ones_own_need_no_folder(tmp_path: Path) -> None:
    digits = load_splits(DataConfig(), 0)
    assert (digits.name, len(digits.train), len(digits.test)) == ("digits", 1077, 540)
    fewer = load_splits(DataConfig(train=100), 0)
    assert np.array_equal(fewer.test.codes, digits.test.codes)
    assert images_in(fewer.train) < images_in(digits.train)
    np.savez(tmp_path / "own.npz", images=np.zeros((30, 1, 4, 4), np.uint8), labels=np.arange(30) % 3)
    own = load_splits(DataConfig(name="npz", path=str(tmp_path / "own.npz"), validation=6, test=9), 0)
    assert (own.name, len(own.train), len(own.validation), len(own.test)) == ("own", 15, 6, 9)


def parts(splits: Splits) -> list[bytes]:
    return [part.codes.tobytes() for part in (splits.train, splits.validation, splits.test)]


def test_where_the_files_lie_makes_no_difference(tmp_path: Path) -> None:
    written("mnist", tmp_path / "here" / "mnist")
    written("mnist", tmp_path / "there")
    here, there = (
        load_splits(settings("mnist", tmp_path / place, validation=10, test=10), 0) for place in ("here", "there")
    )
    assert parts(here) == parts(there)


def test_importing_reads_nothing_and_needs_no_reader() -> None:
    script = (
        "import sys; import pipeline.data.loading; "
        "print([name for name in ('sklearn', 'scipy', 'PIL', 'torch') if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
