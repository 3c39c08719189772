"""torchvision's data sets as sources of samples, read from disk; nothing is downloaded."""

from __future__ import annotations

import gzip
import inspect
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rsb_cluster.data.image_files import IMAGE_EXTENSIONS
from rsb_cluster.data.sources.source import DataSource, Sample, as_png, extension_of
from rsb_cluster.errors import ConfigError, did_you_mean, expand_home

# The folder of Debian's package dataset-fashion-mnist.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

# Our train and val in data sets with three splits or with other names for them.
_USUAL_SPLITS: dict[str, dict[str, tuple[str, ...]]] = {
    # Table 5 of the paper: 2,040 images to train on, 6,149 to test. torchvision's "train" alone has 1,020.
    "Flowers102": {"train": ("train", "val"), "val": ("test",)},
    # The authors of these two report one number, on test, after training on the rest.
    "FGVCAircraft": {"train": ("trainval",), "val": ("test",)},
    "OxfordIIITPet": {"train": ("trainval",), "val": ("test",)},
}
# Tried in this order for other data sets.
_OTHER_SPLITS = {"train": ("train", "train-standard"), "val": ("val", "valid", "test")}


def data_set_names() -> list[str]:
    """Return the names of torchvision's data sets, sorted. Imports torchvision."""
    from torchvision import datasets

    return sorted(
        name
        for name in datasets.__all__
        if inspect.isclass(getattr(datasets, name)) and issubclass(getattr(datasets, name), datasets.VisionDataset)
    )


def torchvision_dataset(name: str, root: Path | None, split: str) -> DataSource:
    """Open a torchvision data set on disk.

    Image files are kept as they are if torchvision reads files one by one through a ``loader``; else the images become
    PNG files, without loss.

    Args:
        name: The class's name in ``torchvision.datasets``.
        root: torchvision's root. For MNIST and similar data sets also a folder with the idx files themselves,
            compressed or not, as in Debian's package dataset-fashion-mnist; ``None`` finds that package.
        split: ``train`` or ``val``, or a split of the class itself.

    Raises:
        ConfigError: There is no such data set or split, its files are missing, or it is not for classification.
    """
    if name not in data_set_names():
        raise ConfigError(f"torchvision has no data set '{name}'.{did_you_mean(name, data_set_names())}")
    if root is None and name == "FashionMNIST" and DEBIAN_FASHION_MNIST.is_dir():
        root = DEBIAN_FASHION_MNIST
    if root is None:
        raise ConfigError(f"{name} needs --root FOLDER, the folder with its files (nothing is downloaded).")
    read = _ReadItem(name, expand_home(root), split)
    parts = _parts(name, expand_home(root), split)
    _check_sample(name, parts[0])
    return DataSource(
        f"torchvision's {name} in {root}, {split}",
        _class_names(parts[0]),
        range(sum(len(part) for part in parts)),
        read,
        class_of=read.class_of,
    )


@dataclass(frozen=True)
class _ReadItem:
    """Reads the item with an entry's number. A process opens the data set when it reads its first item."""

    name: str
    root: Path
    split: str

    def __call__(self, entry: int) -> Sample:
        image, label = self._item(entry)
        content, extension = _encoded(image)
        return f"{self.name}-{self.split}-{entry:07d}", content, extension, label

    def class_of(self, entry: int) -> int:
        """Return an item's class. torchvision has no common way to ask for it alone, so the image is opened, too."""
        return self._item(entry)[1]

    def _item(self, entry: int) -> tuple[Any, int]:
        position = entry
        for part in _parts(self.name, self.root, self.split):
            if position < len(part):
                image, label = part[position]
                return image, int(label)
            position -= len(part)
        raise IndexError(entry)


@cache
def _parts(name: str, root: Path, split: str) -> list[Any]:
    from torchvision import datasets

    return _open_parts(getattr(datasets, name), root, split)


def _open_parts(kind: Any, root: Path, split: str) -> list[Any]:
    """Return the data sets that form the split together; usually one."""
    options: dict[str, Any] = {}
    if _accepts(kind, "download"):
        options["download"] = False  # some have True as default
    if _accepts(kind, "loader"):
        options["loader"] = Path  # a data set then returns the path, and the file can be kept as it is
    if _accepts(kind, "train"):
        if split not in ("train", "val", "test"):
            raise ConfigError(f"{kind.__name__} has no split '{split}'. It has: train, val (its test split).")
        return [_open(kind, root, {**options, "train": split == "train"})]
    if not _accepts(kind, "split"):
        raise ConfigError(
            f"{kind.__name__} has no train and val splits. Use its folder of images with --split instead."
        )
    usual = _USUAL_SPLITS.get(kind.__name__, {}).get(split)
    if usual:
        return [_open(kind, root, {**options, "split": part}) for part in usual]
    refused: ValueError | None = None
    for part in _OTHER_SPLITS.get(split, (split,)):
        try:
            return [_open(kind, root, {**options, "split": part})]
        except ValueError as error:  # "Unknown value 'val' for argument split. Valid values are ..."
            refused = error
    raise ConfigError(f"{kind.__name__} has no split '{split}': {refused}") from refused


