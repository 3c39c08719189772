"""Reads from local files and object stores: counters, cancellation and chunks."""

from __future__ import annotations

import contextlib
import io
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

# Of its own: Python's global generator decides in the main thread what a training step does.
_JITTER = random.Random()
_FILL_BYTES = 8 << 20  # per read; cancel() takes effect between two reads


class TransferCancelled(Exception):
    """Another thread has cancelled this transfer."""


class Transfer:
    """Counts the reads of one thread, and lets another thread cancel them.

    Attributes:
        requests: Files opened, or requests sent to an object store, failed ones included.
        retries: Requests that repeat a failed one.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.retries = 0
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._connection: Any = None

    def cancel(self) -> None:
        """Cancel all reads of this transfer, from another thread. A read that waits on the network is woken."""
        self._cancelled.set()
        with self._lock:
            sock = getattr(self._connection, "sock", None)
            if sock is not None:
                # Not sock.shutdown(): that of an SSLSocket drops the state which the reading thread is using.
                with contextlib.suppress(OSError, TypeError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def check(self) -> None:
        """Raise TransferCancelled after cancel()."""
        if self._cancelled.is_set():
            raise TransferCancelled

    def sleep(self, seconds: float) -> None:
        """Sleep, or raise TransferCancelled as soon as cancel() is called."""
        self._cancelled.wait(seconds)
        self.check()

    def watch(self, connection: Any) -> None:
        """Set the HTTP connection that cancel() has to shut; None once the request is done."""
        with self._lock:
            self._connection = connection
        if connection is not None:
            self.check()


def backoff_s(first_s: float, attempts: int) -> float:
    """Return the pause after a number of failed attempts, seconds, with jitter so that readers do not retry in step.

    Args:
        first_s: The pause after the first one, at most; it doubles with each.
        attempts: The failed attempts.
    """
    return first_s * 2.0 ** (attempts - 1) * _JITTER.uniform(0.5, 1)


def stream_file(file: BinaryIO, start: int, stop: int | None, *, chunk: int, transfer: Transfer) -> Iterator[bytes]:
    """Yield the bytes ``[start, stop)`` of a file, fewer if it ends before."""
    transfer.requests += 1
    file.seek(start)
    while stop is None or start < stop:
        transfer.check()
        content = file.read(chunk if stop is None else min(chunk, stop - start))
        if not content:
            return
        start += len(content)
        yield content


def fill(buffer: memoryview, file: io.RawIOBase, start: int, transfer: Transfer) -> int:
    """Fill a buffer with a file's bytes from ``start`` on, without a copy; return how many, fewer at its end."""
    transfer.requests += 1
    file.seek(start)
    done = 0
    while done < len(buffer):
        transfer.check()
        got = file.readinto(buffer[done : done + _FILL_BYTES])
        if not got:
            break
        done += got
    return done


class GuardedFile(io.RawIOBase):
    """A file open for reading whose reads and seeks run in a context.

    Args:
        file: The file; closed together with this one.
        guard: Returns the context, which translates the file's errors.
    """

    def __init__(self, file: BinaryIO, guard: Callable[[], AbstractContextManager[None]]) -> None:
        self._file, self._guard = file, guard

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int | None = -1) -> bytes:
        """Return up to ``size`` bytes, all remaining ones if it is negative."""
        with self._guard():
            return self._file.read(-1 if size is None else size)

    def readall(self) -> bytes:
        """Return the remaining bytes."""
        return self.read()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed: any writable buffer
        """Fill a buffer and return the number of bytes."""
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Seek to a position and return it."""
        with self._guard():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()

    def close(self) -> None:
        """Close the underlying file as well."""
        self._file.close()
        super().close()
