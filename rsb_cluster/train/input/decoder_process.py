"""A process beside the rank that decodes its images, so that decoding and the training loop share no GIL.

With decoder threads in the rank's own process, every operation that the training loop launches waits for the GIL. Here
a process per stream reads, decodes and augments, and writes the pixels into memory that it shares with the rank. Only
numbers, reasons and log lines cross the socket between them.

The process is forked from one that was itself forked before the rank had threads, a GPU or connections
(``DecoderServer``): to start Python and to import torch again would take seconds. It ends when its socket does, however
the rank has died. It ignores the signals that a scheduler sends to all processes of a job step, as the rank decides.

Where several ranks of a node need copies of an image, or images of one virtual rank, their decoding processes share the
work (``Neighbours``): each image is read and decoded by one of them, which writes the pixels of each copy into the
memory of the rank that needs it. What is in a batch stays the same, to the bit.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
from collections import ChainMap, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import torch

from rsb_cluster.data.host_memory import COPYING, batches_held
from rsb_cluster.data.shared_index import SharedIndex
from rsb_cluster.train.input.decoder import COUNT, HELLO, Request, pickle_stream, serve
from rsb_cluster.train.input.loader import BadImage, Batch, assemble
from rsb_cluster.train.input.neighbours import Neighbours
from rsb_cluster.train.input.pixels.transforms import Transform
from rsb_cluster.train.input.slots import Slots
from rsb_cluster.train.input.streams import EvalStream, TrainStream
from rsb_cluster.train.lost_peer import LostPeerError

log = logging.getLogger(__name__)


class DecoderDiedError(RuntimeError):
    """The decoding process has died without a word: it was killed, or crashed in a decoder's C code."""


@dataclass(frozen=True)
class Split:
    """Where a decoding process reads a split.

    Attributes:
        url: Folder of the index.
        index: The index of the chosen classes.
        cache_dir: Folder of the shard cache; empty: none.
        cache_bytes: Size of the cache.
    """

    url: str
    index: SharedIndex
    cache_dir: str = ""
    cache_bytes: int = 0


class DecoderServer:
    """A process that forks decoding processes; forked itself when the rank's process has nothing but its modules."""

    def __init__(self, control: socket.socket, pid: int) -> None:
        self._control, self._pid = control, pid

    @staticmethod
    def start() -> DecoderServer:
        """Fork it. To be called before this process has threads, a GPU, or connections."""
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            serve(theirs)
        theirs.close()
        return DecoderServer(ours, pid)

    def fork(self, *descriptors: int) -> None:
        """Have it fork a process that serves a stream, with these file descriptors (see ``decoder``)."""
        try:
            socket.send_fds(self._control, [b"fork"], descriptors)
        except OSError as error:
            raise DecoderDiedError(f"the process that forks decoding processes has died: {error}") from error

    def close(self) -> None:
        """End it. Decoding processes end with their streams."""
        self._control.close()
        os.waitpid(self._pid, 0)


class ProcessBatches:
    """A stream's batches, decoded by threads of a process of their own.

    A batch's pixels are in shared memory, which is used again: a batch is valid until the next one is taken, and its
    copy to a GPU is waited for (``Batch.to``).

    Attributes:
        bytes_read: Bytes that the process has read from the store so far.

    Args:
        server: Forks the process.
        split: Where it reads the samples.
        stream: The encoded samples; it is read in that process only.
        transform: See ``ThreadedBatches``; it is pickled.
        side: Side of the transformed images, px.
        threads: Its decoding threads, at least one.
        pin: Whether to register the memory with CUDA, for asynchronous copies.
        neighbours: The ranks whose decoding processes share the work, those of the stream; their sockets serve one
            iteration.
    """

    def __init__(
        self,
        server: DecoderServer,
        split: Split,
        stream: TrainStream | EvalStream,
        transform: Transform,
        *,
        side: int,
        threads: int,
        pin: bool,
        neighbours: Neighbours | None = None,
    ) -> None:
        self._slots = Slots(batches_held(stream.together), stream.batch_size, side)
        self._server, self._split, self._stream, self._pin = server, split, stream, pin
        self._neighbours, self._transform = neighbours, transform
        self._request = Request(
            split.url, split.index.outline, split.cache_dir, split.cache_bytes, pickle_stream(stream), transform,
            self._slots, threads, len(neighbours.sockets) if neighbours is not None else 0,
        )  # fmt: skip
        self.bytes_read = 0
        self._parts: _Parts | None = None
        self._number = 0  # of the next batch

    def ready(self) -> bool:
        """Whether the next batch of the current iteration, or its error, can be taken without waiting."""
        return self._parts is not None and self._parts.ready(self._stream.ranks_of(self._number))

    def __iter__(self) -> Iterator[Batch]:
        memory, connections = self._start()
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        if self._pin:
            _register(whole)
        try:
            self._parts, self._number = _Parts(connections, self._stream.sharing.mine), 0
            yield from self._batches(self._parts, memory)
        finally:
            self._parts = None
            for connection in connections.values():
                connection.close()  # the process ends
            if self._pin:
                _unregister(whole)

    def _start(self) -> tuple[mmap.mmap, dict[int, Connection]]:
        """Start the process, and give the memory to those of the neighbours, too."""
        near, mine = self._neighbours, self._stream.sharing.mine
        descriptor = os.memfd_create("rsb-batches")
        ours, theirs = socket.socketpair()
        try:
            os.ftruncate(descriptor, self._slots.bytes)
            memory = mmap.mmap(descriptor, self._slots.bytes)
            listeners = [near.listener.fileno()] if near is not None else []
            self._server.fork(descriptor, theirs.fileno(), self._split.index.descriptor, *listeners)
            connections = {mine: Connection(ours.detach())}
            try:
                connections[mine].send(self._request)
            except ConnectionError as error:
                raise _died() from error
            if near is not None:
                near.listener.close()
                connections |= near.hello(HELLO.pack(mine, self._slots.count), descriptor)
        finally:
            os.close(descriptor)
            theirs.close()
        return memory, connections

    def _batches(self, parts: _Parts, memory: mmap.mmap) -> Iterator[Batch]:
        copying: deque[torch.cuda.Event | None] = deque()  # of batches whose slots are not free yet, in order
        used = 0
        while (found := parts.next(self._stream.ranks_of(self._number))) is not None:
            (count, bad), number = found, self._number
            self.bytes_read = parts.bytes_read
            self._number += 1
            labels, samples = (torch.from_numpy(values.copy()) for values in self._slots.numbers(memory, number, count))
            images = torch.from_numpy(self._slots.pixels(memory, number, count)).permute(0, 3, 1, 2)
            substitutes = partial(self._stream.substitutes, number)
            batch = assemble(images, samples, labels, bad, substitutes, self._transform)
            yield batch
            copying.append(batch.copied)
            while copying and (len(copying) > COPYING or copying[0] is None or copying[0].query()):
                if (event := copying.popleft()) is not None:
                    event.synchronize()
                used += 1
            parts.say_used(used)
        self.bytes_read = parts.bytes_read


