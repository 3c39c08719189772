"""Files in a folder, on a local disk or in an object store: the one place that uses fsspec and S3.

A file is written atomically: locally to a temporary file that then replaces the old one, in an object store by one
request that becomes visible when it is complete. Errors of libraries are translated to ours here.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

from rsb_cluster.errors import AccessError, ConfigError, MissingError, StorageError
from rsb_cluster.storage.redact import redact
from rsb_cluster.storage.s3 import create_object, endpoint_url, stream_object
from rsb_cluster.storage.transfer import GuardedFile, Transfer, fill, stream_file

Buffer = bytes | bytearray | memoryview

# A file larger than two parts is a multipart upload to S3; only so many parts are copied in memory at a time.
PART_BYTES, CONCURRENT_PARTS = 16 << 20, 4

CONCURRENT_READS = 32  # a shared file system or an object store needs milliseconds per request, however small

# Timeouts and retries of the S3 client: a request that hangs must not block a job forever.
S3_CLIENT = {"retries": {"max_attempts": 5, "mode": "standard"}, "connect_timeout": 10, "read_timeout": 60}


class Store:
    """A folder, local or ``s3://``, whose files are read and written whole.

    Args:
        url: A local path, ``file://`` or any URL that fsspec knows. Paths given to the methods are relative to it,
            use ``/``, and cannot leave it.
    """

    def __init__(self, url: str | Path) -> None:
        text = str(url)
        if "://" not in text:
            text = str(Path(text).expanduser().absolute())
        elif text.startswith("file://"):
            text = unquote(text.removeprefix("file://"))
        self.url = text.rstrip("/") or "/"

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a file system of this machine."""
        return "://" not in self.url

    def child(self, *parts: str) -> Store:
        """Return the folder below this one."""
        return Store("/".join((self.url, *map(_checked_path, parts))))

    def locate(self, path: str) -> str:
        """Return the full URL (or local path) of a file; of the folder itself for an empty path."""
        return self._inside(path) if path else self.url

    def _inside(self, path: str) -> str:
        return f"{self.url}/{_checked_path(path)}"

    def read_bytes(self, path: str) -> bytes:
        """Return a file's content. Raises MissingError if it does not exist."""
        with _translated_errors(self._inside(path)):
            if self.is_local:
                return Path(self._inside(path)).read_bytes()
            content: bytes = self._fs.cat_file(self._inside(path))
            return content

    def read_many(self, paths: Iterable[str]) -> Iterator[bytes | StorageError]:
        """Yield the contents of small files in the requested order, with concurrent requests.

        A file that cannot be read yields its error, and the others are still read.
        """
        urls = (self._inside(path) for path in paths)
        with ThreadPoolExecutor(CONCURRENT_READS) as pool:
            while batch := list(itertools.islice(urls, CONCURRENT_READS * 8)):  # only one batch is held in memory
                if self.is_local:
                    yield from pool.map(_content_or_error, batch, (Path(url).read_bytes for url in batch))
                    continue
                with _translated_errors(self.url):
                    found = self._fs.cat_ranges(batch, None, None, on_error="return")
                yield from map(_content_or_error, batch, (partial(_content_or_raise, content) for content in found))

    def write_bytes(self, path: str, content: Buffer) -> None:
        """Write a file atomically: a reader sees the old content or the new one, never a part."""
        url = self._inside(path)
        with _translated_errors(url):
            if not self.is_local:
                if url.startswith(("s3://", "s3a://")) and len(content) > 2 * PART_BYTES:
                    parts = _CopyOnSlice(content)
                    self._fs.pipe_file(url, parts, chunksize=PART_BYTES, max_concurrency=CONCURRENT_PARTS)
                else:
                    self._fs.pipe_file(url, bytes(content))
                return
            target = Path(url)
            target.parent.mkdir(parents=True, exist_ok=True)
            with _temporary_file(target, content) as temporary:
                temporary.replace(target)

    def create_bytes(self, path: str, content: bytes) -> bool:
        """Write a file atomically if it does not exist; return False if it exists.

        Locally, and on an S3 server that supports ``If-None-Match`` (Amazon's since 2024, Ceph), exactly one of several
        concurrent writers gets True. On other servers two writers may both get True if they write at the same moment.
        """
        url = self._inside(path)
        with _translated_errors(url):
            if self.is_local:
                return _create_file(Path(url), content)
            if url.startswith(("s3://", "s3a://")):
                bucket, key, _ = self._fs.split_path(url)
                created = create_object(bucket, key, content)
                if created is not None:
                    return created
            if self.exists(path):
                return False
            self._fs.pipe_file(url, content)
        return self.read_bytes(path) == content

    def read_json(self, path: str) -> Any:
        """Return a JSON file's value."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise StorageError(f"{self.locate(path)} is not JSON: {error}. Was it edited by hand?") from error

    def create_json(self, path: str, value: Any) -> bool:
        """Write a value as a JSON file if it does not exist; return False if it exists."""
        return self.create_bytes(path, as_json(value))

    def write_json(self, path: str, value: Any) -> None:
        """Write a value as an indented JSON file."""
        self.write_bytes(path, as_json(value))

    def exists(self, path: str = "") -> bool:
        """Whether a file (or, for an empty path, the folder) exists."""
        with _translated_errors(self.locate(path)):
            return Path(self.locate(path)).exists() if self.is_local else bool(self._fs.exists(self.locate(path)))

    def size(self, path: str) -> int:
        """Return a file's size in bytes."""
        with _translated_errors(self._inside(path)):
            if self.is_local:
                return Path(self._inside(path)).stat().st_size
            return int(self._fs.info(self._inside(path))["size"])

    def files(self, folder: str = "") -> list[str]:
        """Return the paths of all files below a folder, sorted; hidden files are left out."""
        root = self.locate(folder)
        with _translated_errors(root):
            if self.is_local:
                if not Path(root).is_dir():
                    return []
                found = [str(p.relative_to(self.url)) for p in Path(root).rglob("*") if p.is_file()]
            else:
                prefix = len(str(self._fs._strip_protocol(self.url))) + 1
                found = [name[prefix:] for name in self._fs.find(root)]
        return sorted(name for name in found if not PurePosixPath(name).name.startswith("."))

    def names(self, folder: str = "") -> list[str]:
        """Return the names directly below a folder (files and folders), sorted; empty if there is no folder."""
        return sorted(self.entries(folder))

    def entries(self, folder: str = "") -> dict[str, bool]:
        """Return the names directly below a folder and whether each is a file; hidden ones are left out."""
        root = self.locate(folder)
        with _translated_errors(root):
            if self.is_local:
                found = _local_entries(root)
            else:
                try:
                    objects = self._fs.ls(root, detail=True)
                except FileNotFoundError:
                    objects = []
                # S3 consoles mark a folder by an empty object with its name and a trailing slash.
                marker = f"{self._fs._strip_protocol(root)}/"
                inside = [(str(o["name"]), o["type"] != "directory") for o in objects if o["name"] != marker]
                found = [(name.rstrip("/").rsplit("/", 1)[-1], is_file) for name, is_file in inside]
        files: dict[str, bool] = {}
        for name, is_file in found:
            if name and not name.startswith("."):
                files[name] = is_file and files.get(name, True)  # in an object store a name can be both
        return files

    def delete(self, path: str) -> None:
        """Remove a file, or a folder and everything in it, if it exists."""
        import shutil

        url = self._inside(path)
        with _translated_errors(url):
            if not self.is_local:
                for name in self._objects(url):
                    self._fs.rm_file(name)
            elif Path(url).is_dir():
                shutil.rmtree(url)
            else:
                Path(url).unlink(missing_ok=True)

    def delete_file(self, path: str) -> None:
        """Remove a file, never a folder, if it exists."""
        with _translated_errors(self._inside(path)):
            if self.is_local:
                Path(self._inside(path)).unlink(missing_ok=True)
            else:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(self._inside(path))

    def move(self, source: str, target: str) -> None:
        """Rename a file or folder. In an object store this copies and deletes, so it is not atomic there."""
        with _translated_errors(self._inside(source)):
            if self.is_local:
                Path(self._inside(target)).parent.mkdir(parents=True, exist_ok=True)
                Path(self._inside(source)).replace(self._inside(target))
            else:
                self._move(self._inside(source), self._inside(target))

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading as a seekable stream with read-ahead."""
        with _translated_errors(self._inside(path)):
            if self.is_local:
                return Path(self._inside(path)).open("rb")
            opened = self._fs.open(self._inside(path), "rb", block_size=8 << 20, cache_type="readahead")
            return cast(BinaryIO, GuardedFile(opened, lambda: _translated_errors(self._inside(path))))

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
            with _translated_errors(self._inside(path)), Path(self._inside(path)).open("rb", buffering=0) as file:
                return fill(buffer, file, start, transfer)
        done = 0
        for content in self.stream(path, start, start + len(buffer), transfer=transfer):
            buffer[done : done + len(content)] = content
            done += len(content)
        return done

    def make_private(self) -> None:
        """Create the folder, readable by this user only; in an object store the bucket's policy decides."""
        if self.is_local:
            with _translated_errors(self.url):
                Path(self.url).mkdir(mode=0o700, parents=True, exist_ok=True)

    def check_writable(self) -> None:
        """Write and remove a probe file. Raises StorageError if that fails."""
        probe = f"probe-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"")
        self.delete(probe)

    def _stream(self, url: str, start: int, stop: int | None, chunk: int, transfer: Transfer) -> Iterator[bytes]:
        with _translated_errors(url):
            if url.startswith(("s3://", "s3a://")):
                bucket, key, _ = self._fs.split_path(url)
                yield from stream_object(bucket, key, start, stop, chunk=chunk, transfer=transfer)
                return
            with Path(url).open("rb") if self.is_local else self._fs.open(url, "rb") as file:
                yield from stream_file(file, start, stop, chunk=chunk, transfer=transfer)

    # fsspec's own rm and mv expand *, ? and [ in a name as a glob, and would touch other files.

    def _objects(self, url: str) -> list[str]:
        """Return the objects at and below a URL of an object store."""
        found: list[str] = self._fs.find(url)
        return found

    def _move(self, source: str, target: str) -> None:
        names = self._objects(source)
        if not names:
            raise FileNotFoundError(source)
        start = len(source.split("://", 1)[1])
        for name in names:
            self._fs.cp_file(name, target + name[start:])
        for name in names:
            self._fs.rm_file(name)

    @property
    def _fs(self) -> Any:
        return _filesystem(self.url.split("://", 1)[0], endpoint_url(), os.getpid())


