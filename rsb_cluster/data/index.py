"""The index of a data set: a file next to the shards with the class and the position of each sample.

It makes counts exact and lets a reader start anywhere with one range request. It is an uncompressed ``.npz``: the same
shards give the same bytes (and digest) on every machine, unlike a compressed file, which depends on the zlib version.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsb_cluster.config.schema import newer_version
from rsb_cluster.data.pool import parallel_map
from rsb_cluster.data.scan import ShardScan, scan_shard
from rsb_cluster.errors import ConfigError, DataError, MissingError
from rsb_cluster.storage.store import Store

INDEX_NAME = "index.npz"
CLASSES_NAME = "classes.json"
SHARD_SUFFIX = ".tar"

Progress = Callable[[int, int], None]  # (done, total); a total of 0 means unknown

_FORMAT = 1
_BLOCK_BYTES = 512  # of a tar
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
    digest: str  # SHA-256 (hex) of the index file's bytes

    @property
    def num_samples(self) -> int:
        """Number of samples of the data set."""
        return len(self.labels)

    def shard_of(self, sample: NDArray[np.integer[Any]]) -> NDArray[np.intp]:
        """Return the numbers of the shards that hold the samples (any shape, each in ``[0, N)``)."""
        return np.searchsorted(self.shard_start, sample, side="right") - 1

    def key(self, sample: int) -> str:
        """Return a sample's key: webdataset's ``__key__``."""
        start, stop = self.key_starts[sample : sample + 2]
        return self.key_bytes[start:stop].decode("utf-8", "surrogateescape")


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
        hint = f"Make it: rsb-cluster shards index {store.url}"
        if store.exists(f"train/{INDEX_NAME}"):
            hint = f"This folder holds the splits of a set; did you mean {store.url}/train?"
        raise DataError(f"the data set has no index: there is no {url}. {hint}") from error
    try:
        return _unpack(content, url)
    # Raised for a damaged zip, a damaged npy header or wrong metadata; zip's CRC detects a changed byte of data.
    except (zipfile.BadZipFile, ValueError, LookupError, TypeError, EOFError, OSError, NotImplementedError) as error:
        raise DataError(
            f"{url} is damaged: {error}. Remove it, then make it again: rsb-cluster shards index {store.url}"
        ) from error


def build_index(
    store: Store, *, workers: int | None = 1, classes: Sequence[str] = (), progress: Progress | None = None
) -> ShardIndex:
    """Read every shard of a folder once, and write the index.

    Args:
        store: The folder. Files in it that are not ``*.tar`` are ignored.
        workers: Number of processes that read shards (see `rsb_cluster.data.pool.parallel_map`).
        classes: Names of the classes 0, 1, ...; if empty, those in the folder's ``classes.json``, if it exists.
        progress: Called after each shard with the number of shards done and their total.

    Raises:
        DataError: There is no shard, or one is invalid (see `scan_shard`). No index is written then.
        ConfigError: The folder holds a file of the index's name that is no index.
        StorageError: The folder could not be read or written.
    """
    if store.exists(INDEX_NAME) and not _is_shard_index(store):
        raise ConfigError(f"{store.locate(INDEX_NAME)} is not an index of shards. Move it away, then try again.")
    shards = shard_names(store)
    if not shards:
        packed = [name for name in store.names() if SHARD_SUFFIX in name or name.endswith(".tgz")]
        hint = f"Unpack {packed[0]} to a plain .tar first." if packed else "Make shards: rsb-cluster shards make"
        raise DataError(f"there are no *{SHARD_SUFFIX} files in {store.url}. {hint}")
    names = tuple(classes) or read_classes(store)
    scans = []
    for scan in parallel_map(scan_shard, [store] * len(shards), shards, workers=workers):
        scans.append(scan)
        if progress is not None:
            progress(len(scans), len(shards))
    return write_index(store, shards, scans, names)


def write_index(store: Store, shards: Sequence[str], scans: Sequence[ShardScan], classes: Sequence[str]) -> ShardIndex:
    """Write the index of scanned shards: the last file of a data set.

    Args:
        store: The folder.
        shards: The file names of the shards, sorted.
        scans: The scan of each shard.
        classes: Names of the classes 0, 1, ...
    """
    content = _pack(shards, scans, classes)
    index = _unpack(content, store.locate(INDEX_NAME))
    store.write_bytes(INDEX_NAME, content)
    return index


def shard_names(store: Store) -> list[str]:
    """Return the file names of a folder's shards, sorted."""
    return [name for name in store.names() if name.endswith(SHARD_SUFFIX)]


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
                f"wrong, correct it and run 'rsb-cluster shards index {other}'."
            )


def _is_shard_index(store: Store) -> bool:
    """Whether the file of the index's name is an index of this package, damaged or not."""
    with store.open(INDEX_NAME) as file:
        try:
            return {"meta.npy", "shard_start.npy"} <= set(zipfile.ZipFile(file).namelist())
        except zipfile.BadZipFile:
            return False


def _pack(shards: Sequence[str], scans: Sequence[ShardScan], classes: Sequence[str]) -> bytes:
    """Return the index file's bytes; they depend on the arguments only (zip entries are dated 1980-01-01)."""
    labels = np.concatenate([scan.labels for scan in scans])
    spans = np.concatenate([scan.spans for scan in scans])
    keys = [key for scan in scans for key in scan.keys]
    meta = {
        "format": _FORMAT,
        "shards": list(shards),
        "sha256": [scan.sha256 for scan in scans],
        "classes": list(classes),
        "num_classes": max(len(classes), int(labels.max()) + 1),
    }
    buffer = io.BytesIO()
    # Little-endian on every machine: the digest must not depend on it.
    np.savez(
        buffer,
        meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8),
        shard_bytes=np.array([scan.num_bytes for scan in scans], dtype="<i8"),
        shard_start=_starts([len(scan.labels) for scan in scans]),
        labels=labels.astype("<i4"),
        offsets=spans[:, 0].astype("<i8"),
        stops=spans[:, 1].astype("<i8"),
        image_offsets=spans[:, 2].astype("<i8"),
        image_sizes=spans[:, 3].astype("<i8"),
        key_bytes=np.frombuffer(b"".join(keys), dtype=np.uint8),
        key_starts=_starts([len(key) for key in keys]),
    )
    return buffer.getvalue()


def _starts(counts: list[int]) -> NDArray[np.int64]:
    """Return the start of each part, and the end of the last."""
    return np.concatenate([[0], np.cumsum(counts)]).astype("<i8")


def _unpack(content: bytes, url: str) -> ShardIndex:
    """Parse an index file's bytes. Raises ValueError (or what zipfile and numpy raise) if they are invalid."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(arrays.pop("meta").tobytes())
    if meta["format"] != _FORMAT:
        raise newer_version(url, f"format {meta['format']}")
    key_bytes = arrays.pop("key_bytes").tobytes()
    for array in arrays.values():
        array.setflags(write=False)
    index = ShardIndex(
        shards=tuple(meta["shards"]),
        shard_sha256=tuple(meta["sha256"]),
        classes=tuple(meta["classes"]),
        num_classes=meta["num_classes"],
        key_bytes=key_bytes,
        digest=hashlib.sha256(content).hexdigest(),
        **arrays,
    )
    _check(index)
    return index


def _check(index: ShardIndex) -> None:
    """Raise ValueError if parts of the index contradict each other: a reader would silently read the wrong bytes."""
    per_shard, per_sample = len(index.shards), index.num_samples
    if not len(index.shard_sha256) == len(index.shard_bytes) == len(index.shard_start) - 1 == per_shard:
        raise ValueError("its lists of shards differ in length")
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
