"""Where samples come from before they are shards: folders of images, torchvision's data sets, scikit-learn's digits.

Each gives its samples in an order shuffled by a fixed seed, so that the classes are mixed in every shard.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import numpy as np

from rsb_cluster.data.order import permutation
from rsb_cluster.data.scan import IMAGE_EXTENSIONS
from rsb_cluster.errors import ConfigError, did_you_mean

Sample = tuple[str, bytes, str, int]  # key, image file, its extension, class

SHUFFLE_SEED = 2110_00476  # "ResNet strikes back" is arXiv:2110.00476
SPLITS = ("train", "val")

DIGITS_VAL_SAMPLES = 359  # of 1,797: a fifth


@dataclass(frozen=True)
class Source:
    """Samples that can be read one by one; iterating gives them shuffled, in the same order each time.

    Args:
        description: What it is and where it lies, to be shown.
        classes: Names of the classes 0, 1, ...; may be empty.
        num_samples: How many samples there are.
        read: Gives sample number ``i``, in ``[0, num_samples)``.
    """

    description: str
    classes: tuple[str, ...]
    num_samples: int
    read: Callable[[int], Sample]

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(int(i)) for i in permutation(self.num_samples, SHUFFLE_SEED))


def open_set(source: str, *, root: Path | None = None, split: str | None = None) -> dict[str, Source]:
    """Find what a user means by a source, and open it.

    Args:
        source: ``digits``; the name of a torchvision data set; or a folder (with a ``/`` in it where its name is
            also one of those). A folder with ``train/`` and ``val/`` in it is both; of any other, ``split`` says
            which one it is.
        root: Where a torchvision data set lies.
        split: ``train`` or ``val`` for one of them; both where not given.

    Returns:
        What goes into ``train`` and ``val``, for `rsb_cluster.data.make.make_set`.

    Raises:
        ConfigError: There is no such source, or it is not as it should be.
    """
    if split is not None and split not in SPLITS:
        raise ConfigError(f"the split '{split}' is none of: {', '.join(SPLITS)}.")
    splits = (split,) if split else SPLITS
    if source == "digits":
        return {name: digits(name) for name in splits}
    path = Path(source).expanduser()
    if "/" not in source and source not in (".", ".."):
        from rsb_cluster.data.torchvision_source import data_set_names, torchvision_dataset

        known = data_set_names()
        # A name wins over a folder: torchvision itself puts a folder FashionMNIST into the current one.
        if source in known:
            return {name: torchvision_dataset(source, root, name) for name in splits}
        if not path.is_dir():
            hint = did_you_mean(source, ("digits", *known)) or " A folder is written with a slash: ./folder"
            raise ConfigError(f"'{source}' is neither a folder nor a data set of torchvision.{hint}")
    return _folder_set(path, splits, split)


def _folder_set(path: Path, splits: Sequence[str], split: str | None) -> dict[str, Source]:
    parts = {name: path / name for name in SPLITS}
    if all(part.is_dir() for part in parts.values()):
        # One list of names for both: a class that val lacks must not shift the numbers of the others.
        classes = class_folders(parts["train"])
        return {name: image_folder(parts[name], classes=classes) for name in splits}
    if split is None:
        raise ConfigError(
            f"{path} has no train/ and val/ in it, so it is one part of a set. Say which: --split train or --split val."
        )
    return {split: image_folder(path)}


def class_folders(path: Path) -> tuple[str, ...]:
    """Return the names of a folder's sub-folders, sorted; hidden ones are left out.

    Raises:
        ConfigError: There is no such folder, or it has no sub-folders.
    """
    if not path.is_dir():
        raise ConfigError(f"there is no folder {path}. Check the path.")
    classes = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not _is_hidden(entry.name)))
    if not classes:
        raise ConfigError(f"{path} has no sub-folders. It needs one folder of images for each class.")
    return classes


def image_folder(path: Path, *, classes: Sequence[str] = ()) -> Source:
    """Open a folder of images with one sub-folder per class, as torchvision's ``ImageFolder`` does.

    Image files are kept as they are. Folders may be nested below the class. Files without an image's extension and
    hidden files (macOS leaves ``._x.jpg`` behind) are passed over.

    Args:
        path: The folder.
        classes: The names of the class folders, in the order of their numbers; where empty, those found, sorted.

    Raises:
        ConfigError: There is no class folder, one that is not in ``classes``, or one of the found ones has no image.
    """
    found = class_folders(path)
    names = tuple(classes) or found
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise ConfigError(
            f"{path} has {len(unknown)} class folders that train lacks: {', '.join(unknown[:5])}. "
            "Give both the same class folders, or remove these."
        )
    files = [
        (file.relative_to(path).as_posix(), label) for label, name in enumerate(names) for file in _images(path / name)
    ]
    counts = Counter(label for _, label in files)
    empty = [name for label, name in enumerate(names) if not counts[label]]
    if empty and not classes:
        raise ConfigError(
            f"{len(empty)} class folders in {path} have no image: {', '.join(empty[:5])}. Remove them, or fill them."
        )
    if not files:
        raise ConfigError(f"{path} has no image in its class folders. Images end in: {', '.join(IMAGE_EXTENSIONS)}.")
    keys = safe_keys([file for file, _ in files])

    def read(i: int) -> Sample:
        file, label = files[i]
        return keys[i], (path / file).read_bytes(), extension_of(file), label

    return Source(f"images in {path}", names, len(files), read)


def safe_keys(files: Sequence[str]) -> list[str]:
    """Return a key for each file that survives a tar and webdataset, and tells the file it came from.

    All but ``A-Za-z0-9_-~/`` is percent-encoded: webdataset ends the key at the first dot of the base name, and other
    readers stumble over spaces, quotes and line breaks. ``urllib.parse.unquote`` gives the path back.

    Args:
        files: Relative paths with an extension, all different. Two that differ in the extension only get it appended
            with a ``+``, which is nowhere else in a key.
    """
    stems = Counter(file.rpartition(".")[0] for file in files)
    keys = []
    for file in files:
        stem, _, extension = file.rpartition(".")
        key = _quoted(stem) + ("+" + _quoted(extension) if stems[stem] > 1 else "")
        # webdataset takes what is below a folder like `__x__` for metadata and passes over it.
        keys.append(re.sub(r"^_(?=_[^/]*__(/|$))", "%5F", key))
    return keys


def extension_of(file: str) -> str:
    """Return a file's extension, in lower case and without the dot."""
    return PurePosixPath(file).suffix[1:].lower()