class _Part(NamedTuple):
    """What a process has decoded of a batch: how many images the batch has, and what could not be decoded."""

    images: int
    bad: dict[int, BadImage]


class _Parts:
    """What decoding processes say of a rank's batches, each in the order of the batches.

    Attributes:
        bytes_read: Bytes that its own process has read from the store.
    """

    def __init__(self, connections: dict[int, Connection], mine: int) -> None:
        self._connections, self._mine, self.bytes_read = connections, mine, 0
        self._said: dict[int, deque[_Part | BaseException | None]] = {rank: deque() for rank in connections}

    def next(self, ranks: Iterable[int]) -> _Part | None:
        """Wait for the next batch, which the processes of some ranks decode; None at the end of the stream."""
        needed = {self._mine, *ranks}
        while missing := self._missing(needed):
            self._receive({self._mine, *missing}, timeout_s=None)
        last = self._said[self._mine].popleft()
        if isinstance(last, BaseException):
            raise last
        if last is None:
            return None
        parts = [part for rank in needed - {self._mine} if isinstance(part := self._said[rank].popleft(), _Part)]
        return _Part(last.images, dict(ChainMap(last.bad, *(part.bad for part in parts))))

    def ready(self, ranks: Iterable[int]) -> bool:
        """Whether ``next`` would not wait."""
        needed = {self._mine, *ranks}
        while missing := self._missing(needed):
            try:
                if not self._receive({self._mine, *missing}, timeout_s=0):
                    return False
            except (DecoderDiedError, LostPeerError):
                return True  # so will the next wait say
        return True

    def _missing(self, needed: set[int]) -> list[int]:
        """Return whose parts of the next batch are still to come; nobody's at the end of the stream."""
        if (said := self._said[self._mine]) and not isinstance(said[0], _Part):
            return []
        return [rank for rank in needed if not self._said[rank]]

    def say_used(self, count: int) -> None:
        """Say to all processes how many batches have been used; one that has ended is noticed by the next wait."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.send_bytes(COUNT.pack(count))

    def _receive(self, ranks: Iterable[int], timeout_s: float | None) -> bool:
        """Take what some ranks' processes have said, waiting until one has; return whether one has."""
        spoken = wait([self._connections[rank] for rank in ranks], timeout_s)
        for connection in spoken:
            rank = next(rank for rank, its in self._connections.items() if its is connection)
            try:
                kind, *rest = self._connections[rank].recv()
            except (EOFError, ConnectionError) as error:
                raise (_died() if rank == self._mine else _lost()) from error
            if kind == "log":
                log.log(*rest)
            elif kind == "batch":
                images, bad, *read = rest
                self._said[rank].append(_Part(images, bad))
                self.bytes_read = read[0] if read else self.bytes_read
            elif kind == "end":
                (self.bytes_read,) = rest
                self._said[rank].append(None)
            else:
                self._said[rank].append(rest[0] if kind == "error" else _lost())
        return bool(spoken)


def _died() -> DecoderDiedError:
    return DecoderDiedError(
        "the process that decodes this rank's images has died without a word: it was killed, or a decoder crashed"
    )


def _lost() -> LostPeerError:
    return LostPeerError("lost a peer rank of this node, or the process that decodes its images and some of ours")


def _register(memory: torch.Tensor) -> None:
    """Have CUDA lock the pages of shared memory, so that copies from it are asynchronous."""
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(code):
        log.warning("the memory of batches could not be registered with CUDA (error %d): copies take longer", int(code))


def _unregister(memory: torch.Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
