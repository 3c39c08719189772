"""Making the index of a data set: its shards are read once, and what is in them is written beside them or elsewhere."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsb_cluster.data.index import (
    INDEX_NAME,
    SHARD_SUFFIX,
    Progress,
    ShardIndex,
    checked_index,
    content_digest,
    is_shard_index,
    load_index,
    read_classes,
    save_index,
    shard_names,
)
from rsb_cluster.data.left_out import LeftOut
from rsb_cluster.data.pool import parallel_map
from rsb_cluster.data.scan import ShardScan, scan_shard
from rsb_cluster.data.split_names import splits_in
from rsb_cluster.errors import ConfigError, DataError, NewerVersionError
from rsb_cluster.storage.store import Store


@dataclass(frozen=True)
class ShardFolder:
    """Shards to index.

    Attributes:
        store: Their folder.
        names: Their file names; empty for all in the folder.
        place: Their folder from that of the index, as in `ShardIndex`.
        samples: Number of samples that a shard must have, by name; those of others are unknown.
    """

    store: Store
    names: tuple[str, ...] = ()
    place: str = ""
    samples: Mapping[str, int] = field(default_factory=dict)


# Returns scans with classes, of the shards with these names, and notes.
Labelling = Callable[[Sequence[str], Sequence[ShardScan]], tuple[list[ShardScan], list[str]]]


def build_index(
    store: Store,
    *,
    shards: ShardFolder | None = None,
    workers: int | None = 1,
    classes: Sequence[str] = (),
    image_keys: Sequence[str] = (),
    label: Labelling | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda note: None,
) -> ShardIndex:
    """Read every shard of a folder once, and write the index.

    Args:
        store: The folder of the index.
        shards: The shards, if they are not all ``*.tar`` of this folder.
        workers: Number of processes that read shards (see `rsb_cluster.data.pool.parallel_map`).
        classes: Names of the classes 0, 1, ...; if empty, those in the shards' ``classes.json``, if it exists.
        image_keys: The extensions that may be a sample's image (see `scan_stream`).
        label: Gives the shards classes from elsewhere; those in the shards do not count then.
        progress: Called after each shard with the number of shards done and their total.
        say: Called with a line for each kind of members that belong to no sample.

    Raises:
        DataError: There is no shard, or one is invalid (see `scan_shard`) or has another number of samples than it
            must have. No index is written then.
        ConfigError: The folder holds a file of the index's name that is no index, or other shards, or is only read.
        StorageError: The folder could not be read or written.
    """
    store.check_not_read_only("an index")
    shards = shards or ShardFolder(store)
    names = list(shards.names) or shard_names(shards.store)
    if store.exists(INDEX_NAME) and not is_shard_index(store):
        raise ConfigError(f"{store.locate(INDEX_NAME)} is not an index of shards. Move it away, then try again.")
    if not names:
        raise DataError(f"there are no *{SHARD_SUFFIX} files in {shards.store.url}. {_where_shards_are(shards.store)}")
    if shards.place and (others := shard_names(store)):
        raise ConfigError(f"{store.url} holds shards of its own: {others[0]}, ... Choose another folder for the index.")
    store.check_writable()  # before hours of reading
    known_classes = tuple(classes) or read_classes(shards.store)
    scans: list[ShardScan] = []
    left_out = LeftOut()
    keys = [tuple(key.lower().removeprefix(".") for key in image_keys)] * len(names)
    own = [label is None] * len(names)
    found = parallel_map(scan_shard, [shards.store] * len(names), names, keys, own, workers=workers)
    for name, scan in zip(names, found, strict=True):
        if len(scan.keys) != (expected := shards.samples.get(name, len(scan.keys))):
            raise DataError(
                f"{shards.store.locate(name)} holds {len(scan.keys):,} samples, and the list of shards beside it says "
                f"{expected:,}. Download it again."
            )
        left_out.merge(scan.left_out, f"{name}: ")
        scans.append(scan)
        if progress is not None:
            progress(len(scans), len(names))
    notes = [*left_out.notes()]
    if label is not None:
        scans, more = label(names, scans)
        notes += more
    for note in notes:
        say(note)
    return write_index(store, names, scans, known_classes, shards.place)


def write_index(
    store: Store, shards: Sequence[str], scans: Sequence[ShardScan], classes: Sequence[str], place: str = ""
) -> ShardIndex:
    """Write the index of scanned shards: the last file of a data set.

    Args:
        store: The folder.
        shards: The file names of the shards, sorted.
        scans: The scan of each shard.
        classes: Names of the classes 0, 1, ...
        place: The folder of the shards, as in `ShardIndex`.
    """
    index = replace(_join(shards, scans, classes), place=place)
    with contextlib.suppress(DataError, NewerVersionError):  # none, or a damaged one
        known = load_index(store)
        if (known.shards, known.place) == (index.shards, place) and content_digest(known) == index.digest:
            return known
    save_index(store, index)
    return index


def _join(shards: Sequence[str], scans: Sequence[ShardScan], classes: Sequence[str]) -> ShardIndex:
    """Return the index of scanned shards."""
    labels = np.concatenate([scan.labels for scan in scans])
    spans = np.concatenate([scan.spans for scan in scans]).astype("<i8")
    keys = [key for scan in scans for key in scan.keys]
    index = ShardIndex(
        shards=tuple(shards),
        shard_bytes=np.array([scan.num_bytes for scan in scans], dtype="<i8"),
        shard_sha256=tuple(scan.sha256 for scan in scans),
        shard_start=_starts([len(scan.labels) for scan in scans]),
        labels=labels.astype("<i4"),
        offsets=spans[:, 0],
        stops=spans[:, 1],
        image_offsets=spans[:, 2],
        image_sizes=spans[:, 3],
        key_bytes=b"".join(keys),
        key_starts=_starts([len(key) for key in keys]),
        classes=tuple(classes),
        num_classes=max(len(classes), int(labels.max()) + 1),
        digest="",
    )
    return checked_index(replace(index, digest=content_digest(index)))


def _starts(counts: list[int]) -> NDArray[np.int64]:
    """Return the start of each part, and the end of the last."""
    return np.concatenate([[0], np.cumsum(counts)]).astype("<i8")


def is_like_shard(name: str) -> bool:
    """Whether a name is that of a tar, be it compressed or in capitals."""
    return re.search(r"\.(tar(\.\w+)?|tgz|tbz2?|txz)$", name, re.IGNORECASE) is not None


def _where_shards_are(store: Store) -> str:
    """Say what to do where a folder has no shards."""
    if store.is_local and not (path := Path(store.url)).is_dir():
        found = path.parent.is_dir()
        return f"Name their folder: {path.parent}" if found else "There is no such folder: check the path."
    here = store.entries()
    for folder in ("", *(name for name, is_file in here.items() if not is_file and splits_in(name))):
        for name in store.entries(folder) if folder else here:
            if is_like_shard(name):
                packed = f"{folder}/{name}" if folder else name
                if name.lower().endswith(SHARD_SUFFIX):
                    return f"Call {packed} so: shards are files whose names end with {SHARD_SUFFIX}."
                return f"Unpack {packed} to a plain {SHARD_SUFFIX} first: one cannot read from the middle of it."
    return "Make shards: rsb-cluster shards make"