def as_png(image: Any) -> bytes:
    """Return a PIL image as a PNG file, without loss where PNG knows the mode (else it becomes RGB)."""
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def digits(split: str) -> Source:
    """Open scikit-learn's digits: 1,797 grey images of 8 × 8 pixels, 10 classes, from inside the package.

    Values 0 to 16 become 0 to 255. A fixed fifth of each class is val: 359 images; 1,438 are train.

    Raises:
        ConfigError: The split is neither ``train`` nor ``val``.
    """
    if split not in SPLITS:
        raise ConfigError(f"digits has no split '{split}'. It has: {', '.join(SPLITS)}.")
    from PIL import Image
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    images = np.rint(values.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    # Sorted by class, shuffled within it: every fifth place is then a random fifth of each class, to within one.
    order = permutation(len(labels), SHUFFLE_SEED)
    order = order[np.argsort(labels[order], kind="stable")]
    is_val = np.zeros(len(labels), dtype=bool)
    is_val[order[2::5]] = True
    assert is_val.sum() == DIGITS_VAL_SAMPLES
    numbers = np.flatnonzero(is_val if split == "val" else ~is_val)

    def read(i: int) -> Sample:
        number = int(numbers[i])
        return f"digits-{number:04d}", as_png(Image.fromarray(images[number])), "png", int(labels[number])

    return Source(f"scikit-learn's digits, {split}", tuple("0123456789"), len(numbers), read)


def _quoted(text: str) -> str:
    """Percent-encode a path; by its bytes, for a name on disk need not be UTF-8."""
    return quote(os.fsencode(text), safe="/").replace(".", "%2E")


def _images(folder: Path) -> Iterator[Path]:
    """Yield the image files below a folder, in a fixed order."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in sorted(files):
            if extension_of(name) in IMAGE_EXTENSIONS and not _is_hidden(name):
                yield Path(parent, name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
