"""The memory that a rank shares with decoding processes: slots, each for a batch."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Slots:
    """The layout of the memory of a rank. Batch n of its stream is in slot n modulo ``count``.

    A slot is free for batch n once batch n - ``count`` has been used.

    Attributes:
        count: Number of slots.
        size: Most images of a batch.
        side: Side of the images, px.
    """

    count: int
    size: int
    side: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot, whole pages: pixels, labels, and numbers of the samples."""
        page = mmap.PAGESIZE
        return -(-(self.size * (self.side * self.side * 3 + 8 + 8)) // page) * page

    @property
    def bytes(self) -> int:
        """Bytes of all slots."""
        return self.count * self.slot_bytes

    def numbers(self, memory: Any, batch: int, images: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return views of the labels and the sample numbers of a batch of so many images."""
        start = batch % self.count * self.slot_bytes + self.size * self.side * self.side * 3
        return np.frombuffer(memory, np.int64, images, start), np.frombuffer(
            memory, np.int64, images, start + 8 * self.size
        )

    def pixels(self, memory: Any, batch: int, images: int) -> NDArray[np.uint8]:
        """Return a view of the pixels of a batch: (images, side, side, 3)."""
        shape = (images, self.side, self.side, 3)
        start = batch % self.count * self.slot_bytes
        return np.frombuffer(memory, np.uint8, int(np.prod(shape)), start).reshape(shape)
