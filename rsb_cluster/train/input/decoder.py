"""The other side of ``decoder_process``: the process that decodes, and the one that forks it.

A decoding process has a socket to its own rank and, where ranks of a node share images (``sharing``), one to each rank
that needs images which it decodes. All decoding processes go through the steps and the groups of virtual ranks in one
order, and write into a slot of a rank only when it is free; so the one that is furthest behind never waits for another
one, and they cannot wait for each other in a circle.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import torch

from rsb_cluster.data.cache import ShardCache
from rsb_cluster.data.index import ShardIndex
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.data.shared_index import SharedIndex
from rsb_cluster.storage.store import Store
from rsb_cluster.train.input.loader import ThreadedBatches
from rsb_cluster.train.input.pixels.transforms import Transform
from rsb_cluster.train.input.slots import Slots
from rsb_cluster.train.input.streams import EvalStream, MicroBatch, TrainStream

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_NAME = b"rsb-decoder"  # as ps and top show it
_PR_SET_NAME = 15  # prctl(2)

COUNT = struct.Struct("=q")  # from a rank: how many of its batches it has used
# From a rank to another one's decoding process, with the descriptor of its memory: which of the ranks it is, its slots.
HELLO = struct.Struct("=qq")
MOST_DESCRIPTORS = 4


@dataclass(frozen=True)
class Request:
    """What a decoding process is to do.

    Attributes:
        url: Folder of the index.
        index: Outline of the index (see ``SharedIndex``).
        cache_dir: Folder of the shard cache; empty: none.
        cache_bytes: Size of the cache.
        stream: Pickled without its reader and its index.
        transform: See ``ThreadedBatches``.
        slots: Of its own rank.
        threads: Decoding threads.
        peers: How many other ranks will say hello.
    """

    url: str
    index: bytes
    cache_dir: str
    cache_bytes: int
    stream: bytes
    transform: Transform
    slots: Slots
    threads: int
    peers: int


def pickle_stream(stream: TrainStream | EvalStream) -> bytes:
    """Pickle a stream without what it reads from."""
    content = io.BytesIO()

    class WithoutData(pickle.Pickler):
        def persistent_id(self, value: object) -> str | None:
            return {ShardReader: "reader", ShardIndex: "index"}.get(type(value))

    WithoutData(content).dump(stream)
    return content.getvalue()


def same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end of a Unix socket is one of this user's."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", credentials)[1] == os.getuid())


def serve(control: socket.socket) -> NoReturn:
    """Fork a decoding process for each message, until the rank's end of the socket is closed."""
    try:
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that the kernel reaps them
        signal.set_wakeup_fd(-1)  # the rank's
        ctypes.CDLL(None).prctl(_PR_SET_NAME, _NAME, 0, 0, 0)
        torch.set_num_threads(1)
        while True:
            message, descriptors, _, _ = socket.recv_fds(control, 16, MOST_DESCRIPTORS)
            if not message:
                break
            if os.fork() == 0:
                control.close()
                _Decoder(*descriptors).run()
            for descriptor in descriptors:
                os.close(descriptor)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


class _RankGoneError(Exception):
    """A rank has closed its end, and will not free the slot that is needed."""


