"""Files in a bucket, as `local_files` has those on a disk: what needs more than one request, or one of a special kind.

Names are URLs of S3, normalised; sizes and lists of names are those of any object store. Errors are the libraries'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from rsb_cluster.storage.failures import error_code
from rsb_cluster.storage.file_systems import file_system
from rsb_cluster.storage.local_files import Buffer
from rsb_cluster.storage.s3 import create_object, list_folder, list_folders, list_objects, stream_object
from rsb_cluster.storage.transfer import Transfer

# A file larger than two parts is a multipart upload; only so many parts are copied in memory at a time.
PART_BYTES, CONCURRENT_PARTS = 16 << 20, 4

FOLDERS_TOGETHER = 100  # neighbours that are listed one after the other, beside the next ones
CONCURRENT_LISTINGS = 32


def write(url: str, content: Buffer) -> None:
    """Write a file, which becomes visible when it is complete."""
    if len(content) > 2 * PART_BYTES:
        parts = _CopyOnSlice(content)
        file_system(url).pipe_file(url, parts, chunksize=PART_BYTES, max_concurrency=CONCURRENT_PARTS)
    else:
        file_system(url).pipe_file(url, bytes(content))


def create(url: str, content: bytes) -> bool | None:
    """Write a file if it does not exist; return False if it does, None if the server has no request for that."""
    return create_object(*split(url), content)


def stream(url: str, start: int, stop: int | None, *, chunk: int, transfer: Transfer) -> Iterator[bytes]:
    """Yield a file's bytes ``[start, stop)``, fewer if it ends before, in pieces of at most ``chunk``."""
    yield from stream_object(*split(url), start, stop, chunk=chunk, transfer=transfer)


def exists(url: str) -> bool:
    """Whether there is a file, or one below the URL; a bucket that is missing is an error."""
    try:
        file_system(url).info(url)
    except FileNotFoundError as error:
        if error_code(error) == "NoSuchBucket":
            raise
        return False
    return True


def sizes(folder: str) -> dict[str, int]:
    """Return the size in bytes of each file below a folder, by its path in it."""
    found: dict[str, Any] = file_system(folder).find(folder, detail=True)
    prefix = _prefix_length(folder)
    return {name[prefix:]: int(info["size"]) for name, info in found.items() if name[prefix:]}


def files(folder: str, below: str) -> list[str]:
    """Return the paths in a folder of all files below a URL in it."""
    prefix = _prefix_length(folder)
    return [name[prefix:] for name in file_system(folder).find(below)]


def tags(folder: str) -> dict[str, str]:
    """Return the ETag of each file below a folder, by its path in it."""
    bucket, prefix = _as_prefix(folder)
    return {key[len(prefix) :]: tag for key, tag in list_objects(bucket, prefix).items()}


def tags_of(folder: str, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return what `tags` does for folders directly below this one, by name, with fewer requests."""
    bucket, prefix = _as_prefix(folder)
    ordered = sorted(names)
    shares = [ordered[i : i + FOLDERS_TOGETHER] for i in range(0, len(ordered), FOLDERS_TOGETHER)]
    with ThreadPoolExecutor(CONCURRENT_LISTINGS) as pool:
        listed = pool.map(partial(list_folders, bucket, prefix), shares)
        return {name: found for share in listed for name, found in share.items()}


def entries(folder: str) -> list[tuple[str, bool]]:
    """Return the names directly below a folder, and whether each is a file.

    S3 consoles mark a folder by an empty object with its name and a slash: the empty name.
    """
    return list_folder(*_as_prefix(folder))


# fsspec's own rm and mv expand *, ? and [ in a name as a glob, and would touch other files.


def remove(url: str) -> None:
    """Remove a file, or a folder and everything in it, if it exists."""
    system = file_system(url)
    for name in system.find(url):
        system.rm_file(name)


def remove_file(url: str) -> None:
    """Remove a file, never a folder, if it exists."""
    with suppress(FileNotFoundError):
        file_system(url).rm_file(url)


def move(source: str, target: str) -> None:
    """Copy a file or folder, then remove it. Raises FileNotFoundError if there is none."""
    system = file_system(source)
    names = system.find(source)
    if not names:
        raise FileNotFoundError(source)
    start = len(source.split("://", 1)[1])
    for name in names:
        system.cp_file(name, target + name[start:])
    for name in names:
        system.rm_file(name)


def split(url: str) -> tuple[str, str]:
    """Return the bucket and the key of a URL on S3."""
    bucket, _, key = url.partition("://")[2].partition("/")
    if bucket.startswith("arn:"):  # of an access point; s3fs knows where such a name ends
        bucket, key, _ = file_system(url).split_path(url)
    return bucket, key


def _as_prefix(folder: str) -> tuple[str, str]:
    """Return the bucket, and what the keys of all files below a folder begin with."""
    bucket, key = split(folder)
    return bucket, f"{key}/" if key else ""


def _prefix_length(folder: str) -> int:
    return len(str(file_system(folder)._strip_protocol(folder))) + 1


class _CopyOnSlice:
    """Bytes whose slices are copies: botocore rejects a memoryview, and aiohttp warns about a large bytearray."""

    def __init__(self, content: Buffer) -> None:
        self._content = memoryview(content)

    def __len__(self) -> int:
        return len(self._content)

    def __getitem__(self, part: slice) -> bytes:
        return bytes(self._content[part])
