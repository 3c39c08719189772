"""A folder on a node's own disk that keeps shards, shared by all processes of the node.

A shard is downloaded once per node: who wants one that another process is downloading waits for it. (Reading around
the download instead would fetch bytes twice over a network that is busy with it already, and the waiting is done by
read-ahead threads.) A lock is an flock on the unfinished file itself, so it ends with its holder however that dies,
and no lock files are left behind. Names are the shards' SHA-256, and a file gets its name only once its content has
been checked against it: a replaced shard or another data set can never be taken for this one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from rsb_cluster.errors import DataError
from rsb_cluster.storage.store import Store
from rsb_cluster.storage.transfer import Transfer

log = logging.getLogger(__name__)

_POLL_S = 0.05
_DONE = ".shard"
_PART = ".part"
_OURS = re.compile(rf"[0-9a-f]{{64}}({re.escape(_DONE)}|{re.escape(_PART)})")  # what else is there is somebody's


class ShardCache:
    """Keeps shards up to a limit; those used longest ago go first.

    Where the disk is full or broken, one warning is logged, and nothing more is stored by this process.

    Args:
        folder: On a local disk; made if it is not there. Processes of other nodes should not use the same.
        limit_bytes: Size of all files in it, unfinished ones included. A larger shard is not kept.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self._usable = True
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # nobody else may put a shard there
            self._remove_stale()
        except OSError as error:
            self._disable(error)

    def open(
        self, store: Store, name: str, sha256: str, num_bytes: int, transfer: Transfer | None = None
    ) -> io.FileIO | None:
        """Open a shard's copy for reading, downloading it first where it is not there.

        Args:
            store: The data set's folder.
            name: The shard's file name in it.
            sha256: What the index says of its content.
            num_bytes: What the index says of its size.
            transfer: Counts the requests, and can end the waiting from another thread.

        Returns:
            None where the cache cannot hold it: read from the store then.

        Raises:
            DataError: The shard is not what the index says.
            StorageError: It cannot be downloaded.
        """
        transfer = transfer or Transfer()
        while True:
            if file := self._open_done(sha256, num_bytes):
                return file
            if not self._usable or num_bytes > self._limit:
                return None
            try:
                with self._locked_part(sha256) as part:
                    if part is None:  # another process has it
                        transfer.sleep(_POLL_S)
                    elif not self._reserve(part, num_bytes):
                        return None
                    else:
                        self._download(part, store, name, sha256, num_bytes, transfer)
            except OSError as error:
                self._disable(error)

    def discard(self, sha256: str) -> None:
        """Remove a shard whose copy turned out to be damaged."""
        with contextlib.suppress(OSError):
            (self._folder / f"{sha256}{_DONE}").unlink(missing_ok=True)

    def _open_done(self, sha256: str, num_bytes: int) -> io.FileIO | None:
        try:
            file = (self._folder / f"{sha256}{_DONE}").open("rb", buffering=0)
        except OSError:
            return None
        if os.fstat(file.fileno()).st_size != num_bytes:  # a disk that lost power, or somebody's hand
            file.close()
            self.discard(sha256)
            return None
        with contextlib.suppress(OSError):
            os.utime(file.fileno())  # used now: what was used longest ago is removed first
        return file

    @contextlib.contextmanager
    def _locked_part(self, sha256: str) -> Iterator[io.FileIO | None]:
        """Hold the unfinished file of a shard; None: there is nothing to do, as another does it or has done it."""
        path = self._folder / f"{sha256}{_PART}"
        with io.FileIO(path, "r+", opener=_creating) as file:
            if not _lock(file, path):
                yield None
                return
            try:
                yield None if (self._folder / f"{sha256}{_DONE}").exists() else file
            finally:
                if _is_at(file, path):  # it did not get its final name
                    path.unlink()

    def _reserve(self, part: io.FileIO, num_bytes: int) -> bool:
        """Make room for a shard and take it, so that two downloads cannot both count on the same room."""
        part.truncate(0)
        with (self._folder / ".room").open("ab") as room:
            fcntl.flock(room, fcntl.LOCK_EX)  # held for some system calls only
            self._remove_stale()
            files = sorted(self._files(_DONE), key=lambda entry: entry[1].st_mtime_ns)
            used = sum(stat.st_size for _, stat in (*files, *self._files(_PART)))
            for path, stat in files:
                if used + num_bytes <= self._limit:
                    break
                path.unlink(missing_ok=True)  # who reads it goes on reading: its bytes stay until the last close
                used -= stat.st_size
            if used + num_bytes > self._limit:  # the rest is taken by downloads of others
                return False
            try:
                os.posix_fallocate(part.fileno(), 0, num_bytes)  # a full disk shows here, before the download
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                part.truncate(num_bytes)
        return True

    def _download(
        self, part: io.FileIO, store: Store, name: str, sha256: str, num_bytes: int, transfer: Transfer
    ) -> None:
        hashed = hashlib.sha256()
        for content in store.stream(name, 0, num_bytes, transfer=transfer):
            hashed.update(content)  # both without the GIL
            _write_all(part, content)
        if hashed.hexdigest() != sha256:
            raise shard_changed(store.locate(name), f"its SHA-256 is {hashed.hexdigest()}")
        os.fsync(part.fileno())  # else a crash of the node could leave the name without the content
        (self._folder / f"{sha256}{_PART}").rename(self._folder / f"{sha256}{_DONE}")

    def _remove_stale(self) -> None:
        """Remove unfinished files whose process is dead: nobody holds their lock."""
        for path, _ in self._files(_PART):
            with contextlib.suppress(FileNotFoundError), io.FileIO(path, "r+") as file:
                if _lock(file, path):
                    path.unlink()

    def _files(self, suffix: str) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self._folder.iterdir():
            if path.suffix == suffix and _OURS.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # another process removed or renamed it just now
                    found.append((path, path.stat()))
        return found

    def _disable(self, error: OSError) -> None:
        with self._lock:
            if self._usable:
                log.warning("the shard cache %s cannot be written: %s. Going on without it.", self._folder, error)
            self._usable = False


def shard_changed(url: str, what: str) -> DataError:
    """Return the error for a shard that is not what its index says."""
    return DataError(
        f"{url} was replaced or damaged after indexing: {what}. Run 'rsb-cluster shards verify' on its folder."
    )


def _creating(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o600)


def _lock(file: io.FileIO, path: Path) -> bool:
    """Lock a file, if nobody else has and it is still the one at the path."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return _is_at(file, path)


def _is_at(file: io.FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _write_all(file: io.FileIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
