"""Verifies a data set against its index, and counts its contents."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rsb_cluster.data.image_files import damage, is_wide
from rsb_cluster.data.index import Progress, ShardIndex, load_index, shard_names, shards_of
from rsb_cluster.data.labels import label_files
from rsb_cluster.data.left_out import LeftOut
from rsb_cluster.data.mixing import mixing_note
from rsb_cluster.data.pool import parallel_map
from rsb_cluster.data.scan import hashing_reader
from rsb_cluster.data.shard import WIDE
from rsb_cluster.data.split_folder import read_source_record
from rsb_cluster.errors import MissingError, plural
from rsb_cluster.storage.store import Store

_READ_BYTES = 1 << 20
_HASH_BYTES = 16

CHANGED = "The shards have changed since they were indexed. Copy them again, or run 'shards index' again."
UNDECODABLE = (
    "There are images that cannot be decoded, in shards as they were indexed: the image files are damaged. Make the "
    "shards again with whole ones or without them, or set data.max_bad_samples to train without."
)


@dataclass
class VerifyReport:
    """The result of `verify`; without problems the data set is unchanged since it was indexed, and sound.

    Attributes:
        shards: Number of shards that were read.
        samples: Number of samples in these.
        problems: Sentences that name shard and key.
        causes: The kinds of the problems: `CHANGED`, `UNDECODABLE`; each says what to do.
        notes: Remarks that are no problems: keys in several shards, duplicate images, classes without an image.
        images: A hash of each image in the shards that have not changed, sorted, shape (images, 2).
    """

    shards: int = 0
    samples: int = 0
    problems: list[str] = field(default_factory=list)
    causes: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    images: NDArray[np.uint64] = field(default_factory=lambda: np.empty((0, 2), dtype=np.uint64))

    def add(self, cause: str, problems: Iterable[str]) -> None:
        """Add problems of one cause."""
        before = len(self.problems)
        self.problems += problems
        if len(self.problems) > before:
            self.causes.add(cause)


@dataclass(frozen=True)
class DataSetStats:
    """Statistics of a data set, from its index."""

    data_set: str  # its name in datasets.toml, empty if unknown
    label_sets: tuple[str, ...]  # besides the index's labels
    shards: int
    samples: int
    total_bytes: int  # of all shards
    mean_image_bytes: float
    num_classes: int
    class_samples_min: int  # of the class with the fewest; 0 if one has none
    class_samples_max: int
    one_class_shards: float  # share of shards with samples of one class only: above 0, the set is likely not shuffled


def verify(
    store: Store, *, decode: bool = False, workers: int | None = 1, progress: Progress | None = None
) -> VerifyReport:
    """Read every shard once and compare it with the index.

    Args:
        store: The data set's folder.
        decode: Also decode every image (slow: a few hundred images per second and core).
        workers: Number of processes that read shards (see `rsb_cluster.data.pool.parallel_map`).
        progress: Called after each shard with the number of shards done and their total.

    Raises:
        DataError: There is no index, or it is damaged. All other problems are in the report.
        StorageError: The folder could not be read.
    """
    index = load_index(store)
    folder = shards_of(store, index)
    existing = set(shard_names(folder) if folder.lists_files else index.shards)
    report = VerifyReport()
    unknown = _unknown_shards(index, existing)
    report.add(CHANGED, (f"{name} is not in the index. Remove it, or index the folder again." for name in unknown))
    shards = [_Shard.from_index(index, number) for number in range(len(index.shards))]
    read = [shard for shard in shards if shard.name in existing]
    checks = parallel_map(_check_shard, [folder] * len(read), read, [decode] * len(read), workers=workers)
    hashes, numbers, remarks = [], [], LeftOut()
    for number, shard in enumerate(shards):
        found = next(checks) if shard.name in existing else None
        if found is None:
            report.add(CHANGED, [f"{shard.name} is missing. Copy it again."])
        else:
            changes, bad, seen, images = found
            remarks.merge(seen)
            report.shards += 1
            report.samples += len(shard.sizes)
            report.add(CHANGED if changes else UNDECODABLE, [*bad, *changes])
            if not changes:  # else what lies at the places of its images may be none of them
                hashes.append(images)
                numbers.append(np.arange(*index.shard_start[number : number + 2]))
        if progress is not None:
            progress(number + 1, len(shards))
    if numbers:
        all_, samples = np.frombuffer(b"".join(hashes), dtype="<u8").reshape(-1, 2), np.concatenate(numbers)
        order = np.lexsort((index.labels[samples], all_[:, 1], all_[:, 0]))
        report.images = all_[order]
        report.notes += _duplicate_images(index, report.images, samples[order])
    report.notes += [*remarks.notes("images"), *_repeated_keys(index), *_class_balance(index)]
    report.notes += filter(None, [mixing_note(index)])
    return report


def shared_images(first: VerifyReport, second: VerifyReport) -> int:
    """Return the number of distinct images that two data sets have in common, bit for bit."""
    _, counts = np.unique(
        np.concatenate([np.unique(report.images, axis=0) for report in (first, second)]), axis=0, return_counts=True
    )
    return int((counts > 1).sum())


def stats(store: Store) -> DataSetStats:
    """Return statistics of a data set, without reading a shard.

    Raises:
        DataError: There is no index, or it is damaged.
        StorageError: The folder could not be read.
    """
    index = load_index(store)
    counts = class_samples(index)
    parts = np.split(index.labels, index.shard_start[1:-1])
    return DataSetStats(
        data_set=str(read_source_record(store).get("data_set", "")),
        label_sets=tuple(label_files(store.names()).values()),
        shards=len(index.shards),
        samples=index.num_samples,
        total_bytes=int(index.shard_bytes.sum()),
        mean_image_bytes=float(index.image_sizes.mean()),
        num_classes=index.num_classes,
        class_samples_min=int(counts.min()),
        class_samples_max=int(counts.max()),
        one_class_shards=sum(len(np.unique(part)) == 1 for part in parts) / len(parts),
    )


def class_samples(index: ShardIndex) -> NDArray[np.int64]:
    """Return the number of samples of each class, shape (C,)."""
    return np.bincount(index.labels, minlength=index.num_classes)


@dataclass(frozen=True)
class _Shard:
    """A shard according to the index, to be sent to another process."""

    name: str
    num_bytes: int
    sha256: str
    keys: list[str]
    offsets: list[int]  # of the images
    sizes: list[int]

    @classmethod
    def from_index(cls, index: ShardIndex, number: int) -> _Shard:
        samples = range(*index.shard_start[number : number + 2].tolist())
        inside = slice(samples.start, samples.stop)
        return cls(
            index.shards[number],
            int(index.shard_bytes[number]),
            index.shard_sha256[number],
            [index.key(sample) for sample in samples],
            index.image_offsets[inside].tolist(),
            index.image_sizes[inside].tolist(),
        )


def _check_shard(store: Store, shard: _Shard, decode: bool) -> tuple[list[str], list[str], LeftOut, bytes] | None:
    """Return how a shard has changed, its images that cannot be decoded or are cut off, and hashes of all images.

    None if it is gone.
    """
    changes, bad, remarks, images = [], [], LeftOut(), []
    try:
        hashing, stream = hashing_reader(store.open(shard.name))
    except MissingError:
        return None
    with stream:
        for key, offset, size in zip(shard.keys, shard.offsets, shard.sizes, strict=True):
            _skip(stream, offset)
            image = stream.read(size)
            images.append(hashlib.blake2b(image, digest_size=_HASH_BYTES).digest())
            if decode and (problem := damage(image)):
                bad.append(f"{shard.name}: the image of sample '{key}' cannot be decoded: {problem}")
            elif decode and is_wide(image):
                remarks.add(WIDE, f"{shard.name}: {key}")
        while stream.read(_READ_BYTES):
            pass
    if hashing.num_bytes != shard.num_bytes:
        changes.append(
            f"{shard.name} has {hashing.num_bytes} bytes, and had {shard.num_bytes} when it was indexed. Copy it again."
        )
    elif hashing.sha256 != shard.sha256:
        changes.append(
            f"{shard.name} has changed since it was indexed: its SHA-256 is {hashing.sha256}. Copy it again."
        )
    return changes, bad, remarks, b"".join(images)


def _skip(stream: io.BufferedReader, offset: int) -> None:
    """Read up to an offset; seeking would leave bytes out of the hash."""
    while (left := offset - stream.tell()) > 0:
        if not stream.read(min(left, _READ_BYTES)):
            return


def _unknown_shards(index: ShardIndex, existing: set[str]) -> list[str]:
    """Return the shards that the index lacks; in a folder of several splits those that are named as its own are."""
    families = {_family(name) for name in index.shards}
    return sorted(n for n in existing - set(index.shards) if not index.place or _family(n) in families)


def _family(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _repeated_keys(index: ShardIndex) -> Iterator[str]:
    """Yield a sentence about keys that are in several shards, as where each shard counts from 0."""
    first: dict[bytes, int] = {}
    again: list[tuple[int, int]] = []
    starts = index.key_starts.tolist()
    for sample in range(index.num_samples):
        other = first.setdefault(index.key_bytes[starts[sample] : starts[sample + 1]], sample)
        if other != sample:
            again.append((sample, other))
    if again:
        here, there = (index.shards[int(index.shard_of(np.array(number)))] for number in again[0])
        yield (
            f"samples whose key is also in another shard: {len(again):,} ('{index.key(again[0][0])}' in {here} and in "
            f"{there}); training does not mind, but label sets and saved predictions are matched by key"
        )


def _duplicate_images(index: ShardIndex, images: NDArray[np.uint64], samples: NDArray[np.int64]) -> Iterator[str]:
    """Yield sentences about duplicate images, from sorted hashes and their samples (sorted by class, too)."""
    again = np.flatnonzero((images[1:] == images[:-1]).all(axis=1))
    for what, found in (
        ("", again),
        (" with another class", again[index.labels[samples[again]] != index.labels[samples[again + 1]]]),
    ):
        if len(found):
            one, other = (index.key(int(samples[found[0] + i])) for i in (0, 1))
            yield f"duplicate images{what}: {len(found):,} ('{one}' is '{other}')"


def _class_balance(index: ShardIndex) -> Iterator[str]:
    counts = class_samples(index)
    low, high = int(counts.min()), int(counts.max())
    each = f"{low:,} to {high:,} images (mean {counts.mean():,.1f})" if low < high else f"{plural(low, 'image')} each"
    yield f"{plural(index.num_classes, 'class', 'classes')}, with {each}"
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        shown = ", ".join(index.classes[i] if i < len(index.classes) else str(i) for i in empty[:5].tolist())
        yield f"classes without an image: {len(empty):,} ({shown}{', ...' if len(empty) > 5 else ''})"
