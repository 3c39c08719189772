"""An index in memory that processes share: loaded by one, mapped by the others."""

from __future__ import annotations

import mmap
import os
import pickle
import weakref

from rsb_cluster.data.index import ShardIndex

_ALIGNMENT = 64


class SharedIndex:
    """An index whose arrays are in shared memory; its keys, some 15 bytes a sample, are copied by each process.

    Attributes:
        index: The index; its arrays are read-only views of the memory.
        descriptor: File descriptor of the memory, for `load` in another process.
        outline: The index without its arrays.

    Args:
        index: The index; it can be dropped.
    """

    def __init__(self, index: ShardIndex) -> None:
        buffers: list[pickle.PickleBuffer] = []
        content = pickle.dumps(index, protocol=5, buffer_callback=buffers.append)
        arrays = [buffer.raw() for buffer in buffers]
        starts, size = [], 0
        for array in arrays:
            starts.append(size)
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.outline = pickle.dumps((content, [(s, a.nbytes) for s, a in zip(starts, arrays, strict=True)]))
        self.descriptor = os.memfd_create("rsb-index")
        weakref.finalize(self, os.close, self.descriptor)  # the memory lives as long as an index in it
        os.ftruncate(self.descriptor, max(size, 1))
        with mmap.mmap(self.descriptor, max(size, 1)) as memory:
            for start, array in zip(starts, arrays, strict=True):
                memory[start : start + array.nbytes] = array
        self.index = SharedIndex.load(self.descriptor, self.outline)

    @staticmethod
    def load(descriptor: int, outline: bytes) -> ShardIndex:
        """Return the index in the memory of a descriptor."""
        memory = memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
        content, places = pickle.loads(outline)
        index: ShardIndex = pickle.loads(content, buffers=[memory[start : start + size] for start, size in places])
        return index