class _Rank:
    """A rank that images are decoded for."""

    def __init__(self, connection: Connection, slots: Slots, descriptor: int) -> None:
        self.connection, self.slots = connection, slots
        self.memory = mmap.mmap(descriptor, slots.bytes)
        self._used, self._gone, self._changed = 0, False, threading.Condition()

    def images(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Return the memory for the images of a batch, as soon as its slot is free."""

        def is_free() -> bool:
            return micro_batch.number < self._used + self.slots.count

        with self._changed:
            self._changed.wait_for(lambda: is_free() or self._gone)
            if not is_free():
                raise _RankGoneError
        return torch.from_numpy(self.slots.pixels(self.memory, micro_batch.number, len(micro_batch.samples)))

    def listen(self) -> None:
        """Take what the rank says, until it closes its end."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                (used,) = COUNT.unpack(self.connection.recv_bytes())
                with self._changed:
                    self._used = used
                    self._changed.notify_all()
        with self._changed:
            self._gone = True
            self._changed.notify_all()


class _SlotBatches(ThreadedBatches):
    """Batches whose pixels are decoded into the slots of the ranks that they are for."""

    def __init__(self, stream: TrainStream | EvalStream, request: Request, ranks: dict[int, _Rank]) -> None:
        super().__init__(stream, request.transform, side=request.slots.side, threads=request.threads, pin=False)
        self._ranks = ranks

    def _new_images(self, micro_batch: MicroBatch) -> torch.Tensor:
        return self._ranks[micro_batch.rank].images(micro_batch)


class _Decoder:
    """A decoding process.

    Args:
        memory: File descriptor of the slots of its own rank.
        connection: Of the socket to it.
        index: Of the shared index.
        listener: Of the socket on which the other ranks say hello, if there are any.
    """

    def __init__(self, memory: int, connection: int, index: int, listener: int = -1) -> None:
        self._memory, self._connection, self._index = memory, Connection(connection), index
        self._listener = listener
        self._lock = threading.Lock()

    def run(self) -> NoReturn:
        """Decode the stream, and wait until the rank closes its end."""
        try:
            request: Request = self._connection.recv()
            try:
                own = _Rank(self._connection, request.slots, self._memory)
                listener = threading.Thread(target=self._listen, args=(own,), name="listener", daemon=True)
                listener.start()
                self._decode(request, own)
            except _RankGoneError:
                self._send("lost")
            except (EOFError, ConnectionError):
                pass
            except BaseException as error:
                self._send("error", _portable(error))
            listener.join()
        finally:
            sys.stderr.flush()
            os._exit(0)

    def _decode(self, request: Request, own: _Rank) -> None:
        self._forward_log()
        store, index = Store(request.url), SharedIndex.load(self._index, request.index)
        cache = ShardCache(Path(request.cache_dir), request.cache_bytes) if request.cache_dir else None
        reader = ShardReader(store, index, cache=cache)

        class WithData(pickle.Unpickler):
            def persistent_load(self, name: str) -> object:
                return {"reader": reader, "index": index}[name]

        stream: TrainStream | EvalStream = WithData(io.BytesIO(request.stream)).load()
        mine = stream.sharing.mine
        ranks = {mine: own} | self._accept(request)
        for filling in _SlotBatches(stream, request, ranks).filled():
            micro_batch, rank = filling.micro_batch, ranks[filling.micro_batch.rank]
            if rank is own:
                count = len(micro_batch.samples)
                labels, samples = own.slots.numbers(own.memory, micro_batch.number, count)
                labels[:], samples[:] = micro_batch.labels, micro_batch.samples
                self._send("batch", count, filling.bad, reader.bytes_read)
            else:
                with contextlib.suppress(OSError):  # it is gone: noticed where it matters, by the wait for its slots
                    rank.connection.send(("batch", len(micro_batch.samples), filling.bad))
        self._send("end", reader.bytes_read)

    def _accept(self, request: Request) -> dict[int, _Rank]:
        """Return the other ranks that images are decoded for, when all have said hello."""
        found: dict[int, _Rank] = {}
        if not request.peers:
            return found
        with socket.socket(fileno=self._listener) as listener:
            while len(found) < request.peers:
                connection, _ = listener.accept()
                if not same_user(connection):
                    connection.close()
                    continue
                message, descriptors, _, _ = socket.recv_fds(connection, HELLO.size, 1)
                if len(message) < HELLO.size or not descriptors:
                    connection.close()
                    continue
                number, count = HELLO.unpack(message)
                slots = Slots(count, request.slots.size, request.slots.side)
                found[number] = rank = _Rank(Connection(connection.detach()), slots, descriptors[0])
                threading.Thread(target=rank.listen, name="listener", daemon=True).start()
        return found

    def _listen(self, own: _Rank) -> None:
        """End the process with the rank's end of the socket."""
        own.listen()
        os._exit(0)

    def _send(self, *message: object) -> None:
        with self._lock:
            self._connection.send(message)

    def _forward_log(self) -> None:
        """Have the rank log what is logged here."""
        send = self._send

        class Forward(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                with contextlib.suppress(OSError):
                    send("log", record.levelno, "%s", record.getMessage())

        root = logging.getLogger("rsb_cluster")
        root.handlers, root.propagate = [Forward()], False
        root.setLevel(logging.INFO)


def _portable(error: BaseException) -> BaseException:
    """Return an exception that can be sent, with its traceback as text."""
    text = "".join(traceback.format_exception(error))
    error.__cause__ = error.__context__ = None
    error.add_note(f"in the decoding process:\n{text}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{error!r}\n{text}")
    return error
