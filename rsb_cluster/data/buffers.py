"""A pool of buffers that are reused once nothing refers to them."""

from __future__ import annotations

import threading
import weakref

import numpy as np
from numpy.typing import NDArray

# A buffer is at most this many times as large as requested.
_SLACK = 2


class BufferPool:
    """Reuses memory. Several threads may use a pool at once.

    The first access to a fresh page can cost several times as much as filling it: on a virtual machine the host has to
    allocate one too. So returned buffers are kept for the next request. There are never more buffers than were in use
    at one time, each at most twice as large as the largest request that it served.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[NDArray[np.uint8]] = []

    def acquire(self, size: int) -> memoryview:
        """Return ``size`` bytes of uninitialised memory; it returns to the pool when its last view is gone."""
        buffer = self._take(size)
        if buffer is None:
            buffer = np.empty(size, dtype=np.uint8)  # not a bytearray, which would be filled with zeros first
        acquired = buffer[:size]
        # Runs on whatever thread drops the last view, even one that holds the lock: so it takes no lock.
        weakref.finalize(acquired, self._free.append, buffer).atexit = False
        return acquired.data

    def _take(self, size: int) -> NDArray[np.uint8] | None:
        with self._lock:
            free = list(self._free)  # other threads may append meanwhile, but none removes
            fitting = [i for i, buffer in enumerate(free) if size <= buffer.size <= _SLACK * size]
            if fitting:
                return self._free.pop(min(fitting, key=lambda i: free[i].size))
            if free:
                del self._free[0]  # makes room for one that fits
            return None
