"""A cache of shards on a node's local disk, shared by all processes of the node.

A shard is downloaded once per node: a process that needs one that another process is downloading waits for it. (To
bypass the download would fetch bytes twice over a busy network, and only prefetch threads wait.) A lock is an flock on
the unfinished file itself, so it is released however its holder dies, and no lock files are left behind. Files are
named by the shard's SHA-256, and renamed to it only once their content has been checked: a replaced shard, or one of
another data set, can never be mistaken for this one.
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

from rsb_cluster.errors import DataError, expand_home
from rsb_cluster.storage.store import Store
from rsb_cluster.storage.transfer import Transfer

log = logging.getLogger(__name__)

_POLL_S = 0.05
_DONE = ".shard"
_PART = ".part"
_CACHE_FILE = re.compile(rf"[0-9a-f]{{64}}({re.escape(_DONE)}|{re.escape(_PART)})")  # other files are left alone


class ShardCache:
    """Keeps shards up to a limit, and evicts the least recently used.

    If the disk is full or broken, the cache logs one warning and stores nothing more in this process.

    Args:
        folder: Folder on a local disk; created if missing. Processes of other nodes should not use the same. ``~`` and
            variables, such as ``$TMPDIR``, are those of this node.
        limit_bytes: Size of all files in it, unfinished ones included. A larger shard is not cached.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = expand_home(os.path.expandvars(folder))
        self._limit = limit_bytes
        self._usable = True
        self._lock = threading.Lock()
        try:
            if unset := re.search(r"\$\{?[A-Za-z_]\w*\}?", str(self._folder)):
                raise FileNotFoundError(errno.ENOENT, f"{unset[0]} is not set on this node")
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # no other user may put a shard there
            self._remove_stale()
        except OSError as error:
            self._disable(error)

    def open(
        self, store: Store, name: str, sha256: str, num_bytes: int, transfer: Transfer | None = None
    ) -> io.FileIO | None:
        """Open the cached copy of a shard for reading, downloading it first if it is missing.

        Args:
            store: The data set's folder.
            name: The shard's file name in it.
            sha256: SHA-256 of its content according to the index.
            num_bytes: Its size according to the index.
            transfer: Counts the requests, and can cancel the call from another thread.

        Returns:
            The open file; None if the cache cannot hold the shard, which must then be read from the store.

        Raises:
            DataError: The shard does not match the index.
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
                    if part is None:  # another process is downloading it
                        transfer.sleep(_POLL_S)
                    elif not self._reserve(part, num_bytes):
                        return None
                    else:
                        self._download(part, store, name, sha256, num_bytes, transfer)
            except OSError as error:
                self._disable(error)

    def discard(self, sha256: str) -> None:
        """Remove a damaged copy of a shard."""
        with contextlib.suppress(OSError):
            (self._folder / f"{sha256}{_DONE}").unlink(missing_ok=True)

    def _open_done(self, sha256: str, num_bytes: int) -> io.FileIO | None:
        try:
            file = (self._folder / f"{sha256}{_DONE}").open("rb", buffering=0)
        except OSError:
            return None
        if os.fstat(file.fileno()).st_size != num_bytes:  # the disk lost power, or somebody edited the file
            file.close()
            self.discard(sha256)
            return None
        with contextlib.suppress(OSError):
            os.utime(file.fileno())  # marks it as used, for the eviction
        return file

    @contextlib.contextmanager
    def _locked_part(self, sha256: str) -> Iterator[io.FileIO | None]:
        """Lock the unfinished file of a shard; None if another process is downloading it or has done so."""
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
        """Evict old shards and allocate the space of this one, so that two downloads cannot use the same space."""
        part.truncate(0)
        with (self._folder / ".room").open("ab") as room:
            fcntl.flock(room, fcntl.LOCK_EX)  # held for a few system calls only
            self._remove_stale()
            files = sorted(self._files(_DONE), key=lambda entry: entry[1].st_mtime_ns)
            used = sum(stat.st_size for _, stat in (*files, *self._files(_PART)))
            for path, stat in files:
                if used + num_bytes <= self._limit:
                    break
                path.unlink(missing_ok=True)  # a process can still read it: the bytes stay until the last close
                used -= stat.st_size
            if used + num_bytes > self._limit:  # downloads of other processes use the rest
                return False
            try:
                os.posix_fallocate(part.fileno(), 0, num_bytes)  # fails here if the disk is full, before the download
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                part.truncate(num_bytes)
        return True

    def _download(
        self, part: io.FileIO, store: Store, name: str, sha256: str, num_bytes: int, transfer: Transfer
    ) -> None:
        digest = hashlib.sha256()
        for content in store.stream(name, 0, num_bytes, transfer=transfer):
            digest.update(content)  # like the write, without the GIL
            _write_all(part, content)
        if digest.hexdigest() != sha256:
            raise changed_shard_error(store.locate(name), f"its SHA-256 is {digest.hexdigest()}")
        os.fsync(part.fileno())  # else a crash of the node could leave the final name without the content
        (self._folder / f"{sha256}{_PART}").rename(self._folder / f"{sha256}{_DONE}")

    def _remove_stale(self) -> None:
        """Remove unfinished files of dead processes: those whose lock is free."""
        for path, _ in self._files(_PART):
            with contextlib.suppress(FileNotFoundError), io.FileIO(path, "r+") as file:
                if _lock(file, path):
                    path.unlink()

    def _files(self, suffix: str) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self._folder.iterdir():
            if path.suffix == suffix and _CACHE_FILE.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # another process has just removed or renamed it
                    found.append((path, path.stat()))
        return found

    def _disable(self, error: OSError) -> None:
        with self._lock:
            if self._usable:
                log.warning("cannot write to the shard cache %s: %s. Continuing without it.", self._folder, error)
            self._usable = False


def changed_shard_error(url: str, what: str) -> DataError:
    """Return the error for a shard that does not match its index."""
    return DataError(
        f"{url} was replaced or damaged after indexing: {what}. Run 'rsb-cluster shards verify' on its folder."
    )


def _creating(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o600)


def _lock(file: io.FileIO, path: Path) -> bool:
    """Lock a file if the lock is free; return whether that worked and the file is still the one at the path."""
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
