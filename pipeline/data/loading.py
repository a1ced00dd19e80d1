"""From a name in the configuration to a split data set: what there is, where its files are looked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hardware.errors import RuleViolations, SpikeguardError, Violation
from pipeline.config import DataConfig
from pipeline.data import cifar, idx, svhn, tiny_imagenet
from pipeline.data.dataset import Dataset, Splits
from pipeline.data.digits import load_digits
from pipeline.data.npz import load_npz
from pipeline.data.packed import PACKED
from pipeline.data.splitting import split, split_official


@dataclass(frozen=True)
class Source:
    """A data set of standard files in a folder, with a test split of its own.

    Attributes:
        page: where to get it.
        folders: where the files usually lie, relative to the folder that is given.
        files: for each file its name, and the names it may have instead.
        classes: number of classes; labels count from 0.
        load: from paths by (first) name to training and test split.
    """

    page: str
    folders: tuple[str, ...]
    files: tuple[tuple[str, ...], ...]
    classes: int
    load: Callable[[Mapping[str, Path]], tuple[Dataset, Dataset]]


def _packed(*names: str) -> tuple[str, ...]:
    return tuple(name + ending for name in names for ending in PACKED)


IDX_FILES = tuple(
    _packed(f"{part}-{kind}-ubyte", f"{part}-{kind}-ubyte".replace("-idx", ".idx"))  # some unpackers write the dot
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
SOURCES: Mapping[str, Source] = {
    "mnist": Source(
        "http://yann.lecun.com/exdb/mnist/",
        ("mnist", "MNIST", "MNIST/raw", "raw"),
        IDX_FILES,
        idx.CLASSES,
        idx.load_mnist,
    ),
    "fashion-mnist": Source(
        "https://github.com/zalandoresearch/fashion-mnist",
        ("fashion-mnist", "fashion_mnist", "FashionMNIST", "FashionMNIST/raw", "raw"),
        IDX_FILES,
        idx.CLASSES,
        idx.load_mnist,
    ),
    "cifar10": Source(
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        ("cifar-10-batches-py", "cifar-10/cifar-10-batches-py", "cifar10/cifar-10-batches-py"),
        tuple(_packed(name) for name in (*cifar.CIFAR10_BATCHES, cifar.CIFAR10_TEST)),
        10,
        cifar.load_cifar10,
    ),
    "cifar100": Source(
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        ("cifar-100-python", "cifar-100/cifar-100-python", "cifar100/cifar-100-python"),
        tuple(_packed(name) for name in cifar.CIFAR100_PARTS),
        100,
        cifar.load_cifar100,
    ),
    "svhn": Source(
        "http://ufldl.stanford.edu/housenumbers/",
        ("svhn", "SVHN"),
        ((svhn.TRAIN,), (svhn.TEST,)),
        svhn.CLASSES,
        svhn.load_svhn,
    ),
    "tiny-imagenet": Source(
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        ("tiny-imagenet-200", "tiny-imagenet/tiny-imagenet-200"),
        tuple(
            (name,)
            for name in (
                tiny_imagenet.WNIDS,
                tiny_imagenet.TRAIN_FOLDER,
                tiny_imagenet.VAL_LABELS,
                tiny_imagenet.VAL_IMAGES,
            )
        ),
        tiny_imagenet.CLASSES,
        tiny_imagenet.load_tiny_imagenet,
    ),
}


def load_splits(settings: DataConfig, seed: int) -> Splits:
    """The configured data set, split.

    Args:
        settings: its name, where its files lie, and how many images each part has.
        seed: of the split.

    Raises:
        SpikeguardError: if files are missing, spoilt or not told of, or hold too few images.
    """
    if settings.name in SOURCES:
        source = SOURCES[settings.name]
        train, test = source.load(find_files(settings.name, require_folder(settings)))
        return split_official(
            settings.name,
            train,
            test,
            source.classes,
            train=settings.train,
            validation=settings.validation,
            test=settings.test,
            seed=seed,
        )
    data = load_digits() if settings.path is None else load_npz(Path(settings.path))
    name = settings.name if settings.path is None else Path(settings.path).stem
    return split(name, data, settings.validation, settings.test, seed, settings.train)


def require_folder(settings: DataConfig) -> Path:
    """The folder of a data set that needs one.

    Raises:
        SpikeguardError: if none is given.
    """
    if settings.dir is None:
        raise SpikeguardError(
            f"the files of {settings.name} are not told of; give --data-dir DIR, the folder they lie in "
            f"(from {SOURCES[settings.name].page})"
        )
    return Path(settings.dir).expanduser()


def needs_folder(name: str) -> bool:
    """Whether a data set is read from a folder of standard files."""
    return name in SOURCES


def find_files(name: str, folder: Path) -> dict[str, Path]:
    """Find the standard files of a data set.

    Args:
        name: of the data set, a key of ``SOURCES``.
        folder: that holds the files, or holds the data set's folder under one of its usual names.

    Returns:
        Paths by the names in ``Source.files``.

    Raises:
        SpikeguardError: if the folder does not exist or is another data set's; ``RuleViolations`` names every
            missing file, where it was expected and where to get it.
    """
    source = SOURCES[name]
    if not folder.is_dir():
        raise SpikeguardError(f"{folder} is no folder; give the one with the files of {name}, from {source.page}")
    places = [folder / usual for usual in source.folders] + [folder]
    places = [place for place in places if place.is_dir()]
    found = [_present(source, place) for place in places]
    best = max(range(len(places)), key=lambda index: len(found[index]))
    place, files = places[best], found[best]
    if other := _named_after_another(name, place):
        raise SpikeguardError(
            f"{place} has the name of {other}, whose files are called like those of {name}; "
            f"give the folder of {name}, or rename this one"
        )
    missing = [names for names in source.files if names[0] not in files]
    if missing:
        others = ", ".join(sorted({usual.partition("/")[0] for usual in source.folders} - {"raw"}))
        raise RuleViolations(
            f"{name} is not complete in {place} (nor in a folder in {folder} called {others})",
            [
                Violation(
                    names[0],
                    "file is there",
                    "missing",
                    str(place / names[0]) + (f", perhaps with {' or '.join(PACKED[1:])}" if len(names) > 1 else ""),
                    f"get the data set from {source.page}",
                )
                for names in missing
            ],
        )
    return files


def _present(source: Source, place: Path) -> dict[str, Path]:
    candidates = ((names[0], place / name) for names in reversed(source.files) for name in reversed(names))
    return {first: path for first, path in candidates if path.exists()}  # of several, the first name remains


def _named_after_another(name: str, place: Path) -> str | None:
    """The data set with files of the same names that a folder is named after, if it is another one."""
    resolved = place.resolve()
    title = resolved.parent.name if resolved.name == "raw" else resolved.name
    for other, source in SOURCES.items():
        shared = source.files == SOURCES[name].files and other != name
        if shared and title in {usual.partition("/")[0] for usual in source.folders} - {"raw"}:
            return other
    return None
