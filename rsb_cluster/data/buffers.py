"""Memory that is used again when nobody looks at it any more."""

from __future__ import annotations

import threading
import weakref

import numpy as np
from numpy.typing import NDArray

# A buffer is at most this many times as large as what is asked of it.
_SLACK = 2


class Buffers:
    """Lends memory. Several threads may use it at once.

    The first touch of a page that comes from the system can cost several times what is then read into it: on a virtual
    machine the host has to find one too. So what is given back is kept for the next who asks. There are never more
    buffers than were lent at one time, each at most twice as large as the largest that was asked of it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[NDArray[np.uint8]] = []

    def lend(self, size: int) -> memoryview:
        """Return memory of ``size`` bytes, whatever they are; it comes back when its last view is gone."""
        buffer = self._take(size)
        if buffer is None:
            buffer = np.empty(size, dtype=np.uint8)  # not a bytearray, which would be filled with zeros first
        lent = buffer[:size]
        # Whatever thread drops the last view runs this, even one that is in here: so it takes no lock.
        weakref.finalize(lent, self._free.append, buffer).atexit = False
        return lent.data

    def _take(self, size: int) -> NDArray[np.uint8] | None:
        with self._lock:
            free = list(self._free)  # others may append meanwhile, nobody else removes
            fitting = [i for i, buffer in enumerate(free) if size <= buffer.size <= _SLACK * size]
            if fitting:
                return self._free.pop(min(fitting, key=lambda i: free[i].size))
            if free:
                del self._free[0]  # makes room for one that fits
            return None
