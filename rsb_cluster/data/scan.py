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
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from rsb_cluster.data.image_files import IMAGE_EXTENSIONS
from rsb_cluster.data.left_out import DEBRIS, LeftOut, is_debris_member
from rsb_cluster.errors import DataError
from rsb_cluster.storage.store import LFS_POINTER, Store

Content = Callable[[], bytes]  # reads a member's content

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")
_CLASS = re.compile(rb"\s*([+-]?[0-9]{1,18})\s*")
_CLASS_EXTENSIONS = ("cls", "json")
_JSON_CLASS_FIELDS = ("label", "cls", "class")
MAX_CLASS = 10_000_000 - 1  # a network has as many outputs; what counts samples per class, as many counters
_READ_BYTES = 1 << 20
_IMAGE_EXTENSIONS = frozenset(IMAGE_EXTENSIONS)
_KEY_RULE = "A sample's key ends at the first dot after the last slash of a name, as in webdataset."
_UNPACK = "; if its folder is its class, unpack the tar, and run 'shards make' on the folders"
_NO_KEY = "no dot in the name, or metadata of webdataset"
_SPECIAL = "a link, or no regular file"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into the sample's key and the lower-cased extension.

    The key is the path up to the first dot of the base name, the directory included.

    Returns:
        ``None`` for a name that webdataset skips: one without a dot, or metadata (``__x__``, ``__x__/...``).
    """
    found = _NAME.match(name)
    if found is None or (name.startswith("__") and _META.match(name)):
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
    left_out: LeftOut = field(default_factory=LeftOut)  # members that belong to no sample
    # Without classes only: the name of each image's member, and the URL that img2dataset's .json has for it.
    images: tuple[tuple[str, str], ...] = ()


@dataclass
class _Sample:
    key: str
    start: int
    stop: int = 0
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # first byte and size, by extension
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


def scan_shard(store: Store, name: str, image_keys: Sequence[str] = (), has_classes: bool = True) -> ShardScan:
    """Scan the shard with a name in a folder (see `scan_stream`)."""
    return scan_stream(store.open(name), store.locate(name), image_keys, has_classes)


def scan_stream(opened: BinaryIO, url: str, image_keys: Sequence[str] = (), has_classes: bool = True) -> ShardScan:
    """Scan a shard, reading it once as a stream.

    Args:
        opened: The shard, at its start. It is closed.
        url: Its name in messages.
        image_keys: The extensions that may be a sample's image, the first that it has; if empty, the only one of
            `IMAGE_EXTENSIONS`.
        has_classes: Whether the samples have classes. If not, or not those that are wanted, all labels are -1.

    Raises:
        DataError: The file is not a complete tar; a sample has no image, several, no class, or two members with one
            extension; a key occurs twice; a member is sparse, or a link; or there is no sample. The message names the
            shard and the key.
        StorageError: The file could not be read.
    """
    hashing, stream = hashing_reader(opened)
    left_out = LeftOut()
    with closing(members_of(stream, url)) as members:
        samples = list(_samples(members, url, image_keys, left_out))
    if not samples:
        raise DataError(f"{url} holds no samples. Delete it, or make it again.")
    keys = tuple(_unique_keys(samples, url))
    labels = [_class_of(sample, url) if has_classes else -1 for sample in samples]
    images = [_image_of(sample, url, image_keys) for sample in samples]
    spans = [(s.start, s.stop, *s.members[extension]) for s, extension in zip(samples, images, strict=True)]
    return ShardScan(
        num_bytes=hashing.num_bytes,
        sha256=hashing.sha256,
        keys=keys,
        labels=np.array(labels, dtype=np.int32),
        spans=np.array(spans, dtype=np.int64),
        left_out=left_out,
        images=()
        if has_classes
        else tuple((f"{s.key}.{extension}", url_in_json(s.json)) for s, extension in zip(samples, images, strict=True)),
    )


def members_of(stream: io.BufferedReader, url: str) -> Generator[tuple[tarfile.TarInfo, Content]]:
    """Yield the members of a plain tar, each with what returns its content.

    The tar is read once from its start to its end, or sought in, and closed.

    Raises:
        DataError: It is compressed, or is no complete tar; also while a content is read.
        StorageError: It could not be read.
    """
    last = "at its start"

    def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        try:
            file = tar.extractfile(member)
            return file.read() if file is not None else b""  # links and folders have none
        except tarfile.TarError as error:
            raise _incomplete(url, error, last) from error

    with stream:
        start = stream.peek(len(LFS_POINTER))
        compression = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
        if compression:
            raise DataError(
                f"{url} is compressed ({compression}), so no sample in it can be found by its offset. "
                "Unpack it to a plain .tar."
            )
        if start.startswith(LFS_POINTER):
            raise DataError(f"{url} is a pointer of Git LFS and not the file. Run: git lfs pull")
        try:
            # Not "*": webdataset would also read a compressed tar, in which no offset can be sought.
            mode: Literal["r:", "r|"] = "r:" if stream.seekable() else "r|"
            with tarfile.open(fileobj=stream, mode=mode, tarinfo=_StrictTarInfo, encoding="utf-8") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # else every header stays in memory
                    yield member, partial(content, tar, member)
                    last = f"in or after '{member.name}'"
                _check_rest(tar)
        except (tarfile.TarError, _DamagedError) as error:
            raise _incomplete(url, error, last) from error


def _incomplete(url: str, error: Exception, last: str) -> DataError:
    return DataError(f"{url} is not a complete tar: {error}, {last}. Copy or make it again.")


def _samples(
    members: Iterable[tuple[tarfile.TarInfo, Content]], url: str, image_keys: Sequence[str], left_out: LeftOut
) -> Iterator[_Sample]:
    """Yield a sample for consecutive members with the same key; read to the end of the file."""
    current: _Sample | None = None
    for member, content in members:
        parts = split_name(member.name) if member.isreg() else None
        # A member with the key of the one before belongs to its sample.
        if parts is None or ((current is None or parts[0] != current.key) and is_debris_member(member.name)):
            leave_out(member, url, image_keys, left_out)
            continue
        key, extension = parts
        if current is None or key != current.key:
            if current is not None:
                yield current
            # `offset` is that of the first header, be it a GNU long name or a PAX header of this member.
            current = _Sample(key, member.offset)
        _add(current, member, content, extension, url)
    if current is not None:
        yield current


def leave_out(member: tarfile.TarInfo, url: str, image_keys: Sequence[str], left_out: LeftOut) -> None:
    """Count a member that belongs to no sample; refuse a link that should have belonged to one."""
    parts = split_name(member.name)
    if member.isdir():
        return
    if is_debris_member(member.name):
        left_out.add(DEBRIS, member.name)
    elif parts is None:
        left_out.add(_NO_KEY, member.name)
    elif (member.islnk() or member.issym()) and parts[1] in (*_CLASS_EXTENSIONS, *IMAGE_EXTENSIONS, *image_keys):
        # webdataset skips it, and so the sample or its class.
        kind = "hard" if member.islnk() else "symbolic"
        raise DataError(
            f"{url}: '{member.name}' is a {kind} link to '{member.linkname}', and has no content of its own. "
            "Make the tar of whole files: tar --hard-dereference --dereference."
        )
    else:
        left_out.add(_SPECIAL, member.name)


def _add(sample: _Sample, member: tarfile.TarInfo, content: Content, extension: str, url: str) -> None:
    """Add a member to its sample."""
    if extension in sample.members:
        raise DataError(
            f"{url}: sample '{sample.key}' has two members with the extension '{extension}'. {_KEY_RULE} "
            "Remove one, or make the shard again."
        )
    refuse_sparse(member, url)
    sample.members[extension] = (member.offset_data, member.size)
    sample.stop = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if extension in _CLASS_EXTENSIONS:
        setattr(sample, extension, content())


def refuse_sparse(member: tarfile.TarInfo, url: str) -> None:
    """Raise DataError if a file in a tar is stored without its holes."""
    if member.issparse():
        raise DataError(
            f"{url}: '{member.name}' is a sparse file, so its bytes are not contiguous. Make the tar without --sparse."
        )


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
                f"{url}: the key '{sample.key}' occurs twice, or its members are not consecutive. {_KEY_RULE} "
                "Sort the members by name (tar --sort=name), or make the shard again."
            )
        seen.add(sample.key)
        # tarfile decodes a name that is not UTF-8 with surrogates; they become the same bytes again.
        yield sample.key.encode("utf-8", "surrogateescape")


def url_in_json(content: bytes | None) -> str:
    """Return where an image was downloaded from, by img2dataset's JSON; empty if that does not say."""
    try:
        value: Any = json.loads(content or b"")
    except (ValueError, RecursionError):
        return ""
    return str(value["url"]) if isinstance(value, Mapping) and "url" in value else ""


