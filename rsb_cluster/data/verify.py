"""Check a data set against its index, and count what is in it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from rsb_cluster.data.index import Progress, ShardIndex, load_index, shard_names
from rsb_cluster.data.scan import open_hashed
from rsb_cluster.storage import Store

_READ_BYTES = 1 << 20


@dataclass
class Report:
    """What a check found; no problems means that the data set is as it was when it was indexed.

    ``shards`` and ``samples`` count what was really read, ``problems`` are sentences that name shard and key.
    """

    shards: int = 0
    samples: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stats:
    """What a data set holds, from its index alone."""

    shards: int
    samples: int
    total_bytes: int  # of all shards
    mean_image_bytes: float
    num_classes: int
    class_samples_min: int  # of the class with the fewest; 0 where one has none
    class_samples_max: int
    one_class_shards: float  # share of shards with samples of one class only: above 0, the set is likely not shuffled


def verify(store: Store, *, decode: bool = False, progress: Progress | None = None) -> Report:
    """Read every shard, once, and compare it with the index.

    Args:
        store: The data set's folder.
        decode: Also decode every image (slow: some hundred images per second and core).
        progress: Called after each shard with the number of shards done and their total.

    Raises:
        DataError: There is no index, or it is damaged. What else is wrong is in the report.
        StorageError: The folder could not be read.
    """
    index = load_index(store)
    there = set(shard_names(store))
    report = Report(problems=list(_repeated_keys(index)))
    report.problems += [
        f"{name} is not in the index. Remove it, or index the folder again."
        for name in sorted(there - set(index.shards))
    ]
    for number, name in enumerate(index.shards):
        if name not in there:
            report.problems.append(f"{name} is missing. Copy it again.")
        else:
            report.shards += 1
            report.samples += int(index.shard_start[number + 1] - index.shard_start[number])
            report.problems += _check_shard(store, index, number, decode)
        if progress is not None:
            progress(number + 1, len(index.shards))
    return report


def stats(store: Store) -> Stats:
    """Count what a data set holds. Only the index is read.

    Raises:
        DataError: There is no index, or it is damaged.
        StorageError: The folder could not be read.
    """
    index = load_index(store)
    counts = np.bincount(index.labels, minlength=index.num_classes)
    parts = np.split(index.labels, index.shard_start[1:-1])
    return Stats(
        shards=len(index.shards),
        samples=index.num_samples,
        total_bytes=int(index.shard_bytes.sum()),
        mean_image_bytes=float(index.image_sizes.mean()),
        num_classes=index.num_classes,
        class_samples_min=int(counts.min()),
        class_samples_max=int(counts.max()),
        one_class_shards=sum(len(np.unique(part)) == 1 for part in parts) / len(parts),
    )


def _check_shard(store: Store, index: ShardIndex, number: int, decode: bool) -> Iterator[str]:
    """Yield what is wrong with a shard that is there."""
    name, expected = index.shards[number], int(index.shard_bytes[number])
    hashing, stream = open_hashed(store, name)
    with stream:
        if decode:
            for sample in range(*index.shard_start[number : number + 2]):
                _skip(stream, int(index.image_offsets[sample]))
                problem = _decode(stream.read(int(index.image_sizes[sample])))
                if problem:
                    yield f"{name}: the image of sample '{index.key(sample)}' cannot be decoded: {problem}"
        while stream.read(_READ_BYTES):
            pass
    if hashing.num_bytes != expected:
        yield f"{name} has {hashing.num_bytes} bytes, and had {expected} when it was indexed. Copy it again."
    elif hashing.sha256 != index.shard_sha256[number]:
        yield f"{name} has changed since it was indexed: its SHA-256 is {hashing.sha256}. Copy it again."


def _skip(stream: io.BufferedReader, offset: int) -> None:
    """Read up to an offset; seeking would leave bytes out of the hash."""
    while (left := offset - stream.tell()) > 0:
        if not stream.read(min(left, _READ_BYTES)):
            return


def _decode(image: bytes) -> str:
    """Return what is wrong with an image file, or an empty string."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image)) as opened:
            opened.load()
    except Exception as error:  # PIL's readers raise nearly anything on damaged files (SyntaxError, struct.error, ...)
        return f"{type(error).__name__}: {error}"
    return ""


def _repeated_keys(index: ShardIndex) -> Iterator[str]:
    """Yield a sentence for each key that another shard has too."""
    first: dict[bytes, int] = {}
    starts = index.key_starts.tolist()
    for sample in range(index.num_samples):
        key = index.key_bytes[starts[sample] : starts[sample + 1]]
        other = first.setdefault(key, sample)
        if other != sample:
            here, there = (index.shards[int(index.shard_of(np.array(number)))] for number in (sample, other))
            yield f"{here}: the key '{index.key(sample)}' is also in {there}. Are samples twice in the set?"
