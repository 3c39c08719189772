"""Files in a folder, on a local disk or in an object store.

A file is written atomically: locally to a temporary file that then replaces the old one, in an object store by one
request that becomes visible when it is complete. Errors of libraries are translated to ours here.
"""

from __future__ import annotations

import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import quote

from rsb_cluster.errors import MissingError, StorageError
from rsb_cluster.storage import bucket_files, data_urls, local_files
from rsb_cluster.storage.failures import translated_errors
from rsb_cluster.storage.file_systems import file_system
from rsb_cluster.storage.local_files import Buffer
from rsb_cluster.storage.location import PACKAGES, is_s3, normalise, refuse_read_only, scheme_of
from rsb_cluster.storage.transfer import GuardedFile, Transfer, fill, stream_file

# How a file begins that Git LFS has left in the place of the one that it stands for.
LFS_POINTER = b"version https://git-lfs"

CONCURRENT_READS = 32  # a shared file system or an object store needs milliseconds per request, however small


class Store:
    """A folder, local or ``s3://``, whose files are read and written whole; or a URL of data, which is only read.

    Args:
        url: A local path, ``file:///``, ``s3://`` or one of `rsb_cluster.storage.location.PACKAGES`. Paths given to the
            methods are relative to it, use ``/``, and cannot leave it.

    Raises:
        ConfigError: The URL is none of these; or, from methods that write, it is only read.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = normalise(url)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a file system of this machine."""
        return "://" not in self.url

    @property
    def is_read_only(self) -> bool:
        """Whether the folder is only read, as data."""
        return scheme_of(self.url) in PACKAGES

    @property
    def lists_files(self) -> bool:
        """Whether the names in a folder can be relied on: a web server may show none, or some."""
        return scheme_of(self.url) not in ("http", "https")

    def child(self, *parts: str) -> Store:
        """Return the folder below this one."""
        return Store("/".join((self.url, *map(self._checked, parts))))

    def locate(self, path: str) -> str:
        """Return the full URL (or local path) of a file; of the folder itself for an empty path."""
        return self._inside(path) if path else self.url

    def check_not_read_only(self, what: str) -> None:
        """Refuse a folder that is only read, before work is done for what would be written there.

        Raises:
            ConfigError: It is (see `rsb_cluster.storage.location`).
        """
        refuse_read_only(self.url, what)

    def _inside(self, path: str) -> str:
        return f"{self.url}/{self._checked(path)}"

    def _checked(self, path: str) -> str:
        """Return a path as it is written in a URL. Raises StorageError if it would leave the folder."""
        path = _checked_path(path)
        return path if self.lists_files else quote(path)

    def _to_write(self, path: str) -> str:
        self.check_not_read_only("files")
        return self._inside(path)

    def read_bytes(self, path: str) -> bytes:
        """Return a file's content. Raises MissingError if it does not exist."""
        with translated_errors(self._inside(path)):
            if self.is_local:
                return local_files.read(Path(self._inside(path)))
            content: bytes = file_system(self.url).cat_file(self._inside(path))
            return content

    def read_many(self, paths: Iterable[str]) -> Iterator[bytes | StorageError]:
        """Yield the contents of small files in the requested order, with concurrent requests.

        A file that cannot be read yields its error, and the others are still read.
        """
        urls = (self._inside(path) for path in paths)
        with ThreadPoolExecutor(CONCURRENT_READS) as pool:
            while batch := list(itertools.islice(urls, CONCURRENT_READS * 8)):  # only one batch is held in memory
                if self.is_local:
                    readers = (partial(local_files.read, Path(url)) for url in batch)
                    yield from pool.map(_content_or_error, batch, readers)
                    continue
                with translated_errors(self.url):
                    found = file_system(self.url).cat_ranges(batch, None, None, on_error="return")
                yield from map(_content_or_error, batch, (partial(_content_or_raise, content) for content in found))

    def write_bytes(self, path: str, content: Buffer) -> None:
        """Write a file atomically: a reader sees the old content or the new one, never a part."""
        url = self._to_write(path)
        with translated_errors(url):
            if not self.is_local:
                bucket_files.write(url, content)
                return
            local_files.write(Path(url), content)

    def create_bytes(self, path: str, content: bytes) -> bool:
        """Write a file atomically if it does not exist; return False if it exists.

        Locally, and on an S3 server that supports ``If-None-Match`` (Amazon's since 2024, Ceph), exactly one of several
        concurrent writers gets True. On other servers two writers may both get True if they write at the same moment.
        """
        url = self._to_write(path)
        with translated_errors(url):
            if self.is_local:
                return local_files.create(Path(url), content)
            created = bucket_files.create(url, content)
            if created is not None:
                return created
            if self.exists(path):
                return False
            bucket_files.write(url, content)
        return self.read_bytes(path) == content

    def read_json(self, path: str) -> Any:
        """Return a JSON file's value."""
        return parse_json(self.read_small(path), self.locate(path))

    def read_small(self, path: str) -> bytes:
        """Return a small file's content, on S3 by one request. Raises MissingError if it does not exist."""
        # s3fs asks for the size of a file first, and lists its folder if the file is missing.
        return b"".join(self.stream(path)) if is_s3(self.url) else self.read_bytes(path)

    def create_json(self, path: str, value: Any) -> bool:
        """Write a value as a JSON file if it does not exist; return False if it exists."""
        return self.create_bytes(path, as_json(value))

    def write_json(self, path: str, value: Any) -> None:
        """Write a value as an indented JSON file."""
        self.write_bytes(path, as_json(value))

    def exists(self, path: str = "") -> bool:
        """Whether a file (or, for an empty path, the folder) exists."""
        with translated_errors(self.locate(path)):
            if self.is_local:
                return local_files.exists(Path(self.locate(path)))
            if self.is_read_only:
                return data_urls.exists(file_system(self.url), self.locate(path))
            return bucket_files.exists(self.locate(path))

    def can_open(self, path: str) -> bool:
        """Whether a file exists, also one that on NFS another machine has just made: opening it asks the server."""
        if not self.is_local:
            return self.exists(path)
        try:
            self.open(path).close()
        except MissingError:
            return False
        return True

    def size(self, path: str) -> int:
        """Return a file's size in bytes."""
        with translated_errors(self._inside(path)):
            if self.is_local:
                return Path(self._inside(path)).stat().st_size
            return int(file_system(self.url).info(self._inside(path))["size"])

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file below the folder, hidden ones too, by its path; on S3 one listing."""
        with translated_errors(self.url):
            if self.is_local:
                return {str(p.relative_to(self.url)): size for p, size in local_files.sizes(Path(self.url))}
            return bucket_files.sizes(self.url)

    def files(self, folder: str = "") -> list[str]:
        """Return the paths of all files below a folder, sorted; hidden files are left out."""
        root = self.locate(folder)
        with translated_errors(root):
            if self.is_local:
                found = [str(path.relative_to(self.url)) for path in local_files.files(Path(root))]
            else:
                found = bucket_files.files(self.url, root)
        return sorted(name for name in found if not PurePosixPath(name).name.startswith("."))

    def list_tags(self) -> dict[str, str]:
        """Return all files in this folder on S3, each with its ETag: another one when the file was written again."""
        with translated_errors(self.url):
            return bucket_files.tags(self.url)

    def list_tags_of(self, folders: Sequence[str]) -> dict[str, dict[str, str]]:
        """Return what ``list_tags`` does for folders directly below this one on S3, by name, with fewer requests."""
        with translated_errors(self.url):
            return bucket_files.tags_of(self.url, folders)

    def names(self, folder: str = "") -> list[str]:
        """Return the names directly below a folder (files and folders), sorted; empty if there is no folder."""
        return sorted(self.entries(folder))

    def entries(self, folder: str = "") -> dict[str, bool]:
        """Return the names directly below a folder and whether each is a file; hidden ones are left out."""
        root = self.locate(folder)
        with translated_errors(root):
            if self.is_local:
                found = local_files.entries(Path(root))
            elif self.is_read_only:
                found = data_urls.entries(file_system(self.url), root)
            else:
                found = bucket_files.entries(root)
        files: dict[str, bool] = {}
        for name, is_file in found:
            if name and not name.startswith("."):
                files[name] = is_file and files.get(name, True)  # in an object store a name can be both
        return files

    def delete(self, path: str) -> None:
        """Remove a file, or a folder and everything in it, if it exists."""
        url = self._to_write(path)
        with translated_errors(url):
            if self.is_local:
                local_files.remove(Path(url))
                return
            bucket_files.remove(url)

    def delete_file(self, path: str) -> None:
        """Remove a file, never a folder, if it exists."""
        url = self._to_write(path)
        with translated_errors(url):
            if self.is_local:
                Path(url).unlink(missing_ok=True)
            else:
                bucket_files.remove_file(url)

    def move(self, source: str, target: str) -> None:
        """Rename a file or folder. In an object store this copies and deletes, so it is not atomic there."""
        old, new = self._to_write(source), self._to_write(target)
        with translated_errors(old):
            if self.is_local:
                local_files.make_parents(Path(new).parent)
                Path(old).replace(new)
            else:
                bucket_files.move(old, new)

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading as a seekable stream with read-ahead."""
        with translated_errors(self._inside(path)):
            if self.is_local:
                return local_files.open_file(Path(self._inside(path)))
            opened = file_system(self.url).open(self._inside(path), "rb", block_size=8 << 20, cache_type="readahead")
            return cast(BinaryIO, GuardedFile(opened, lambda: translated_errors(self._inside(path))))

    def stream(
        self, path: str, start: int = 0, stop: int | None = None, chunk: int = 1 << 20, transfer: Transfer | None = None
    ) -> Iterator[bytes]:
        """Yield a file's bytes ``[start, stop)`` in chunks as they arrive; fewer if the file ends before ``stop``.

        This costs one request and little CPU time; a request to S3 that breaks is resumed from that byte.

        Args:
            path: The file.
            start: First byte.
            stop: Byte after the last; None for the end of the file.
            chunk: Maximum size of a chunk, bytes.
            transfer: Counts the requests, and can cancel the read from another thread.
        """
        return self._stream(self._inside(path), start, stop, chunk, transfer or Transfer())

    def read_into(self, path: str, start: int, buffer: memoryview, *, transfer: Transfer | None = None) -> int:
        """Fill a buffer with a file's bytes from ``start`` on; return how many, fewer if the file ends before."""
        transfer = transfer or Transfer()
        if self.is_local:
            with (
                translated_errors(self._inside(path)),
                local_files.open_unbuffered(Path(self._inside(path))) as file,
            ):
                return fill(buffer, file, start, transfer)
        done = 0
        for content in self.stream(path, start, start + len(buffer), transfer=transfer):
            buffer[done : done + len(content)] = content
            done += len(content)
        return done

    def make_folder(self, mode: int) -> None:
        """Create the folder with the permissions of a mode, whatever the umask.

        One that is there and this user's gets those that it lacks. With the set-group-ID bit a folder gets the group of
        the folder that it is in. In an object store nothing is done, as the bucket's policy decides.
        """
        self.check_not_read_only("files")
        if self.is_local:
            with translated_errors(self.url):
                local_files.make_folder(Path(self.url), mode)

    def is_writable(self) -> bool:
        """Whether this user may create files in the folder, as far as that is known without a try."""
        return not self.is_local or os.access(self.url, os.W_OK | os.X_OK, effective_ids=True)

    def check_writable(self) -> None:
        """Write and remove a probe file. Raises StorageError if that fails."""
        probe = f"probe-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"")
        self.delete(probe)

    def _stream(self, url: str, start: int, stop: int | None, chunk: int, transfer: Transfer) -> Iterator[bytes]:
        with translated_errors(url):
            if self.is_local:
                with local_files.open_file(Path(url)) as file:
                    yield from stream_file(file, start, stop, chunk=chunk, transfer=transfer)
            elif self.is_read_only:
                yield from data_urls.stream_url(file_system(self.url), url, start, stop, chunk=chunk, transfer=transfer)
            else:
                yield from bucket_files.stream(url, start, stop, chunk=chunk, transfer=transfer)


def as_json(value: Any) -> bytes:
    """Return a value as an indented JSON file's bytes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def parse_json(content: bytes, where: str) -> Any:
    """Return the value of a JSON file that this package wrote. Raises StorageError if it is damaged."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        what = f"not JSON: {error}" if content.strip() else "empty"
        raise StorageError(f"{where} is {what}. Was it cut off, or edited by hand? Restore it from a copy.") from error


def _content_or_error(url: str, read: Callable[[], bytes]) -> bytes | StorageError:
    try:
        with translated_errors(url):
            return read()
    except StorageError as error:
        return error


def _content_or_raise(found: bytes | Exception) -> bytes:
    if isinstance(found, Exception):
        raise found
    return found


def _checked_path(path: str) -> str:
    if "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise StorageError(f"the path {path!r} would leave its folder; it is refused.")
    return path