def _image_of(sample: _Sample, url: str, image_keys: Sequence[str]) -> str:
    """Return the extension of a sample's image."""
    members = sample.members
    if image_keys:
        found = [extension for extension in image_keys if extension in members][:1]
    else:
        found = [extension for extension in members if extension in _IMAGE_EXTENSIONS]
    if len(found) == 1 and members[found[0]][1]:
        return found[0]
    where, listed = f"{url}: sample '{sample.key}'", ", ".join(sorted(members))
    if len(found) > 1:
        raise DataError(
            f"{where} has {len(found)} images: {', '.join(sorted(found))}. Name the extension of those to train on: "
            f"add --image-key {found[0]} to 'shards index', or another one."
        )
    if found:
        raise DataError(f"{where} has an empty image (it has: {listed}). Remove the sample, or restore the image.")
    others = [extension for extension in sorted(members) if extension.rpartition(".")[2] in _IMAGE_EXTENSIONS]
    hint = f" If '{others[0]}' is the image, add --image-key {others[0]} to 'shards index'." if others else ""
    raise DataError(
        f"{where} has no image (it has: {listed}). {_KEY_RULE} Remove the sample or give it one of: "
        f"{', '.join(image_keys or IMAGE_EXTENSIONS)}.{hint}"
    )


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
        raise DataError(
            f"{where} has no class: it has neither .cls nor .json (it has: "
            f"{', '.join(sorted(sample.members))}). {_KEY_RULE} Add a .cls with the class number, or a table of labels "
            f"(--labels FILE.csv){_UNPACK if '/' in sample.key else ''}."
        )
    if not 0 <= label <= MAX_CLASS:
        raise DataError(
            f"{where} has the class {label}; classes are numbered from 0, and {MAX_CLASS:,} is the largest. "
            "A network has an output for each number up to the largest one: renumber the classes without gaps."
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
        "Add a .cls with the class number, or a table of labels (--labels FILE.csv)."
    )
