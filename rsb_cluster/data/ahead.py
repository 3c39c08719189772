"""Reads blocks of samples on threads before they are needed, in bounded memory."""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rsb_cluster.data.order import Ints
from rsb_cluster.data.reader import Images, Piece, ShardReader
from rsb_cluster.storage.transfer import Transfer, TransferCancelled

_CLOSE_S = 2.0


@dataclass(eq=False)
class _Block:
    key: Hashable
    pending: int  # pieces that have not been read
    images: Images = field(default_factory=dict)
    error: BaseException | None = None


class ReadAhead:
    """Prefetches blocks of samples on threads; a context manager.

    Memory holds the blocks that `get` returned and that are not yet released, and up to ``depth`` more. All threads
    read pieces of the same block, so that blocks become ready in the order in which they are needed.

    Args:
        reader: Reads the samples.
        blocks: Key and samples of each block, in the order of the calls to `get`. The threads consume it, one at a
            time.
        depth: Number of blocks to prefetch, at least 1.
        threads: Number of threads; each reads one piece at a time.
    """

    def __init__(
        self, reader: ShardReader, blocks: Iterator[tuple[Hashable, Ints]], depth: int, threads: int = 2
    ) -> None:
        if depth < 1 or threads < 1:
            raise ValueError(f"cannot read {depth} blocks ahead on {threads} threads")
        self._reader, self._blocks, self._depth = reader, blocks, depth
        self._changed = threading.Condition()
        self._ahead: deque[_Block] = deque()
        self._held: dict[Hashable, _Block] = {}
        self._work: deque[tuple[_Block, Piece]] = deque()
        self._exhausted = False  # no more blocks will come from the iterator
        self._failed: BaseException | None = None  # what the iterator raised
        self._closed = False
        self._transfers = [Transfer() for _ in range(threads)]
        # Daemons: a process that exits without close() must not wait for the network.
        self._threads = [
            threading.Thread(target=self._run, args=(transfer,), name=f"read-ahead-{i}", daemon=True)
            for i, transfer in enumerate(self._transfers)
        ]
        atexit.register(self.close)
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def get(self, key: Hashable) -> Images:
        """Return the images of a block by sample number, as soon as all have been read.

        Args:
            key: The key of the next block in the iterator's order, or of one that has not been released.

        Raises:
            DataError: See `ShardReader.read`.
            StorageError: See `ShardReader.read`.
            LookupError: The block is not the next one.
        """
        with self._changed:
            while key not in self._held:
                if self._ahead:
                    if self._ahead[0].key != key:
                        raise LookupError(f"block {key!r} was requested, but the next one is {self._ahead[0].key!r}")
                    self._held[key] = self._ahead.popleft()
                    self._changed.notify_all()  # there is room for one more
                elif self._failed is not None:
                    raise self._failed
                elif self._exhausted:
                    raise LookupError(f"block {key!r} was requested, but there are no more blocks")
                else:
                    self._wait()
            block = self._held[key]
            while block.pending and block.error is None:
                self._wait()
        if block.error is not None:
            raise block.error
        return block.images

    def release(self, key: Hashable) -> None:
        """Release a block. Its memory is reused once no view of its images is left."""
        with self._changed:
            del self._held[key]

    def close(self) -> None:
        """Stop the threads, also those that wait for the network. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for transfer in self._transfers:
            transfer.cancel()
        deadline = time.monotonic() + _CLOSE_S
        for thread in self._threads:  # one that is opening a connection now is left to its timeout
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            self._ahead.clear()
            self._held.clear()
            self._work.clear()
        atexit.unregister(self.close)

    def _wait(self) -> None:
        if self._closed:
            raise RuntimeError("the read-ahead is closed")
        self._changed.wait()

    def _run(self, transfer: Transfer) -> None:
        while (work := self._next()) is not None:
            block, piece = work
            images: Images = {}
            error: BaseException | None = None
            try:
                images = self._reader.read_piece(piece, transfer)
            except TransferCancelled:
                return
            except BaseException as caught:  # raised again by get()
                error = caught
            with self._changed:
                block.images |= images
                block.pending -= 1
                if error is not None and block.error is None:
                    block.error = error
                    self._work = deque(work for work in self._work if work[0] is not block)
                if block.error is not None or not block.pending:
                    self._changed.notify_all()

    def _next(self) -> tuple[_Block, Piece] | None:
        """Return the next piece to read, waiting for it if necessary; None once the read-ahead is closed."""
        with self._changed:
            while not self._closed:
                if self._work:
                    return self._work.popleft()
                if self._exhausted or len(self._ahead) >= self._depth:
                    self._changed.wait()
                else:
                    self._take_block()
            return None

    def _take_block(self) -> None:
        try:
            key, samples = next(self._blocks)
            pieces = self._reader.plan(samples)
        except StopIteration:
            self._exhausted = True
        except BaseException as error:  # raised again by get()
            self._exhausted, self._failed = True, error
        else:
            block = _Block(key, len(pieces))
            self._ahead.append(block)
            self._work.extend((block, piece) for piece in pieces)
        self._changed.notify_all()