@cache
def _filesystem(protocol: str, endpoint: str | None, pid: int) -> Any:
    """Return the fsspec file system of a protocol, endpoint and process: connections do not survive a fork."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = S3_CLIENT
        if endpoint:
            options["endpoint_url"] = endpoint
    try:
        return fsspec.filesystem(protocol, **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"cannot read {protocol}:// URLs: {error}.") from error


class _CopyOnSlice:
    """Bytes whose slices are copies: botocore rejects a memoryview, and aiohttp warns about a large bytearray."""

    def __init__(self, content: Buffer) -> None:
        self._content = memoryview(content)

    def __len__(self) -> int:
        return len(self._content)

    def __getitem__(self, part: slice) -> bytes:
        return bytes(self._content[part])


@contextmanager
def _temporary_file(target: Path, content: Buffer) -> Iterator[Path]:
    """Write a temporary file next to the target, and remove it afterwards unless it was renamed."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _create_file(target: Path, content: bytes) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_file(target, content) as temporary:
        try:
            target.hardlink_to(temporary)  # atomic, and fails if the name exists, on NFS too
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            try:
                with target.open("xb") as file:  # a file system without hard links
                    file.write(content)
            except FileExistsError:
                return False
    return True


def _local_entries(folder: str) -> list[tuple[str, bool]]:
    if not Path(folder).is_dir():
        return []
    with os.scandir(folder) as entries:  # tells files from folders, mostly without another system call
        return [(entry.name, not entry.is_dir()) for entry in entries]