def _open(kind: Any, root: Path, options: dict[str, Any]) -> Any:
    """Create the data set; if its files are missing, the error names them."""
    try:
        with _torchvision_root(kind, root) as found:
            return kind(root=found, **options)
    except (RuntimeError, OSError) as error:
        names = sorted(entry.name for entry in root.iterdir())[:8] if root.is_dir() else None
        state = f"that folder holds {', '.join(names) or 'nothing'}" if names is not None else "there is no such folder"
        raise ConfigError(
            f"torchvision finds no {kind.__name__} in {root}: {error} It needs {_needed_files(kind, root)}; {state}. "
            "Put the files there, or use another --root (nothing is downloaded)."
        ) from error
    except TypeError as error:
        raise ConfigError(
            f"torchvision's {kind.__name__} cannot be opened: {error}. Use its folder of images instead."
        ) from error
    except ModuleNotFoundError as error:
        raise ConfigError(f"torchvision's {kind.__name__} needs {error.name}. Run: pip install {error.name}") from error


@contextmanager
def _torchvision_root(kind: Any, root: Path) -> Iterator[Path]:
    """Yield the root for torchvision: for MNIST and similar data sets, whose idx files are in root, a temporary folder.

    It can be removed once the data set is created, which has read everything by then.
    """
    names = [file.removesuffix(".gz") for file in _idx_files(kind)]
    found = {name: file for name in names for file in (root / name, root / f"{name}.gz") if file.is_file()}
    if not names or set(found) != set(names):
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="rsb-cluster-") as folder:
        raw = Path(folder, kind.__name__, "raw")
        raw.mkdir(parents=True)
        for name, file in found.items():
            with (
                gzip.open(file) if file.suffix == ".gz" else file.open("rb") as source,
                (raw / name).open("wb") as copy,
            ):
                shutil.copyfileobj(source, copy)
        yield Path(folder)


def _idx_files(kind: Any) -> list[str]:
    """Return the names of the files of MNIST and similar data sets; none for others."""
    from torchvision import datasets

    if not issubclass(kind, datasets.MNIST) or not isinstance(getattr(kind, "resources", None), list):
        return []
    return [name for name, _ in kind.resources]


def _needed_files(kind: Any, root: Path) -> str:
    """Describe the files that a data set needs, as far as its class tells."""
    idx = [name.removesuffix(".gz") for name in _idx_files(kind)]
    if idx:
        return f"{', '.join(idx)} in {root / kind.__name__ / 'raw'} or, also with .gz, in {root}"
    base = getattr(kind, "base_folder", "")
    lists = (*getattr(kind, "train_list", ()), *getattr(kind, "test_list", ()))
    described = getattr(kind, "_file_dict", {})
    files = [entry[0] for entry in (*lists, *(described.values() if isinstance(described, dict) else ()))]
    if not files:
        return f"the files described at https://pytorch.org/vision/stable/datasets.html for {kind.__name__}"
    return f"{', '.join(map(str, files))} in {root / base if isinstance(base, str) else root}"


def _accepts(kind: Any, argument: str) -> bool:
    """Whether a class, or one to which it passes further arguments, accepts an argument."""
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters
        if argument in parameters:
            return True
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return False
    return False


def _check_sample(name: str, part: Any) -> None:
    from PIL import Image

    if not len(part):
        raise ConfigError(f"torchvision's {name} is empty. Check its folder.")
    sample = part[0]
    is_pair = isinstance(sample, tuple) and len(sample) == 2 and isinstance(sample[0], Image.Image | Path)
    # int and the integers of NumPy and torch have __index__; a name, a box or None does not.
    if not is_pair or not hasattr(sample[1], "__index__"):
        raise ConfigError(
            f"torchvision's {name} does not return an image and a class number, so it is not for classification. "
            "Choose another data set, or make a folder of images."
        )


def _encoded(image: Any) -> tuple[bytes, str]:
    """Return an image's file and its extension."""
    if isinstance(image, Path):
        if extension_of(image.name) in IMAGE_EXTENSIONS:
            return image.read_bytes(), extension_of(image.name)
        from PIL import Image

        with Image.open(image) as opened:
            return as_png(opened), "png"
    return as_png(image), "png"


def _class_names(data_set: Any) -> tuple[str, ...]:
    names: Sequence[Any] = getattr(data_set, "classes", ())
    # ImageNet's are tuples of synonyms.
    return tuple(", ".join(name) if isinstance(name, tuple | list) else str(name) for name in names)
