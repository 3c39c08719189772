"""The index of a data set: a file next to the shards with the class and the position of each sample.

It makes counts exact and lets a reader start anywhere with one range request. It is an uncompressed ``.npz``: the same
shards give the same bytes on every machine, unlike a compressed file, which depends on the zlib version.

Shards in a folder that cannot be written to, or with those of another split, have their index in another one. It then
names their folder, in a format of its own, as earlier versions would look for them beside the index.

Its digest, which is part of a run's id, is one of the data: where they lie, how their shards are named and the format
of the file are not in it. An index of format 1 keeps the digest that runs know it by, that of the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsb_cluster.config.schema import newer_version
from rsb_cluster.errors import ConfigError, DataError, MissingError
from rsb_cluster.storage.store import Store

INDEX_NAME = "index.npz"
CLASSES_NAME = "classes.json"
SHARD_SUFFIX = ".tar"

Progress = Callable[[int, int], None]  # (done, total); a total of 0 means unknown

_FORMAT = 2
_PLACED_FORMAT = 3  # as 2, and names the folder of the shards
_FILE_DIGEST_FORMAT = 1  # its digest is that of the file; all else is as in format 2
_BLOCK_BYTES = 512  # of a tar
_ZIP = b"PK"
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The index of a folder with S shards and N samples, which are numbered in the order of the shards.

    Arrays are read-only. Offsets are in bytes from the start of the sample's shard.
    """

    shards: tuple[str, ...]  # file names in the folder, sorted
    shard_bytes: NDArray[np.int64]  # (S,)
    shard_sha256: tuple[str, ...]
    shard_start: NDArray[np.int64]  # (S + 1,) number of the first sample of each shard, and N
    labels: NDArray[np.int32]  # (N,) class of each sample
    offsets: NDArray[np.int64]  # (N,) first byte of the sample's first tar header (be it that of a long name)
    stops: NDArray[np.int64]  # (N,) byte after the (512-padded) last member of the sample
    image_offsets: NDArray[np.int64]  # (N,) first byte of the image file
    image_sizes: NDArray[np.int64]  # (N,) bytes of the image file
    key_bytes: bytes  # UTF-8 of all keys, one after the other
    key_starts: NDArray[np.int64]  # (N + 1,) first byte of each key in `key_bytes`, and its length
    classes: tuple[str, ...]  # class names, may be empty
    num_classes: int
    digest: str  # SHA-256 (hex) of the content (`content_digest`), or of the file for one of format 1
    place: str = ""  # folder of the shards, absolute or from that of the index; empty where they lie beside it

    @property
    def num_samples(self) -> int:
        """Number of samples of the data set."""
        return len(self.labels)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class, all different: with its number where two have one name (ImageNet has two cranes).

        A class without a name, as in somebody's shards, is called by its number.
        """
        names = (*self.classes, *map(str, range(len(self.classes), self.num_classes)))
        times = Counter(names)
        return tuple(f"{name} ({i})" if times[name] > 1 else name for i, name in enumerate(names))

    def has_digest(self, digest: str) -> bool:
        """Whether a digest is one of these data, be it of the content or of an index file of format 1."""
        return digest in (self.digest, content_digest(self)) or digest == _file_digest(self)

    def shard_of(self, sample: NDArray[np.integer[Any]]) -> NDArray[np.intp]:
        """Return the numbers of the shards that hold the samples (any shape, each in ``[0, N)``)."""
        return np.searchsorted(self.shard_start, sample, side="right") - 1

    def key(self, sample: int) -> str:
        """Return a sample's key: webdataset's ``__key__``."""
        start, stop = self.key_starts[sample : sample + 2]
        return self.key_bytes[start:stop].decode("utf-8", "surrogateescape")


def shards_of(store: Store, index: ShardIndex) -> Store:
    """Return the folder of the shards of an index that lies in ``store``."""
    if not index.place:
        return store
    if "://" in index.place or index.place.startswith("/"):
        return Store(index.place)
    url = store.url
    for part in index.place.split("/"):
        url = url.rpartition("/")[0] if part == ".." else f"{url}/{part}"
    return Store(url)


def load_index(store: Store) -> ShardIndex:
    """Read a data set's index.

    Raises:
        DataError: There is no index, or it is damaged.
        NewerVersionError: A newer version wrote it.
        StorageError: The folder could not be read.
    """
    url = store.locate(INDEX_NAME)
    try:
        content = store.read_bytes(INDEX_NAME)
    except MissingError as error:
        hint = f"Make it: rsb-cluster shards index {shlex.quote(store.url)}{' -o FOLDER' if store.is_read_only else ''}"
        if store.exists(f"train/{INDEX_NAME}"):
            hint = f"This folder holds the splits of a set; did you mean {store.url}/train or {store.url}/val?"
        raise DataError(f"the data set has no index: there is no {url}. {hint}") from error
    try:
        return _unpack(content, url)
    # Raised for a damaged zip, a damaged npy header or wrong metadata; zip's CRC detects a changed byte of data.
    except (zipfile.BadZipFile, ValueError, LookupError, TypeError, EOFError, OSError, NotImplementedError) as error:
        raise DataError(
            f"{url} is damaged: {error}. Remove it, then make it again: rsb-cluster shards index "
            f"{shlex.quote(store.url)}"
        ) from error


def save_index(store: Store, index: ShardIndex) -> None:
    """Write the index file of a folder: the last file of a data set."""
    store.write_bytes(INDEX_NAME, _pack(index, _PLACED_FORMAT if index.place else _FORMAT))


def is_shard_index(store: Store) -> bool:
    """Whether the file of the index's name is an index of this package, damaged or not."""
    with store.open(INDEX_NAME) as file:
        try:
            return {"meta.npy", "shard_start.npy"} <= set(zipfile.ZipFile(file).namelist())
        except zipfile.BadZipFile:
            return False


