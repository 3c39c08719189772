"""Scans a shard: the position and the class of each sample, and the hash of the file.

The rules for names are webdataset's, copied because importing webdataset imports torch, which takes seconds.
Sources: ``base_plus_ext``, ``tar_file_iterator`` and ``group_by_keys`` in ``webdataset/tariterators.py`` (1.0.2).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from rsb_cluster.errors import DataError
from rsb_cluster.storage.store import Store

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif")

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")
_CLASS = re.compile(rb"\s*([+-]?[0-9]{1,18})\s*")
_JSON_CLASS_FIELDS = ("label", "cls", "class")
_MAX_CLASS = np.iinfo(np.int32).max
_READ_BYTES = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into the sample's key and the lower-cased extension.

    The key is the path up to the first dot of the base name, the directory included.

    Returns:
        ``None`` for a name that webdataset skips: one without a dot, or metadata (``__x__``, ``__x__/...``).
    """
    found = _NAME.match(name)
    if found is None or _META.match(name):
        return None
    return found[1], found[2].lower()


class HashingReader(io.RawIOBase):
    """Reads a stream sequentially and hashes it.

    Args:
        stream: The stream; closed together with this one.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed: any writable buffer
        """Fill a buffer and return the number of bytes; 0 at the end."""
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self._hash.update(content)
        self.num_bytes += len(content)
        return len(content)

    def tell(self) -> int:
        """Return the number of bytes read so far."""
        return self.num_bytes

    def close(self) -> None:
        """Close the underlying stream as well."""
        self._stream.close()
        super().close()

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the bytes read so far."""
        return self._hash.hexdigest()


def hashing_reader(stream: BinaryIO) -> tuple[HashingReader, io.BufferedReader]:
    """Wrap a stream to hash it while it is read.

    Returns:
        The hash, which is that of the file once the end is reached, and the buffered stream to read from and to close.
    """
    hashing = HashingReader(stream)
    return hashing, io.BufferedReader(hashing, _READ_BYTES)


@dataclass(frozen=True, eq=False)
class ShardScan:
    """The content of a shard. Arrays have one element per sample, in the order of the tar."""

    num_bytes: int
    sha256: str
    keys: tuple[bytes, ...]  # UTF-8
    labels: NDArray[np.int32]
    spans: NDArray[np.int64]  # (n, 4): first byte, byte after the last, image's first byte, image's size


@dataclass
class _Sample:
    key: str
    start: int
    stop: int = 0
    extensions: set[str] = field(default_factory=set)
    image: tuple[int, int] | None = None  # first byte, size
    cls: bytes | None = None
    json: bytes | None = None


class _DamagedError(Exception):
    """A header is invalid, or the file ends before the archive."""


