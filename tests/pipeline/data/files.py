"""Small files in the formats the data sets are distributed in, written from their descriptions."""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image

from pipeline.data import Dataset
from pipeline.data.dataset import Codes

PACKERS: Mapping[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def random_images(samples: int, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Dataset:
    """Random images, labels in turn."""
    codes = np.random.default_rng(seed).integers(0, 256, (samples, *shape), np.uint8)
    return Dataset(codes, np.arange(samples, dtype=np.int64) % classes)


def idx_bytes(array: Codes) -> bytes:
    """An IDX file of unsigned bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder: Path, train: Dataset, test: Dataset, ending: str = "", dot: bool = False) -> None:
    """The four files of MNIST; ``dot`` for the names some unpackers give them."""
    folder.mkdir(parents=True, exist_ok=True)
    pack = PACKERS[ending]
    for part, data in (("train", train), ("t10k", test)):
        images, labels = f"{part}-images-idx3-ubyte{ending}", f"{part}-labels-idx1-ubyte{ending}"
        if dot:
            images, labels = images.replace("-idx", ".idx"), labels.replace("-idx", ".idx")
        (folder / images).write_bytes(pack(idx_bytes(data.codes[:, 0])))
        (folder / labels).write_bytes(pack(idx_bytes(data.labels.astype(np.uint8))))


class Python2Pickle:
    """Pickles dictionaries as Python 2's cPickle does with protocol 2: text as byte strings, every object stored."""

    def __init__(self) -> None:
        self.stored = 0

    def put(self, content: bytes) -> bytes:
        """An object, stored under the next number."""
        self.stored += 1
        return content + (b"q" + bytes([self.stored]) if self.stored < 256 else b"r" + struct.pack("<I", self.stored))

    def value(self, value: Any) -> bytes:
        """Any of the values the data sets hold."""
        if value is None:
            return b"N"
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        if isinstance(value, int):
            return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
        if isinstance(value, str | bytes):
            text = value.encode() if isinstance(value, str) else value
            short = len(text) < 256
            return self.put((b"U" + bytes([len(text)]) if short else b"T" + struct.pack("<i", len(text))) + text)
        if isinstance(value, tuple):
            return self.put(b"(" + b"".join(map(self.value, value)) + b"t")
        if isinstance(value, list):
            return self.put(b"]") + b"(" + b"".join(map(self.value, value)) + b"e"
        if isinstance(value, dict):
            empty = self.put(b"}")
            return empty + b"(" + b"".join(self.value(key) + self.value(entry) for key, entry in value.items()) + b"u"
        return self.array(value)

    def array(self, array: np.ndarray[Any, Any]) -> bytes:
        """A plain array, the way numpy reduces it."""
        written = self.put(b"cnumpy.core.multiarray\n_reconstruct\n") + self.put(b"cnumpy\nndarray\n")
        written += self.value((0,)) + self.value("b") + self.put(b"\x87") + self.put(b"R")
        written += b"(K\x01" + self.value(array.shape)
        written += self.put(b"cnumpy\ndtype\n") + self.value(array.dtype.str[1:])
        written += b"K\x00K\x01" + self.put(b"\x87") + self.put(b"R")
        written += self.value((3, array.dtype.str[0], None, None, None, -1, -1, 0)) + b"b"
        return written + self.value(False) + self.value(array.tobytes()) + self.put(b"t") + b"b"


def python2_pickle(value: Any) -> bytes:
    """A whole pickle."""
    return b"\x80\x02" + Python2Pickle().value(value) + b"."


def cifar_batch(data: Dataset, labels: str) -> bytes:
    """A pickle as CIFAR's author publishes them."""
    values = {
        "batch_label": "testing batch 1 of 1",
        labels: data.labels.tolist(),
        "data": data.codes.reshape(len(data), -1),
        "filenames": [f"image_s_{number:06}.png" for number in range(len(data))],
    }
    return python2_pickle(values)


def write_cifar10(folder: Path, train: Dataset, test: Dataset, ending: str = "") -> None:
    """Six files; the training images in five."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(np.arange(len(train)), 5), 1):
        batch = cifar_batch(Dataset(train.codes[part], train.labels[part]), "labels")
        (folder / f"data_batch_{number}{ending}").write_bytes(PACKERS[ending](batch))
    (folder / f"test_batch{ending}").write_bytes(PACKERS[ending](cifar_batch(test, "labels")))


def write_cifar100(folder: Path, train: Dataset, test: Dataset, ending: str = "") -> None:
    """Two files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (("train", train), ("test", test)):
        (folder / f"{name}{ending}").write_bytes(PACKERS[ending](cifar_batch(data, "fine_labels")))


def write_svhn(folder: Path, train: Dataset, test: Dataset) -> None:
    """Two MATLAB files in which the digit 0 has label 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (("train_32x32.mat", train), ("test_32x32.mat", test)):
        labels = np.where(data.labels == 0, 10, data.labels).astype(np.uint8)[:, None]
        arrays = {"X": data.codes.transpose(2, 3, 1, 0), "y": labels}
        scipy.io.savemat(folder / name, arrays, do_compression=True)


def wnid(label: int) -> str:
    """A WordNet name; they sort like the labels."""
    return f"n{10_000_000 + 7 * label}"


def write_jpeg(path: Path, codes: Codes, mode: str = "RGB") -> None:
    """One image ``(3, height, width)``, as lossless as JPEG can be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(codes.transpose(1, 2, 0)).convert(mode).save(path, "JPEG", quality=100, subsampling=0)


def write_tiny_imagenet(folder: Path, train: Dataset, test: Dataset, classes: int) -> None:
    """The unpacked archive; ``wnids.txt`` in an order of its own, as in the original."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [wnid(label) for label in range(classes)]
    (folder / "wnids.txt").write_text("\n".join(reversed(names)))
    for number, (codes, label) in enumerate(zip(train.codes, train.labels, strict=True)):
        name = names[label]
        write_jpeg(folder / "train" / name / "images" / f"{name}_{number}.JPEG", codes)
    lines = []
    for number, (codes, label) in enumerate(zip(test.codes, test.labels, strict=True)):
        write_jpeg(folder / "val" / "images" / f"val_{number}.JPEG", codes)
        lines.append(f"val_{number}.JPEG\t{names[label]}\t0\t0\t63\t63\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