def content_digest(index: ShardIndex) -> str:
    """Return the SHA-256 (hex) of what the samples are: shards' contents in their order, classes, images and keys.

    Numbers are hashed as 64-bit ones, so the digest outlives a format that stores them in another size.
    """
    head = [list(index.shard_sha256), list(index.classes), index.num_classes]
    digest = hashlib.sha256(json.dumps(head).encode())
    for array in (index.shard_start, index.labels, index.image_offsets, index.image_sizes, index.key_starts):
        digest.update(array.astype("<i8", copy=False).tobytes())
    digest.update(index.key_bytes)
    return digest.hexdigest()


def shard_names(store: Store) -> list[str]:
    """Return the file names of a folder's shards, sorted."""
    return sorted(name for name, is_file in store.entries().items() if is_file and name.endswith(SHARD_SUFFIX))


def read_classes(store: Store) -> tuple[str, ...]:
    """Return the class names of a folder, empty if there is no ``classes.json``. Raises DataError if it is invalid."""
    if not store.exists(CLASSES_NAME):
        return ()
    value = store.read_json(CLASSES_NAME)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise DataError(f'{store.locate(CLASSES_NAME)} is not a list of class names. Write it as ["name of 0", ...].')
    return tuple(value)


def check_class_names(name: str, classes: Sequence[str], other: str, others: Sequence[str]) -> None:
    """Refuse lists of class names that give a number two names. An empty or shorter list contradicts nothing.

    Args:
        name: Whose classes they are, for the message.
        classes: Names of the classes 0, 1, ...; empty if unknown.
        other: Whose the others are: the folder of a split.
        others: Likewise.

    Raises:
        ConfigError: The names of a class differ.
    """
    for number, (first, second) in enumerate(zip(classes, others, strict=False)):
        if first != second:
            raise ConfigError(
                f"class {number} is '{first}' for {name} and '{second}' in {other}: the predictions would be misread. "
                f"Make the shards of {other} again with the classes in the other's order; where only {CLASSES_NAME} is "
                f"wrong, correct it and run: rsb-cluster shards index {shlex.quote(other)}"
            )