class _StrictTarInfo(tarfile.TarInfo):
    """A header that must be valid: tarfile takes an invalid one, unless it is the first, for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictTarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the block of zeros that ends an archive
            raise _DamagedError(str(error)) from error


def scan_shard(store: Store, name: str) -> ShardScan:
    """Scan the shard with a name in a folder (see `scan_stream`)."""
    return scan_stream(store.open(name), store.locate(name))


def scan_stream(opened: BinaryIO, url: str) -> ShardScan:
    """Scan a shard, reading it once as a stream.

    Args:
        opened: The shard, at its start. It is closed.
        url: Its name in messages.

    Raises:
        DataError: The file is not a complete tar; a sample has no image, no class, or two members with one extension;
            a key occurs twice; a member is sparse; or there is no sample. The message names the shard and the key.
        StorageError: The file could not be read.
    """
    hashing, stream = hashing_reader(opened)
    samples: list[_Sample] = []
    with stream:
        compression = next((kind for magic, kind in _COMPRESSED.items() if stream.peek(8).startswith(magic)), None)
        if compression:
            raise DataError(
                f"{url} is compressed ({compression}), so no sample in it can be found by its offset. "
                "Unpack it to a plain .tar."
            )
        try:
            samples.extend(_samples(stream, url))
        except (tarfile.TarError, _DamagedError) as error:
            last = f"after the sample '{samples[-1].key}'" if samples else "at its start"
            raise DataError(f"{url} is not a complete tar: {error}, {last}. Copy or make it again.") from error
    if not samples:
        raise DataError(f"{url} holds no samples. Delete it, or make it again.")
    return ShardScan(
        num_bytes=hashing.num_bytes,
        sha256=hashing.sha256,
        keys=tuple(_unique_keys(samples, url)),
        labels=np.array([_class_of(sample, url) for sample in samples], dtype=np.int32),
        spans=np.array([(s.start, s.stop, *_image_of(s, url)) for s in samples], dtype=np.int64),
    )


def _samples(stream: io.BufferedReader, url: str) -> Iterator[_Sample]:
    """Yield a sample for consecutive members with the same key; read to the end of the file."""
    current: _Sample | None = None
    # "r|", not "r|*": webdataset would also read a compressed tar, in which no offset can be sought.
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictTarInfo, encoding="utf-8") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else every header stays in memory
            # Links are skipped as well, as in webdataset: they have no content of their own.
            parts = split_name(member.name) if member.isreg() else None
            if parts is None:
                continue
            key, extension = parts
            if current is None or key != current.key:
                if current is not None:
                    yield current
                # `offset` is that of the first header, be it a GNU long name or a PAX header of this member.
                current = _Sample(key, member.offset)
            _add(current, tar, member, extension, url)
        _check_rest(tar)
    if current is not None:
        yield current


def _add(sample: _Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, url: str) -> None:
    """Add a member to its sample."""
    where = f"{url}: sample '{sample.key}'"
    if extension in sample.extensions:
        raise DataError(
            f"{where} has two members with the extension '{extension}'. Remove one, or make the shard again."
        )
    if member.issparse():
        raise DataError(
            f"{where}: '{member.name}' is a sparse file, so its bytes are not contiguous. "
            "Make the tar without --sparse."
        )
    sample.extensions.add(extension)
    sample.stop = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if extension in IMAGE_EXTENSIONS and sample.image is None:
        sample.image = (member.offset_data, member.size)
    elif extension in ("cls", "json"):
        content = tar.extractfile(member)
        assert content is not None  # only links and folders have none
        setattr(sample, extension, content.read())


def _check_rest(tar: tarfile.TarFile) -> None:
    """Check that only zeros follow the end marker."""
    assert tar.fileobj is not None
    while block := tar.fileobj.read(_READ_BYTES):
        if block.count(0) != len(block):
            # The result of `cat a.tar b.tar`, of which webdataset would silently read the first archive only.
            raise _DamagedError("there is data after the end marker (two tars in one file?)")


def _unique_keys(samples: list[_Sample], url: str) -> Iterator[bytes]:
    seen: set[str] = set()
    for sample in samples:
        if sample.key in seen:
            raise DataError(
                f"{url}: the key '{sample.key}' occurs twice, or its members are not consecutive. "
                "Sort the members by name (tar --sort=name), or make the shard again."
            )
        seen.add(sample.key)
        # tarfile decodes a name that is not UTF-8 with surrogates; they become the same bytes again.
        yield sample.key.encode("utf-8", "surrogateescape")


def _image_of(sample: _Sample, url: str) -> tuple[int, int]:
    if sample.image is None or sample.image[1] == 0:
        what = "no image" if sample.image is None else "an empty image"
        raise DataError(
            f"{url}: sample '{sample.key}' has {what} (it has: {', '.join(sorted(sample.extensions))}). "
            f"Remove the sample or give it one of: {', '.join(IMAGE_EXTENSIONS)}."
        )
    return sample.image


def _class_of(sample: _Sample, url: str) -> int:
    """Return the class from ``.cls``, else from ``.json``."""
    where = f"{url}: sample '{sample.key}'"
    if sample.cls is not None:
        found = _CLASS.fullmatch(sample.cls)
        if found is None:
            raise DataError(
                f"{where}: its .cls holds {sample.cls[:40]!r}, which is no class number. Write it as digits."
            )
        label = int(found[1])
    elif sample.json is not None:
        label = _class_in_json(sample.json, where)
    else:
        raise DataError(f"{where} has no class: it has neither .cls nor .json. Add a .cls with the class number.")
    if not 0 <= label <= _MAX_CLASS:
        raise DataError(
            f"{where} has the class {label}; classes are numbered from 0 to {_MAX_CLASS}. Renumber the classes."
        )
    return label


def _class_in_json(content: bytes, where: str) -> int:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: its .json cannot be read: {error}. Add a .cls with the class number.") from error
    for name in _JSON_CLASS_FIELDS:
        label = value.get(name) if isinstance(value, dict) else None
        if isinstance(label, int) and not isinstance(label, bool):
            return label
    raise DataError(
        f"{where} has no class: its .json has no whole number under {', '.join(_JSON_CLASS_FIELDS)}. "
        "Add a .cls with the class number."
    )
