"""Tiny-ImageNet (Stanford CS231n): 200 classes of 64x64 JPEG files, as its archive unpacks.

The labels of its test images were never published; its validation images serve for testing, as is usual.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.files import MIB, read_bytes
from pipeline.data.dataset import INTACT_COPY, Dataset, labelled
from pipeline.progress import track

CLASSES = 200
SIDE = 64
WNIDS, TRAIN_FOLDER, VAL_LABELS, VAL_IMAGES = "wnids.txt", "train", "val/val_annotations.txt", "val/images"
WNID = re.compile(r"n\d{8}")
VAL_IMAGE = re.compile(r"val_\d{1,6}\.JPEG")
MAX_TEXT_BYTES = 4 * MIB
MAX_IMAGE_BYTES = MIB
MAX_SHOWN = 20
READ_AT_ONCE = 500


def load_tiny_imagenet(files: Mapping[str, Path], classes: int = CLASSES) -> tuple[Dataset, Dataset]:
    """Tiny-ImageNet; classes are numbered in the order of their sorted WordNet names, as by-folder readers do.

    Args:
        files: paths of ``wnids.txt``, ``train``, ``val/val_annotations.txt`` and ``val/images`` by these names.
        classes: number of classes ``wnids.txt`` must name.

    Returns:
        Training split and, for testing, the validation split; images ``(samples, 3, 64, 64)``, grey ones as RGB.

    Raises:
        SpikeguardError: if a list is malformed; ``RuleViolations`` names missing, unreadable or wrong images.
    """
    wnids = _read_wnids(files[WNIDS], classes)
    train = _train_images(files[TRAIN_FOLDER], wnids)
    test = _test_images(files[VAL_LABELS], files[VAL_IMAGES], wnids)
    return _read("train", files[TRAIN_FOLDER], train, classes), _read("test", files[VAL_IMAGES], test, classes)


def _read_wnids(path: Path, classes: int) -> dict[str, int]:
    names = sorted(set(_lines(path)))
    wrong = [name for name in names if not WNID.fullmatch(name)]
    if wrong or len(names) != classes:
        shown = f", such as {wrong[0][:40]!r}" if wrong else ""
        raise SpikeguardError(
            f"{path} names {len(names)} classes, {len(wrong)} of them no WordNet names{shown}; "
            f"expected {classes} such as n01443537, fetch an intact copy"
        )
    return {name: label for label, name in enumerate(names)}


def _lines(path: Path) -> list[str]:
    try:
        text = read_bytes(path, MAX_TEXT_BYTES).decode("ascii")
    except UnicodeDecodeError as error:
        raise SpikeguardError(f"{path} is no plain text ({error}); {INTACT_COPY}") from error
    return [line.rstrip() for line in text.splitlines() if line.strip()]


LabelledPaths = list[tuple[Path, int]]


def _train_images(folder: Path, wnids: Mapping[str, int]) -> LabelledPaths:
    by_class = {name: sorted((folder / name / "images").glob("*.JPEG")) for name in wnids}
    _refuse(
        folder,
        [
            Violation(
                name, "class has images", "0", f"*.JPEG in {folder / name / 'images'}", "unpack the archive again"
            )
            for name, paths in by_class.items()
            if not paths
        ],
    )
    return [(path, wnids[name]) for name, paths in by_class.items() for path in paths]


def _test_images(annotations: Path, folder: Path, wnids: Mapping[str, int]) -> LabelledPaths:
    """Images and labels of ``val_annotations.txt``: file name, class and a bounding box, separated by tabs."""
    images: LabelledPaths = []
    problems = []
    present = {path.name for path in folder.iterdir()}
    for number, line in enumerate(_lines(annotations), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if not VAL_IMAGE.fullmatch(name) or wnid not in wnids:
            actual = f"{name[:40]!r}, {wnid[:40]!r}"
            problems.append(
                Violation(f"line {number}", "names an image and a class", actual, "val_0.JPEG, n01443537", INTACT_COPY)
            )
        elif name not in present:
            problems.append(
                Violation(name, "image is there", "missing", str(folder / name), "unpack the archive again")
            )
        else:
            images.append((folder / name, wnids[wnid]))
    _refuse(annotations, problems)
    return images


def _read(part: str, folder: Path, images: LabelledPaths, classes: int) -> Dataset:
    codes = np.empty((len(images), 3, SIDE, SIDE), np.uint8)
    problems: list[Violation] = []
    with track(f"read {part} images", len(images)) as advance:
        for start in range(0, len(images), READ_AT_ONCE):
            chunk = images[start : start + READ_AT_ONCE]
            for index, (path, _) in enumerate(chunk, start):
                try:
                    codes[index] = _decode(path)
                except ValueError as error:
                    allowed = f"JPEG, {SIDE}x{SIDE}, RGB or grey"
                    problems.append(Violation(path.name, "image can be read", str(error), allowed, INTACT_COPY))
            advance(units=len(chunk))
    _refuse(folder, problems)
    labels = np.array([label for _, label in images], np.int64)
    return labelled(str(folder), codes, labels, classes)


def _decode(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """uint8 ``(3, 64, 64)`` of one file; ValueError if it is anything else."""
    from PIL import Image

    content = read_bytes(path, MAX_IMAGE_BYTES)
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:  # reads the header only
            if image.size != (SIDE, SIDE) or image.mode not in ("RGB", "L"):
                raise ValueError(f"{image.size[0]}x{image.size[1]}, {image.mode}")
            return np.asarray(image.convert("RGB"), np.uint8).transpose(2, 0, 1)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{type(error).__name__}: {error}".replace(str(path), path.name)) from error


def _refuse(subject: Path, problems: Sequence[Violation]) -> None:
    """Raise the problems, if there are any; a spoilt archive has too many to show them all."""
    if not problems:
        return
    more = len(problems) - MAX_SHOWN
    note = f" (and {more:,} more like these)" if more > 0 else ""
    raise RuleViolations(f"{subject}{note}", problems[:MAX_SHOWN])
