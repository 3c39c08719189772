"""torchvision's data sets as sources of samples. They are read from disk; nothing is downloaded."""

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

from rsb_cluster.data.scan import IMAGE_EXTENSIONS
from rsb_cluster.data.sources.source import DataSource, Sample, as_png, extension_of
from rsb_cluster.errors import ConfigError, did_you_mean

# Where Debian's package dataset-fashion-mnist puts it.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

# What our train and val are in a data set with three parts or with other names for them.
_USUAL_SPLITS: dict[str, dict[str, tuple[str, ...]]] = {
    # Table 5 of the paper: 2,040 images to train on, 6,149 to test. torchvision's "train" alone has 1,020.
    "Flowers102": {"train": ("train", "val"), "val": ("test",)},
    # The authors of these two give one number, on test, after training on the rest.
    "FGVCAircraft": {"train": ("trainval",), "val": ("test",)},
    "OxfordIIITPet": {"train": ("trainval",), "val": ("test",)},
}
# Tried in this order with other data sets.
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
    """Open a data set of torchvision that lies on disk.

    Image files are kept as they are where torchvision reads files one by one through a ``loader``; else the images
    become PNG files, without loss.

    Args:
        name: The class's name in ``torchvision.datasets``.
        root: What torchvision calls root. For MNIST and its like also a folder that holds the idx files themselves,
            packed or not, as Debian's package dataset-fashion-mnist ships them; ``None`` finds that package.
        split: ``train`` or ``val``, or what the class itself calls a part.

    Raises:
        ConfigError: There is no such data set or part, its files are not there, or it is not one of images and classes.
    """
    if name not in data_set_names():
        raise ConfigError(f"torchvision has no data set '{name}'.{did_you_mean(name, data_set_names())}")
    if root is None and name == "FashionMNIST" and DEBIAN_FASHION_MNIST.is_dir():
        root = DEBIAN_FASHION_MNIST
    if root is None:
        raise ConfigError(f"where does {name} lie? Say so with --root FOLDER (nothing is downloaded).")
    parts = _parts(name, root.expanduser(), split)
    _check_sample(name, parts[0])
    return DataSource(
        f"torchvision's {name} in {root}, {split}",
        _class_names(parts[0]),
        range(sum(len(part) for part in parts)),
        _ReadItem(name, root.expanduser(), split),
    )


@dataclass(frozen=True)
class _ReadItem:
    """Reads entries that are the numbers of items. A process opens the data set when it reads its first one."""

    name: str
    root: Path
    split: str

    def __call__(self, entry: int) -> Sample:
        position = entry
        for part in _parts(self.name, self.root, self.split):
            if position < len(part):
                image, label = part[position]
                content, extension = _encoded(image)
                return f"{self.name}-{self.split}-{entry:07d}", content, extension, int(label)
            position -= len(part)
        raise IndexError(entry)


@cache
def _parts(name: str, root: Path, split: str) -> list[Any]:
    from torchvision import datasets

    return _open_parts(getattr(datasets, name), root, split)


def _open_parts(kind: Any, root: Path, split: str) -> list[Any]:
    """Return the data sets which together are the split; most often one."""
    options: dict[str, Any] = {}
    if _accepts(kind, "download"):
        options["download"] = False  # a few have True as default
    if _accepts(kind, "loader"):
        options["loader"] = Path  # a data set then gives the path, and the file can be kept as it is
    if _accepts(kind, "train"):
        if split not in ("train", "val", "test"):
            raise ConfigError(f"{kind.__name__} has no split '{split}'. It has: train, val (which is its test).")
        return [_open(kind, root, {**options, "train": split == "train"})]
    if not _accepts(kind, "split"):
        raise ConfigError(
            f"{kind.__name__} is not cut into train and val. Use its folder of images with --split instead."
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
    """Make the data set; say what it looked for where that is not there."""
    try:
        with _in_layout_of(kind, root) as found:
            return kind(root=found, **options)
    except (RuntimeError, OSError) as error:
        there = sorted(entry.name for entry in root.iterdir())[:8] if root.is_dir() else None
        state = f"that folder holds {', '.join(there) or 'nothing'}" if there is not None else "there is no such folder"
        raise ConfigError(
            f"torchvision finds no {kind.__name__} in {root}: {error} It looks for {_looked_for(kind, root)}; {state}. "
            "Put the files there, or give another --root (nothing is downloaded)."
        ) from error
    except TypeError as error:
        raise ConfigError(
            f"torchvision's {kind.__name__} cannot be opened: {error}. Use its folder of images instead."
        ) from error
    except ModuleNotFoundError as error:
        raise ConfigError(f"torchvision's {kind.__name__} needs {error.name}. Run: pip install {error.name}") from error


@contextmanager
def _in_layout_of(kind: Any, root: Path) -> Iterator[Path]:
    """Give a root in which torchvision finds MNIST and its like, where the idx files lie in the folder itself.

    They are put into a temporary folder; it may go when the data set is made, which has read all by then.
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
    """Return the names of the files that MNIST and its like are made of; of other data sets, none."""
    from torchvision import datasets

    if not issubclass(kind, datasets.MNIST) or not isinstance(getattr(kind, "resources", None), list):
        return []
    return [name for name, _ in kind.resources]


def _looked_for(kind: Any, root: Path) -> str:
    """Name the files that a data set wants, as far as its class tells."""
    idx = [name.removesuffix(".gz") for name in _idx_files(kind)]
    if idx:
        return f"{', '.join(idx)} in {root / kind.__name__ / 'raw'} or, also with .gz, in {root}"
    base = getattr(kind, "base_folder", "")
    lists = (*getattr(kind, "train_list", ()), *getattr(kind, "test_list", ()))
    described = getattr(kind, "_file_dict", {})
    files = [entry[0] for entry in (*lists, *(described.values() if isinstance(described, dict) else ()))]
    if not files:
        return f"what https://pytorch.org/vision/stable/datasets.html says of {kind.__name__}"
    return f"{', '.join(map(str, files))} in {root / base if isinstance(base, str) else root}"


def _accepts(kind: Any, argument: str) -> bool:
    """Whether a class, or one that it hands further arguments on to, takes an argument."""
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
    # An index is what int, and NumPy's and torch's whole numbers, can be turned into; a name, a box or None cannot.
    if not is_pair or not hasattr(sample[1], "__index__"):
        raise ConfigError(
            f"torchvision's {name} does not give an image and a class number, so it is not for classification. "
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
