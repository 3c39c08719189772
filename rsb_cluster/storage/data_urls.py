"""Reads what is only read as data, by fsspec: files in parts, so that memory is bounded however a server answers."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from typing import Any, BinaryIO
from urllib.parse import unquote

from rsb_cluster.storage.location import scheme_of
from rsb_cluster.storage.transfer import Transfer, backoff_s

log = logging.getLogger(__name__)

PART_BYTES = 8 << 20  # of a request
MAX_ATTEMPTS = 6
FIRST_BACKOFF_S = 0.5  # doubled after each attempt

_HTTP = ("http", "https")


def client_options(scheme: str) -> dict[str, Any]:
    """Return the options of a scheme's file system: on HTTP, proxies of the environment, and timeouts."""
    if scheme == "gs":
        # Else gcsfs asks what kind of bucket it is before each request, and, where nobody has logged in, looks for
        # credentials each time and warns. It reads the variable when it is imported.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    if scheme not in _HTTP:
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
    return {"client_kwargs": {"trust_env": True, "timeout": timeout}}


def stream_url(fs: Any, url: str, start: int, stop: int | None, *, chunk: int, transfer: Transfer) -> Iterator[bytes]:
    """Yield the bytes ``[start, stop)`` of a file, fewer if it ends before, in pieces of at most ``chunk``."""
    transfer.requests += 1  # asks for the size
    with fs.open(url, "rb", block_size=PART_BYTES, cache_type="none") as file:
        end = file.size if stop is None or file.size is None else min(stop, file.size)
        while end is None or start < end:
            part = _read_part(file, url, start, PART_BYTES if end is None else min(PART_BYTES, end - start), transfer)
            if not part:
                return
            for first in range(0, len(part), chunk):
                transfer.check()
                yield part[first : first + chunk]
            start += len(part)


def _read_part(file: BinaryIO, url: str, start: int, size: int, transfer: Transfer) -> bytes:
    """Read a part by one request, again if the connection breaks."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        transfer.check()
        transfer.requests += 1
        try:
            file.seek(start)
            return file.read(size)
        except Exception as error:
            if attempt == MAX_ATTEMPTS or not _is_transient(error):
                raise
            pause_s = backoff_s(FIRST_BACKOFF_S, attempt)
            log.warning("%s failed at byte %d (%r). Attempt %d of %d in %.1f s", url, start, error, attempt + 1,
                        MAX_ATTEMPTS, pause_s)  # fmt: skip
            transfer.retries += 1
            transfer.sleep(pause_s)
    raise AssertionError("unreachable")


def exists(fs: Any, url: str) -> bool:
    """Whether there is a file; a web server that forbids it counts as one that has none."""
    if scheme_of(url) not in _HTTP:
        return bool(fs.exists(url))
    import aiohttp

    try:
        return bool(fs.exists(url, strict=True))  # else a server that cannot be reached would have none, too
    except aiohttp.ClientResponseError as error:
        if error.status >= 500:
            raise
        return False


def entries(fs: Any, url: str) -> list[tuple[str, bool]]:
    """Return the names directly below a folder, and whether each is a file; of a web server what its page links to."""
    if scheme_of(url) not in _HTTP:
        try:
            found = fs.ls(url, detail=True)  # adlfs and gcsfs return bare names otherwise
        except FileNotFoundError:
            return []
        root = fs._strip_protocol(url)  # consoles mark a folder by an object of its own name
        named = [(str(entry["name"]).rstrip("/"), entry["type"] != "directory") for entry in found]
        return [(name.rpartition("/")[2], is_file) for name, is_file in named if name != root]
    import aiohttp

    try:
        links = fs.ls(f"{url}/", detail=False)
    except (FileNotFoundError, aiohttp.ClientResponseError):
        return []
    inside = [unquote(link.removeprefix(f"{url}/")) for link in links if link.startswith(f"{url}/")]
    return [(name.rstrip("/"), not name.endswith("/")) for name in inside if not set("?#") & set(name)]


def _is_transient(error: Exception) -> bool:
    import aiohttp

    if isinstance(error, aiohttp.ClientResponseError):
        return error.status >= 500 or error.status == 429
    permanent = (FileNotFoundError, PermissionError)
    broken = (OSError, aiohttp.ClientError, asyncio.TimeoutError, EOFError)
    return isinstance(error, broken) and not isinstance(error, permanent)
