"""`DataSource`, the interface of all sources of samples, and helpers that they share."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from rsb_cluster.data.labels import LabelFile
from rsb_cluster.data.left_out import printable
from rsb_cluster.data.order import Ints, permutation
from rsb_cluster.errors import ConfigError

Sample = tuple[str, bytes, str, int]  # key, image file, its extension, class

SHUFFLE_SEED = 2110_00476  # "ResNet strikes back" is arXiv:2110.00476
SPLITS = ("train", "val")

# Number of blocks of a source whose samples are shuffled together: a shard reads from at most so many.
_WINDOW_BLOCKS = 64


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turn an error of the file system about the user's files into a ConfigError.

    Args:
        what: What is read, where the error does not name the file.
    """
    try:
        yield
    except OSError as error:
        name = printable(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | Path) else what
        raise ConfigError(f"cannot read {name}: {error.strerror or error}. Check it, and its permissions.") from error


def key_of(entry: Any) -> str | None:
    """Return the key of an entry's sample: the entry's first element, if it is text."""
    return entry[0] if isinstance(entry, tuple) and isinstance(entry[0], str) else None


def class_in_entry(entry: Any) -> int | None:
    """Return the class of an entry that has a key: its first number. None of any other entry."""
    if key_of(entry) is None:
        return None
    return next((value for value in entry if isinstance(value, int)), None)


def _key_or_number(entry: Any) -> str:
    return key_of(entry) or str(entry)


@dataclass(frozen=True)
class DataSource:
    """Samples that can be read one by one; iterating yields them shuffled, always in the same order.

    Args:
        description: What it is and where it lies, for messages.
        classes: Names of the classes 0, 1, ...; may be empty.
        entries: One plain value (a number, or a tuple of numbers and strings) per sample, in the order in which the
            samples are stored.
        read: Reads the sample of an entry. It must be picklable to be used in other processes.
        block_samples: Number of samples of each block, if samples can only be read in blocks (parquet's row groups).
        labels: Label sets to write next to the index, by their name.
        data_set: Its name in datasets.toml; empty for the user's own.
        sizes: Size of the image file of each entry, bytes; empty if unknown without reading the files.
        packed: Sizes, in bytes, of files that hold many images each (parquet), by name.
        folder: Folder in which each sub-folder is a class, so that no shards may be written there; None if there is
            none.
        show: Returns an entry's name for messages.
        class_of: Returns an entry's class without its image; None where only ``read`` tells.
        notes: What was left out, and what else the user should know before shards are made.
    """

    description: str
    classes: tuple[str, ...]
    entries: Sequence[Any]
    read: Callable[[Any], Sample]
    block_samples: tuple[int, ...] = ()
    labels: Mapping[str, LabelFile] = field(default_factory=dict)
    data_set: str = ""
    sizes: Sequence[int] = ()
    packed: Mapping[str, int] = field(default_factory=dict)
    folder: Path | None = None
    show: Callable[[Any], str] = _key_or_number
    class_of: Callable[[Any], int | None] = class_in_entry
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.sizes) not in (0, len(self.entries)):
            raise ValueError(f"{len(self.sizes)} sizes of {len(self.entries)} entries")

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Sample]:
        return (self.sample(int(i)) for i in self.order())

    def sample(self, i: int) -> Sample:
        """Return sample number ``i``, in the order in which they are stored."""
        return self.read(self.entries[i])

    def order(self) -> Ints:
        """Return the numbers of the samples in the order in which they are written: shuffled, so that classes mix.

        First the blocks are shuffled, and then the samples of a few dozen blocks at a time: a full permutation would
        read a whole block for each sample.
        """
        if not self.block_samples:
            return permutation(len(self), SHUFFLE_SEED)
        starts = np.concatenate([[0], np.cumsum(self.block_samples)])
        blocks = permutation(len(self.block_samples), SHUFFLE_SEED)
        windows = []
        for number, first in enumerate(range(0, len(blocks), _WINDOW_BLOCKS)):
            chosen = blocks[first : first + _WINDOW_BLOCKS]
            samples = np.concatenate([np.arange(starts[block], starts[block + 1]) for block in chosen])
            windows.append(samples[permutation(len(samples), SHUFFLE_SEED, number)])
        return np.concatenate(windows) if windows else np.empty(0, dtype=np.int64)

    def keys(self) -> list[str]:
        """Return the keys of the samples in the order in which they are stored; empty if unknown without reading."""
        keys = [key_of(entry) for entry in self.entries]
        return [key for key in keys if key is not None] if None not in keys else []

    def listing(self) -> str:
        """Return the SHA-256 (hex) of the entries: a different one means different samples."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(repr(entry).encode("utf-8", "surrogateescape") + b"\n")
        return digest.hexdigest()


def safe_keys(files: Sequence[str]) -> list[str]:
    """Return a key for each file that is safe in a tar and in webdataset, and can be converted back to the path.

    All but ``A-Za-z0-9_-~/`` is percent-encoded: webdataset ends the key at the first dot of the base name, and other
    readers fail on spaces, quotes and line breaks. ``urllib.parse.unquote`` returns the path.

    Args:
        files: Relative paths, all different. If two differ only in the extension, it is appended to
            both with a ``+``, which occurs nowhere else in a key.
    """
    stems = Counter(_split(file)[0] for file in files)
    keys = []
    for file in files:
        stem, extension = _split(file)
        key = _quoted(stem) + ("+" + _quoted(extension) if stems[stem] > 1 else "")
        # webdataset takes files below a folder like `__x__` for metadata and skips them.
        keys.append(re.sub(r"^_(?=_[^/]*__(/|$))", "%5F", key))
    return keys


def extension_of(file: str) -> str:
    """Return a file's extension, in lower case and without the dot."""
    name = file.rpartition("/")[2]
    dot = name.rfind(".")
    return name[dot + 1 :].lower() if dot > 0 else ""


def as_png(image: Any) -> bytes:
    """Return a PIL image as a PNG file, lossless if PNG supports the mode (else converted to RGB)."""
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _split(file: str) -> tuple[str, str]:
    """Return a path without its extension, and the extension (which may be empty) as it is written."""
    stem, _, extension = file.rpartition(".")
    return (stem, extension) if extension_of(file) else (file, "")


def _quoted(text: str) -> str:
    """Percent-encode the bytes of a path, as a name on disk need not be UTF-8."""
    return quote(os.fsencode(text), safe="/").replace(".", "%2E")
