"""Whole files in a folder, on a local disk or in an object store: the one place that touches fsspec and S3.

A file is written whole or not at all: locally to a temporary name that then replaces the old one, in an object store
by one request that becomes visible when it is complete. Foreign errors are translated here.
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

# What is larger than two parts goes to S3 in parts: no more than so many of them are copied for it at a time.
PART_BYTES, PARTS_AT_ONCE = 16 << 20, 4

READ_AT_ONCE = 32  # a shared file system or an object store takes milliseconds for an answer, whatever its size

# Time-outs and retries of the S3 client: a request that hangs must not hold up a job for ever.
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
        return Store("/".join((self.url, *map(_checked, parts))))

    def locate(self, path: str) -> str:
        """Return the full URL (or local path) of a file."""
        return self._inside(path) if path else self.url

    def _inside(self, path: str) -> str:
        return f"{self.url}/{_checked(path)}"

    def read_bytes(self, path: str) -> bytes:
        """Return a file's content. Raises MissingError where there is none."""
        with _translated(self._inside(path)):
            if self.is_local:
                return Path(self._inside(path)).read_bytes()
            content: bytes = self._fs.cat_file(self._inside(path))
            return content

    def read_many(self, paths: Iterable[str]) -> Iterator[bytes | StorageError]:
        """Yield the contents of small files in the order asked for, many requests at once.

        A file that cannot be read, or is not there, yields the error: it does not end the reading of the others.
        """
        urls = (self._inside(path) for path in paths)
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            while batch := list(itertools.islice(urls, READ_AT_ONCE * 8)):  # a batch, and no more, is held in memory
                if self.is_local:
                    yield from pool.map(_content_or_error, batch, (Path(url).read_bytes for url in batch))
                    continue
                with _translated(self.url):
                    found = self._fs.cat_ranges(batch, None, None, on_error="return")
                yield from map(_content_or_error, batch, (partial(_given, content) for content in found))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Return the bytes ``[start, stop)`` of a file."""
        with _translated(self._inside(path)):
            if self.is_local:
                with Path(self._inside(path)).open("rb") as file:
                    file.seek(start)
                    content = file.read(stop - start)
            else:
                content = self._range(self._inside(path), start, stop)
        if len(content) != stop - start:
            raise StorageError(
                f"{self._inside(path)} ends before byte {stop}: it was cut short or replaced. "
                "Copy it again, or index the shards anew."
            )
        return content

    def write_bytes(self, path: str, content: Buffer) -> None:
        """Write a whole file; a reader sees the old content or the new one, never a part."""
        url = self._inside(path)
        with _translated(url):
            if not self.is_local:
                if url.startswith(("s3://", "s3a://")) and len(content) > 2 * PART_BYTES:
                    parts = _Parts(content)
                    self._fs.pipe_file(url, parts, chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
                else:
                    self._fs.pipe_file(url, bytes(content))
                return
            target = Path(url)
            target.parent.mkdir(parents=True, exist_ok=True)
            with _written_beside(target, content) as temporary:
                temporary.replace(target)

    def create_bytes(self, path: str, content: bytes) -> bool:
        """Write a whole file where nothing is; return False where something is, by whoever was faster.

        Locally, and on an S3 server that knows ``If-None-Match`` (Amazon's since 2024, Ceph), of several writers one
        gets True. Elsewhere two of them that write in the same moment may both believe that they were first until one
        reads again.
        """
        url = self._inside(path)
        with _translated(url):
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
        """Write a value as a JSON file where nothing is; return False where something is."""
        return self.create_bytes(path, as_json(value))

    def write_json(self, path: str, value: Any) -> None:
        """Write a value as an indented JSON file."""
        self.write_bytes(path, as_json(value))

    def exists(self, path: str = "") -> bool:
        """Whether a file (or, for an empty path, the folder) is there."""
        with _translated(self.locate(path)):
            return Path(self.locate(path)).exists() if self.is_local else bool(self._fs.exists(self.locate(path)))

    def size(self, path: str) -> int:
        """Return a file's size in bytes."""
        with _translated(self._inside(path)):
            if self.is_local:
                return Path(self._inside(path)).stat().st_size
            return int(self._fs.info(self._inside(path))["size"])

    def files(self, folder: str = "") -> list[str]:
        """Return the paths of all files below a folder, sorted; temporary files are not shown."""
        root = self.locate(folder)
        with _translated(root):
            if self.is_local:
                if not Path(root).is_dir():
                    return []
                found = [str(p.relative_to(self.url)) for p in Path(root).rglob("*") if p.is_file()]
            else:
                prefix = len(str(self._fs._strip_protocol(self.url))) + 1
                found = [name[prefix:] for name in self._fs.find(root)]
        return sorted(name for name in found if not PurePosixPath(name).name.startswith("."))

    def names(self, folder: str = "") -> list[str]:
        """Return the names directly below a folder (files and folders), sorted; empty where there is no folder."""
        return sorted(self.entries(folder))

    def entries(self, folder: str = "") -> dict[str, bool]:
        """Return the names directly below a folder, each with whether it is a file; hidden ones are left out."""
        root = self.locate(folder)
        with _translated(root):
            if self.is_local:
                found = _local_entries(root)
            else:
                try:
                    objects = self._fs.ls(root, detail=True)
                except FileNotFoundError:
                    objects = []
                # Consoles mark a folder by an object that is called like it, with a slash at the end.
                marker = f"{self._fs._strip_protocol(root)}/"
                inside = [(str(o["name"]), o["type"] != "directory") for o in objects if o["name"] != marker]
                found = [(name.rstrip("/").rsplit("/", 1)[-1], is_file) for name, is_file in inside]
        files: dict[str, bool] = {}
        for name, is_file in found:
            if name and not name.startswith("."):
                files[name] = is_file and files.get(name, True)  # in an object store a name can be both
        return files

    def delete(self, path: str) -> None:
        """Remove a file, or a folder with all it holds; nothing happens where there is none."""
        import shutil

        url = self._inside(path)
        with _translated(url):
            if not self.is_local:
                for name in self._objects(url):
                    self._fs.rm_file(name)
            elif Path(url).is_dir():
                shutil.rmtree(url)
            else:
                Path(url).unlink(missing_ok=True)

    def delete_file(self, path: str) -> None:
        """Remove a file, and never a folder; nothing happens where there is none."""
        with _translated(self._inside(path)):
            if self.is_local:
                Path(self._inside(path)).unlink(missing_ok=True)
            else:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(self._inside(path))

    def move(self, source: str, target: str) -> None:
        """Rename a file or folder. In an object store this copies and deletes, so it is not atomic there."""
        with _translated(self._inside(source)):
            if self.is_local:
                Path(self._inside(target)).parent.mkdir(parents=True, exist_ok=True)
                Path(self._inside(source)).replace(self._inside(target))
            else:
                self._move(self._inside(source), self._inside(target))

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading as a seekable stream with read-ahead."""
        with _translated(self._inside(path)):
            if self.is_local:
                return Path(self._inside(path)).open("rb")
            opened = self._fs.open(self._inside(path), "rb", block_size=8 << 20, cache_type="readahead")
            return cast(BinaryIO, GuardedFile(opened, lambda: _translated(self._inside(path))))

    def stream(
        self, path: str, start: int = 0, stop: int | None = None, chunk: int = 1 << 20, transfer: Transfer | None = None
    ) -> Iterator[bytes]:
        """Yield a file's bytes ``[start, stop)`` in pieces, as they come; fewer where the file ends before ``stop``.

        A request to S3 that breaks is gone on with from that byte, so this costs one request and little CPU time.

        Args:
            path: The file.
            start: First byte.
            stop: Byte after the last; None for all there are.
            chunk: Most bytes in a piece.
            transfer: Counts the requests, and can end the reading from another thread.
        """
        return self._stream(self._inside(path), start, stop, chunk, transfer or Transfer())

    def read_into(self, path: str, start: int, buffer: memoryview, *, transfer: Transfer | None = None) -> int:
        """Fill a buffer with a file's bytes from ``start`` on; return how many, fewer where the file ends before."""
        transfer = transfer or Transfer()
        if self.is_local:
            with _translated(self._inside(path)), Path(self._inside(path)).open("rb", buffering=0) as file:
                return fill(buffer, file, start, transfer)
        done = 0
        for content in self.stream(path, start, start + len(buffer), transfer=transfer):
            buffer[done : done + len(content)] = content
            done += len(content)
        return done

    def make_private(self) -> None:
        """Make the folder, for the eyes of this user alone; an object store has its own rules."""
        if self.is_local:
            with _translated(self.url):
                Path(self.url).mkdir(mode=0o700, parents=True, exist_ok=True)

    def check_writable(self) -> None:
        """Write and remove a probe file. Raises StorageError where that fails."""
        probe = f"probe-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"")
        self.delete(probe)

    def _stream(self, url: str, start: int, stop: int | None, chunk: int, transfer: Transfer) -> Iterator[bytes]:
        with _translated(url):
            if url.startswith(("s3://", "s3a://")):
                bucket, key, _ = self._fs.split_path(url)
                yield from stream_object(bucket, key, start, stop, chunk=chunk, transfer=transfer)
                return
            with Path(url).open("rb") if self.is_local else self._fs.open(url, "rb") as file:
                yield from stream_file(file, start, stop, chunk=chunk, transfer=transfer)

    # fsspec's own rm and mv take *, ? and [ in a name for a pattern, and would reach for other files.

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

    def _range(self, url: str, start: int, stop: int) -> bytes:
        if start == stop:
            return b""  # HTTP has no empty range
        try:
            content: bytes = self._fs.cat_file(url, start=start, end=stop)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return b""  # it begins behind the end of the file
        return content

    @property
    def _fs(self) -> Any:
        return _filesystem(self.url.split("://", 1)[0], endpoint_url(), os.getpid())


@cache
def _filesystem(protocol: str, endpoint: str | None, pid: int) -> Any:
    """One fsspec file system per protocol, endpoint and process: a client's connections do not survive a fork."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = S3_CLIENT
        if endpoint:
            options["endpoint_url"] = endpoint
    try:
        return fsspec.filesystem(protocol, **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"cannot read {protocol}:// URLs: {error}") from error


class _Parts:
    """Bytes of which a slice is a copy: botocore refuses a memoryview, and aiohttp warns of a large bytearray."""

    def __init__(self, content: Buffer) -> None:
        self._content = memoryview(content)

    def __len__(self) -> int:
        return len(self._content)

    def __getitem__(self, part: slice) -> bytes:
        return bytes(self._content[part])


@contextmanager
def _written_beside(target: Path, content: Buffer) -> Iterator[Path]:
    """Write a temporary file next to the target; it is gone afterwards unless it took the target's place."""
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
    with _written_beside(target, content) as temporary:
        try:
            target.hardlink_to(temporary)  # whole at once, and fails where the name is taken, on NFS too
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
    with os.scandir(folder) as entries:  # its entries know most folders without another call
        return [(entry.name, not entry.is_dir()) for entry in entries]


def as_json(value: Any) -> bytes:
    """Return a value as an indented JSON file's bytes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _content_or_error(url: str, read: Callable[[], bytes]) -> bytes | StorageError:
    try:
        with _translated(url):
            return read()
    except StorageError as error:
        return error


def _given(found: bytes | Exception) -> bytes:
    if isinstance(found, Exception):
        raise found
    return found


def _checked(path: str) -> str:
    if "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise StorageError(f"the path {path!r} would leave its folder; it is refused")
    return path


_HINTS = dict.fromkeys(
    (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.ENAMETOOLONG), "Choose another folder."
) | dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space, or choose another folder.")


def _access_hint(url: str) -> str:
    if "://" not in url:
        return "Check the folder's permissions."
    return "Check AWS_PROFILE, whether the credentials have expired, and the bucket's policy."


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn what a file system or an S3 client raises into our errors, with the next thing to try."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingError(f"there is nothing at {url}. Check the path (and, on S3, the bucket's name).") from error
    except PermissionError as error:
        raise AccessError(f"not allowed to use {url}: {redact(str(error))}. {_access_hint(url)}") from error
    except OSError as error:
        if "://" in url and error.errno == errno.EINVAL and "Bad Request" in str(error):
            # S3's answer to HEAD has no body that could say ExpiredToken or InvalidToken.
            raise AccessError(f"not allowed to use {url}: S3 says 400, Bad Request. {_access_hint(url)}") from error
        hint = _HINTS.get(error.errno or 0, "Try again later.")
        raise StorageError(f"cannot use {url}: {redact(str(error))}. {hint}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("botocore", "aiobotocore", "s3fs", "aiohttp"):
            raise
        raise StorageError(
            f"cannot use {url}: {redact(str(error))}. Check AWS_ENDPOINT_URL, the credentials and the network."
        ) from error