def as_json(value: Any) -> bytes:
    """Return a value as an indented JSON file's bytes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _content_or_error(url: str, read: Callable[[], bytes]) -> bytes | StorageError:
    try:
        with _translated_errors(url):
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


_HINTS = dict.fromkeys(
    (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.ENAMETOOLONG), "Choose another folder."
) | dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space, or choose another folder.")


def _access_hint(url: str) -> str:
    if "://" not in url:
        return "Check the folder's permissions."
    return "Check AWS_PROFILE, whether the credentials have expired, and the bucket's policy."


@contextmanager
def _translated_errors(url: str) -> Iterator[None]:
    """Translate errors of a file system or an S3 client to ours, with a hint what to do next."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingError(f"there is nothing at {url}. Check the path (and, on S3, the bucket's name).") from error
    except PermissionError as error:
        raise AccessError(f"not allowed to use {url}: {redact(str(error))}. {_access_hint(url)}") from error
    except OSError as error:
        if "://" in url and error.errno == errno.EINVAL and "Bad Request" in str(error):
            # S3's response to HEAD has no body that could say ExpiredToken or InvalidToken.
            raise AccessError(f"not allowed to use {url}: S3 says 400, Bad Request. {_access_hint(url)}") from error
        hint = _HINTS.get(error.errno or 0, "Try again later.")
        raise StorageError(f"cannot use {url}: {redact(str(error))}. {hint}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("botocore", "aiobotocore", "s3fs", "aiohttp"):
            raise
        raise StorageError(
            f"cannot use {url}: {redact(str(error))}. Check AWS_ENDPOINT_URL, the credentials and the network."
        ) from error
