"""Shards made by hand, what is in them as webdataset reads it, and indexes of shards that are not there."""

import io
import tarfile
from pathlib import Path

import numpy as np

from rsb_cluster.data.index import ShardIndex, load_index
from rsb_cluster.data.reader import MERGE_BYTES
from rsb_cluster.storage.store import Store

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_of(members, format=tarfile.GNU_FORMAT, **kw):
    """A tar of (name, content) pairs; None is the content of a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, **kw) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    return buffer.getvalue()


def store_of(folder, **shards):
    """A store of shards by their names."""
    store = Store(folder)
    for name, content in shards.items():
        store.write_bytes(f"{name}.tar", content)
    return store


def pair(key, image, label):
    """The members of a sample: image and class."""
    return [(f"{key}.jpg", image), (f"{key}.cls", str(label).encode())]


def read_by_webdataset(store, shards):
    """All samples as webdataset yields them, in order. WebDataset itself would leave the files open."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    samples = []
    for name in shards:
        with Path(store.locate(name)).open("rb") as stream:
            samples += group_by_keys(tar_file_expander([{"url": name, "stream": stream}]))
    return samples


def image_slice(store, index, i):
    """The bytes of an image by the index."""
    shard = index.shards[int(index.shard_of(np.array(i)))]
    start = int(index.image_offsets[i])
    return store.read_bytes(shard)[start : start + int(index.image_sizes[i])]


def sample_slice(store, index, i):
    """The sample's own bytes, read as a tar."""
    shard = index.shards[int(index.shard_of(np.array(i)))]
    content = store.read_bytes(shard)[int(index.offsets[i]) : int(index.stops[i])]
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar if info.isreg()}


WHOLE = tar_of(pair("a", b"A" * 1200, 0) + pair("b", b"B" * 1200, 1))


def read_back(store):
    """The images of a part, with the classes that its index has for them."""
    index = load_index(store)
    return {image_slice(store, index, i): int(index.labels[i]) for i in range(index.num_samples)}


def image(seed, size=None):
    """Bytes in the place of an image, by their seed."""
    rng = np.random.default_rng(seed)
    return rng.bytes(int(rng.integers(1, 3000)) if size is None else size)


def samples_of(count, start=0, prefix="n01/n01_"):
    """The members of so many samples."""
    return [member for i in range(start, start + count) for member in pair(f"{prefix}{i:04d}", image(i), i % 7)]


SHELL = ("$(touch owned)", "a; rm -rf b", "`id`", "-rf", "a|b>c", "%s{0}", "a'b\"c", "*?[x]")
ODD = {
    "plain": samples_of(9),
    "class first": [m for i in range(5) for m in reversed(pair(f"k{i}", image(i), i))],
    "unsorted": [m for i in (3, 0, 4, 1, 2) for m in pair(f"k{i}", image(i), i)],
    "long names": [m for i in range(4) for m in pair(f"{'folder/' * 20}{i}", image(i), i)],
    "names around 100 bytes": [m for n in range(88, 104) for m in pair("k" * n + str(n), image(n), 1)],
    "names of other scripts": [m for i in range(4) for m in pair(f"фото/ünï {i}😀", image(i), i)],
    "names for a shell": [m for name in SHELL for m in pair(name, image(len(name)), 1)],
    "several extensions": [
        m
        for i in range(4)
        for m in (
            (f"k{i}.cls", b"1"), (f"k{i}.json", b'{"label": 1}'), (f"k{i}.seg.png", image(9)), (f"k{i}.png", image(i)),
            (f"k{i}.mask.jpg", image(8)), (f"k{i}.txt", b"a caption"),
        )
    ],
    "large neighbours": [
        m for i in range(4) for m in (*pair(f"k{i}", image(i), i), (f"k{i}.npy", bytes(MERGE_BYTES * (1 + i % 2))))
    ],
}  # fmt: skip


def index_of(sizes: list[int]) -> ShardIndex:
    """An index of shards with so many samples each; nothing but the counts matters to the order."""
    total = sum(sizes)
    zeros = np.zeros(total, dtype=np.int64)
    return ShardIndex(
        shards=tuple(f"shard-{i:06d}.tar" for i in range(len(sizes))),
        shard_bytes=np.ones(len(sizes), dtype=np.int64),
        shard_sha256=("",) * len(sizes),
        shard_start=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        labels=zeros.astype(np.int32),
        offsets=zeros,
        stops=zeros,
        image_offsets=zeros,
        image_sizes=zeros,
        classes=(),
        num_classes=1,
        digest="",
        key_bytes=b"",
        key_starts=np.zeros(total + 1, dtype=np.int64),
    )