def _pack(index: ShardIndex, format_: int) -> bytes:
    """Return the index file's bytes; they depend on the arguments only (zip entries are dated 1980-01-01)."""
    meta = {
        "format": format_,
        "shards": list(index.shards),
        "sha256": list(index.shard_sha256),
        "classes": list(index.classes),
        "num_classes": index.num_classes,
    }
    if format_ == _PLACED_FORMAT:
        meta["place"] = index.place
    buffer = io.BytesIO()
    # Little-endian on every machine: the bytes must not depend on it.
    np.savez(
        buffer,
        meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8),
        shard_bytes=index.shard_bytes.astype("<i8"),
        shard_start=index.shard_start.astype("<i8"),
        labels=index.labels.astype("<i4"),
        offsets=index.offsets.astype("<i8"),
        stops=index.stops.astype("<i8"),
        image_offsets=index.image_offsets.astype("<i8"),
        image_sizes=index.image_sizes.astype("<i8"),
        key_bytes=np.frombuffer(index.key_bytes, dtype=np.uint8),
        key_starts=index.key_starts.astype("<i8"),
    )
    return buffer.getvalue()


def _file_digest(index: ShardIndex) -> str:
    """Return the digest of these data as an index file of format 1."""
    return hashlib.sha256(_pack(index, _FILE_DIGEST_FORMAT)).hexdigest()


def _unpack(content: bytes, url: str) -> ShardIndex:
    """Parse an index file's bytes. Raises ValueError (or what zipfile and numpy raise) if they are invalid."""
    if not content.startswith(_ZIP):  # numpy would say that it is a pickle, and how to execute that
        raise ValueError(f"it is no .npz file ({len(content):,} bytes)")
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(arrays.pop("meta").tobytes())
    if meta["format"] not in (_FILE_DIGEST_FORMAT, _FORMAT, _PLACED_FORMAT):
        raise newer_version(url, f"format {meta['format']}")
    index = ShardIndex(
        shards=tuple(meta["shards"]),
        shard_sha256=tuple(meta["sha256"]),
        classes=tuple(meta["classes"]),
        num_classes=meta["num_classes"],
        key_bytes=arrays.pop("key_bytes").tobytes(),
        digest="",
        place=meta["place"] if meta["format"] == _PLACED_FORMAT else "",
        **arrays,
    )
    is_file = meta["format"] == _FILE_DIGEST_FORMAT
    return checked_index(
        replace(index, digest=hashlib.sha256(content).hexdigest() if is_file else content_digest(index))
    )


def checked_index(index: ShardIndex) -> ShardIndex:
    """Return the index with its arrays read-only.

    Raises:
        ValueError: Parts of it contradict each other: a reader would silently read the wrong bytes.
    """
    per_shard, per_sample = len(index.shards), index.num_samples
    if not len(index.shard_sha256) == len(index.shard_bytes) == len(index.shard_start) - 1 == per_shard:
        raise ValueError("its lists of shards differ in length")
    if not isinstance(index.place, str):
        raise ValueError("it does not name the folder of its shards")
    # Both become file names: in the folder of the shards, and in the cache.
    if any("/" in name for name in index.shards) or not all(map(_SHA256.fullmatch, index.shard_sha256)):
        raise ValueError("it names a shard in another folder, or an invalid checksum")
    for array in (index.offsets, index.stops, index.image_offsets, index.image_sizes, index.key_starts[1:]):
        if array.shape != (per_sample,):
            raise ValueError("its lists of samples differ in length")
    for starts, total in ((index.shard_start, per_sample), (index.key_starts, len(index.key_bytes))):
        if starts[0] != 0 or starts[-1] != total or (np.diff(starts) < 0).any():
            raise ValueError("its counts do not add up")
    ends = index.shard_bytes[index.shard_of(np.arange(per_sample))]
    inside = (
        (index.offsets >= 0)
        & (index.offsets % _BLOCK_BYTES == 0)
        & (index.offsets < index.image_offsets)
        & (index.image_sizes > 0)
        & (index.image_offsets + index.image_sizes <= index.stops)
        & (index.stops <= ends)
    )
    if not inside.all():
        raise ValueError(f"sample {int(np.argmin(inside))} lies outside of its shard")
    if per_sample == 0 or index.labels.min() < 0 or index.labels.max() >= index.num_classes:
        raise ValueError("it has no samples, or a class outside of its number of classes")
    for array in vars(index).values():
        if isinstance(array, np.ndarray):
            array.setflags(write=False)
    return index
