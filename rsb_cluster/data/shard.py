"""Writes and compares single shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rsb_cluster.data.image_files import IMAGE_EXTENSIONS, is_unknown, is_wide
from rsb_cluster.data.left_out import LeftOut
from rsb_cluster.data.recode import Recode
from rsb_cluster.data.scan import ShardScan, scan_shard, scan_stream, split_name
from rsb_cluster.data.sources.source import Sample, key_of, readable
from rsb_cluster.errors import ConfigError, DataError
from rsb_cluster.storage.store import Store

Value = TypeVar("Value")

UNKNOWN = "no image by its first bytes; 'shards verify --decode' tries each"
WIDE = "16-bit grey or floating point, which training sees as Pillow does, nearly all white or black: store 8 bits"
WIDE_KEPT = f"{WIDE}; not downscaled"


@dataclass(frozen=True)
class ShardContents:
    """The samples of a shard.

    Attributes:
        read: Reads the sample of an entry.
        show: Returns an entry's name for messages.
        where: Where the samples come from, for messages.
        recode: How to downscale images.
        entries: The samples' entries, in the order of the source: disks and row groups are read forward.
        places: The position of each entry in the shard.
        sizes: Size of each entry's image file as stored, bytes; empty if unknown.
    """

    read: Callable[[Any], Sample]
    show: Callable[[Any], str]
    where: str
    recode: Recode | None
    entries: Sequence[Any]
    places: Sequence[int]
    sizes: Sequence[int]


@dataclass(frozen=True)
class ImageChange:
    """An image that differs from the one in a shard: its entry, and its size then and now, bytes."""

    entry: Any
    before: int
    now: int


@dataclass(frozen=True)
class Comparison:
    """An existing shard compared with its expected contents.

    Attributes:
        scan: Its content; None if it is damaged, or has other samples.
        changes: The images that differ from those in it.
    """

    scan: ShardScan | None
    changes: tuple[ImageChange, ...] = ()


@dataclass(frozen=True)
class MadeShard:
    """A shard that was written: its content, and what the user should know of the images that were stored.

    Attributes:
        scan: Its content.
        remarks: The images whose values are cut off when they are decoded, and those that are none.
    """

    scan: ShardScan
    remarks: LeftOut


def make_shard(store: Store, name: str, contents: ShardContents) -> MadeShard:
    """Write a shard.

    Raises:
        ConfigError: A sample cannot be read or stored.
        DataError: The shard is invalid.
        StorageError: It could not be written.
    """
    samples = _read(contents)
    content = _tar(_by_place(contents, samples))
    scan = scan_stream(io.BytesIO(content), store.locate(name))
    store.write_bytes(name, content)
    return MadeShard(scan, _remarks(contents, samples))


def compare_shard(store: Store, name: str, contents: ShardContents, by_bytes: bool) -> Comparison:
    """Compare an existing shard with its expected contents: keys and sizes, as far as they are known.

    Args:
        store: The folder.
        name: The shard's file name.
        contents: Its expected contents.
        by_bytes: Make the shard in memory and compare every byte.

    Raises:
        ConfigError: A sample cannot be read or stored.
        StorageError: The shard could not be read.
    """
    try:
        scan = scan_shard(store, name)
    except DataError:
        return Comparison(None)  # truncated by a file system that lost a confirmed write
    entries = _by_place(contents, contents.entries)
    keys = [key_of(entry) for entry in entries]
    if len(scan.keys) != len(keys) or any(
        key is not None and key.encode() != stored for key, stored in zip(keys, scan.keys, strict=True)
    ):
        return Comparison(None)
    if by_bytes:
        return _compare_bytes(store, name, contents, scan, entries)
    found = zip(entries, scan.spans[:, 3].tolist(), _by_place(contents, contents.sizes), strict=False)
    return Comparison(scan, tuple(ImageChange(entry, before, now) for entry, before, now in found if before != now))


def _compare_bytes(
    store: Store, name: str, contents: ShardContents, scan: ShardScan, entries: Sequence[Any]
) -> Comparison:
    content = _tar(_by_place(contents, _read(contents)))
    made = scan_stream(io.BytesIO(content), store.locate(name))
    if made.sha256 == scan.sha256:
        return Comparison(scan)
    if made.keys != scan.keys:
        return Comparison(None)
    stored = store.read_bytes(name)
    changes = []
    for entry, (before, b_size), (now, n_size) in zip(
        entries, scan.spans[:, 2:].tolist(), made.spans[:, 2:].tolist(), strict=True
    ):
        if stored[before : before + b_size] != content[now : now + n_size]:
            changes.append(ImageChange(entry, b_size, n_size))
    return Comparison(scan, tuple(changes)) if changes else Comparison(None)  # only classes differ


def _read(contents: ShardContents) -> list[Sample]:
    c = contents
    return [read_sample(c.read, c.recode, entry, c.show, c.where) for entry in c.entries]


def _remarks(contents: ShardContents, samples: Sequence[Sample]) -> LeftOut:
    found = LeftOut()
    for entry, (_, image, _, _) in zip(contents.entries, samples, strict=True):
        if is_unknown(image):
            found.add(UNKNOWN, contents.show(entry))
        elif is_wide(image):
            found.add(WIDE_KEPT if contents.recode else WIDE, contents.show(entry))
    return found


def _by_place(contents: ShardContents, values: Sequence[Value]) -> list[Value]:
    """Return the entries' values in the order of the shard; empty if there are no values."""
    ordered = dict(zip(contents.places, values, strict=False))
    return [ordered[place] for place in sorted(ordered)]


def read_sample(
    read: Callable[[Any], Sample], recode: Recode | None, entry: Any, show: Callable[[Any], str], where: str
) -> Sample:
    """Return a sample as it will be stored. Arguments are as in `ShardContents`.

    Raises:
        ConfigError: It could be written but not be read back.
        DataError: It cannot be downscaled.
    """
    with readable(show(entry)):
        key, content, extension, label = read(entry)
    if recode is not None:
        content, extension = recode(f"'{show(entry) if key_of(entry) else key}' ({where})", content, extension)
    where = f"sample '{key}' with the extension '{extension}' and the class {label}"
    if extension not in IMAGE_EXTENSIONS:
        raise ConfigError(f"{where}: the extension must be one of: {', '.join(IMAGE_EXTENSIONS)}.")
    if split_name(f"{key}.{extension}") != (key, extension) or not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"{where}: webdataset would not read this key back. "
            "Use printable ASCII, no dot in the last part, and no part like '__x__' at the start."
        )
    if label < 0:
        raise ConfigError(f"{where}: classes are numbered from 0.")
    return key, content, extension, label


def _tar(samples: Sequence[Sample]) -> bytes:
    """Return a tar that depends on the samples only: it contains no time, user or mode of this machine.

    It equals the file of webdataset's ``TarWriter``; importing that would import torch in each process.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, image, extension, label in samples:
            for suffix, content in sorted([("cls", str(label).encode()), (extension, image)]):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size, member.mode, member.uname, member.gname = len(content), 0o444, "rsb", "rsb"
                tar.addfile(member, io.BytesIO(content))
            tar.members = []  # type: ignore[attr-defined]  # else every header stays in memory
    return buffer.getvalue()
