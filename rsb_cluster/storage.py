"""Whole files in a folder, on a local disk or in an object store: the one place that touches fsspec and S3.

A file is written whole or not at all: locally to a temporary name that then replaces the old one, in an object store
by one request that becomes visible when it is complete. Foreign errors are translated here.
"""

from __future__ import annotations

import errno
import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from rsb_cluster.errors import ConfigError, MissingError, StorageError

Buffer = bytes | bytearray | memoryview

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
            text = text.removeprefix("file://")
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
        return f"{self.url}/{_checked(path)}" if path else self.url

    def read_bytes(self, path: str) -> bytes:
        """Return a file's content. Raises MissingError where there is none."""
        with _translated(self.locate(path)):
            if self.is_local:
                return Path(self.locate(path)).read_bytes()
            content: bytes = self._fs.cat_file(self.locate(path))
            return content

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Return the bytes ``[start, stop)`` of a file."""
        with _translated(self.locate(path)):
            if self.is_local:
                with Path(self.locate(path)).open("rb") as file:
                    file.seek(start)
                    content = file.read(stop - start)
            else:
                content = self._fs.cat_file(self.locate(path), start=start, end=stop)
        if len(content) != stop - start:
            raise StorageError(
                f"{self.locate(path)} ends before byte {stop}: it was cut short or replaced. "
                "Copy it again, or index the shards anew."
            )
        return content

    def write_bytes(self, path: str, content: Buffer) -> None:
        """Write a whole file; a reader sees the old content or the new one, never a part."""
        url = self.locate(path)
        with _translated(url):
            if not self.is_local:
                self._fs.pipe_file(url, bytes(content))
                return
            target = Path(url)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
            try:
                with temporary.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

    def read_json(self, path: str) -> Any:
        """Return a JSON file's value."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise StorageError(f"{self.locate(path)} is not JSON: {error}. Was it edited by hand?") from error

    def write_json(self, path: str, value: Any) -> None:
        """Write a value as an indented JSON file."""
        self.write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def exists(self, path: str = "") -> bool:
        """Whether a file (or, for an empty path, the folder) is there."""
        with _translated(self.locate(path)):
            return Path(self.locate(path)).exists() if self.is_local else bool(self._fs.exists(self.locate(path)))

    def size(self, path: str) -> int:
        """Return a file's size in bytes."""
        with _translated(self.locate(path)):
            if self.is_local:
                return Path(self.locate(path)).stat().st_size
            return int(self._fs.info(self.locate(path))["size"])

    def files(self, folder: str = "") -> list[str]:
        """Return the paths of all files below a folder, sorted; temporary files are not shown."""
        root = self.locate(folder)
        with _translated(root):
            if self.is_local:
                if not Path(root).is_dir():
                    return []
                found = [str(p.relative_to(self.url)) for p in Path(root).rglob("*") if p.is_file()]
            else:
                prefix = len(self.url.split("://", 1)[1]) + 1
                found = [name[prefix:] for name in self._fs.find(root)]
        return sorted(name for name in found if not PurePosixPath(name).name.startswith("."))

    def names(self, folder: str = "") -> list[str]:
        """Return the names directly below a folder (files and folders), sorted; empty where there is no folder."""
        root = self.locate(folder)
        with _translated(root):
            if self.is_local:
                found = [p.name for p in Path(root).iterdir()] if Path(root).is_dir() else []
            else:
                try:
                    listed = self._fs.ls(root, detail=False)
                except FileNotFoundError:
                    listed = []
                found = [str(name).rstrip("/").rsplit("/", 1)[-1] for name in listed]
        return sorted(name for name in found if name and not name.startswith("."))

    def delete(self, path: str) -> None:
        """Remove a file, or a folder with all it holds; nothing happens where there is none."""
        import shutil

        url = self.locate(path)
        with _translated(url):
            if not self.is_local:
                if self._fs.exists(url):
                    self._fs.rm(url, recursive=True)
            elif Path(url).is_dir():
                shutil.rmtree(url)
            else:
                Path(url).unlink(missing_ok=True)

    def move(self, source: str, target: str) -> None:
        """Rename a file or folder. In an object store this copies and deletes, so it is not atomic there."""
        with _translated(self.locate(source)):
            if self.is_local:
                Path(self.locate(target)).parent.mkdir(parents=True, exist_ok=True)
                Path(self.locate(source)).replace(self.locate(target))
            else:
                self._fs.mv(self.locate(source), self.locate(target), recursive=True)

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading as a seekable stream with read-ahead."""
        with _translated(self.locate(path)):
            if self.is_local:
                return Path(self.locate(path)).open("rb")
            stream: BinaryIO = self._fs.open(self.locate(path), "rb", block_size=8 << 20, cache_type="readahead")
            return stream

    def check_writable(self) -> None:
        """Write and remove a probe file. Raises StorageError where that fails."""
        probe = f"probe-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"")
        self.delete(probe)

    @property
    def _fs(self) -> Any:
        return _filesystem(self.url.split("://", 1)[0], os.getpid())


@cache
def _filesystem(protocol: str, pid: int) -> Any:
    """One fsspec file system per protocol and process: a client's connections do not survive a fork."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = S3_CLIENT
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            options["endpoint_url"] = endpoint
    try:
        return fsspec.filesystem(protocol, **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"cannot read {protocol}:// URLs: {error}") from error


def _checked(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not path or path.startswith("/") or ".." in parts or "\0" in path:
        raise StorageError(f"the path {path!r} would leave its folder; it is refused")
    return path


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn what a file system or an S3 client raises into our errors, with the next thing to try."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingError(f"there is nothing at {url}. Check the path (and, on S3, the bucket's name).") from error
    except PermissionError as error:
        hint = "Check AWS_PROFILE and the bucket's policy." if "://" in url else "Check the folder's permissions."
        raise StorageError(f"not allowed to use {url}: {redact(str(error))}. {hint}") from error
    except OSError as error:
        hint = "Free some space, or choose another folder." if error.errno == errno.ENOSPC else "Try again later."
        raise StorageError(f"cannot use {url}: {redact(str(error))}. {hint}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("botocore", "aiobotocore", "s3fs", "aiohttp"):
            raise
        raise StorageError(
            f"cannot use {url}: {redact(str(error))}. Check AWS_ENDPOINT_URL, the credentials and the network."
        ) from error


def redact(text: str) -> str:
    """Take signatures and keys out of a text that will be shown or stored."""
    return re.sub(r"(?i)((?:X-Amz-\w+|AWSAccessKeyId|Signature|aws_secret_access_key)=)[^&\s]+", r"\1***", text)
