"""Write one shard."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rsb_cluster.data.recode import Recode
from rsb_cluster.data.scan import IMAGE_EXTENSIONS, ShardScan, scan_shard, scan_stream, split_name
from rsb_cluster.data.sources.source import Sample
from rsb_cluster.errors import ConfigError, DataError
from rsb_cluster.storage import Store


@dataclass(frozen=True)
class Contents:
    """What a shard is to hold.

    Attributes:
        read: Gives the sample that an entry stands for.
        recode: How to make images smaller.
        entries: Of the samples, in the order of the source: disks and row groups are read forward.
        places: Of each entry in the shard.
    """

    read: Callable[[Any], Sample]
    recode: Recode | None
    entries: Sequence[Any]
    places: Sequence[int]


def make_shard(store: Store, name: str, contents: Contents, there: bool) -> ShardScan:
    """Write a shard and describe it; one that is there is read, and kept if it is whole.

    Raises:
        ConfigError: A sample cannot be read or stored.
        DataError: The shard breaks a rule.
        StorageError: It could not be written.
    """
    if there:
        try:
            scan = scan_shard(store, name)
            if len(scan.labels) == len(contents.entries):
                return scan
        except DataError:
            pass  # cut short by a file system that lost what it had confirmed: made again
    samples: list[Sample | None] = [None] * len(contents.entries)
    for place, entry in zip(contents.places, contents.entries, strict=True):
        samples[place] = read_sample(contents.read, contents.recode, entry)
    content = _tar(cast(list[Sample], samples))
    scan = scan_stream(io.BytesIO(content), store.locate(name))
    store.write_bytes(name, content)
    return scan


def read_sample(read: Callable[[Any], Sample], recode: Recode | None, entry: Any) -> Sample:
    """Return a sample as it is to be stored.

    Raises:
        ConfigError: It could be written but not be found again.
        DataError: It cannot be made smaller.
    """
    key, content, extension, label = read(entry)
    if recode is not None:
        content, extension = recode(key, content, extension)
    where = f"sample '{key}' with the extension '{extension}' and the class {label}"
    if extension not in IMAGE_EXTENSIONS:
        raise ConfigError(f"{where}: the extension must be one of: {', '.join(IMAGE_EXTENSIONS)}")
    if split_name(f"{key}.{extension}") != (key, extension) or not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"{where}: webdataset would not read this key back. "
            "Use printable ASCII, no dot in the last part, and no part like '__x__' at the start."
        )
    if label < 0:
        raise ConfigError(f"{where}: classes are numbered from 0.")
    return key, content, extension, label


def _tar(samples: Sequence[Sample]) -> bytes:
    """Return a tar that depends on the samples only: no time, user or mode of this machine is in it.

    It is the file that webdataset's ``TarWriter`` writes; importing that would import torch in each process.
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
