"""Reads the encoded images of samples from shards, with few requests and without a copy per image."""

from __future__ import annotations

import hashlib
import itertools
import logging
import tarfile
import threading
from dataclasses import dataclass

import numpy as np

from rsb_cluster.data.buffers import BufferPool
from rsb_cluster.data.cache import ShardCache, changed_shard_error
from rsb_cluster.data.index import ShardIndex, shards_of
from rsb_cluster.data.order import Ints
from rsb_cluster.errors import DataError
from rsb_cluster.storage.store import Store
from rsb_cluster.storage.transfer import Transfer, fill

log = logging.getLogger(__name__)

MERGE_BYTES = 256 << 10  # a gap of up to this size is read and discarded: cheaper than another request

_HEADER_BYTES = 512
_NAME_BYTES = 100  # of a tar header; a longer name is cut, or lies elsewhere

Images = dict[int, memoryview]


@dataclass(frozen=True)
class Piece:
    """Bytes ``[start, stop)`` of a shard, with the images of ``samples`` in them, in their order in the shard."""

    shard: int
    start: int
    stop: int
    samples: tuple[int, ...]


class ShardReader:
    """Reads samples by number. Several threads may use one reader at once.

    Attributes:
        bytes_read: Bytes read from the store.
        bytes_cached: Bytes read from the cache.
        bytes_used: Bytes of the requested images.
        requests: Files opened in the store, or requests sent to it.
        retries: Requests that repeat a failed one.

    Args:
        store: Folder of the index.
        index: The index, which tells where the shards are.
        cache: Cache of whole shards on this node. A shard is downloaded whole when it is first needed.
    """

    def __init__(self, store: Store, index: ShardIndex, *, cache: ShardCache | None = None) -> None:
        self._store, self._index, self._cache = shards_of(store, index), index, cache
        self.bytes_read = self.bytes_cached = self.bytes_used = self.requests = self.retries = 0
        self._buffers = BufferPool()
        self._lock = threading.Lock()
        self._hashed: set[int] = set()  # shards whose whole content has been checked

    def read(self, samples: Ints, transfer: Transfer | None = None) -> Images:
        """Return the encoded images of the samples, by number; each a read-only view of one of a few buffers.

        Args:
            samples: Numbers in the index, any shape and order.
            transfer: Can cancel the read from another thread.

        Raises:
            DataError: A shard does not match the index.
            StorageError: A shard could not be read.
        """
        images: Images = {}
        for piece in self.plan(samples):
            images |= self.read_piece(piece, transfer)
        return images

    def plan(self, samples: Ints) -> list[Piece]:
        """Return the pieces of shards to read for the samples, in order; they hold little else."""
        index = self._index
        ordered = np.unique(samples)
        shards = index.shard_of(ordered)
        starts = index.image_offsets[ordered] - _HEADER_BYTES
        stops = index.image_offsets[ordered] + index.image_sizes[ordered]
        cuts = np.flatnonzero((np.diff(shards) != 0) | (starts[1:] - stops[:-1] > MERGE_BYTES)) + 1
        pieces = []
        for first, stop in itertools.pairwise([0, *cuts.tolist(), len(ordered)]):
            if first < stop:
                shard, start, end = int(shards[first]), int(starts[first]), int(stops[stop - 1])
                size = int(index.shard_bytes[shard])
                whole = stop - first == index.shard_start[shard + 1] - index.shard_start[shard]
                if whole and max(start, size - end) <= MERGE_BYTES:
                    start, end = 0, size  # the whole shard can be checked against its hash
                pieces.append(Piece(shard, start, end, tuple(ordered[first:stop].tolist())))
        return pieces

    def read_piece(self, piece: Piece, transfer: Transfer | None = None) -> Images:
        """Return the images of a piece. Raises what `read` does."""
        transfer = transfer or Transfer()
        content = self._buffers.acquire(piece.stop - piece.start)
        requests, retries = transfer.requests, transfer.retries
        try:
            images = self._read_cached(piece, content, transfer)
            if images is None:
                images = self._read_stored(piece, content, transfer)
        finally:
            with self._lock:
                self.requests += transfer.requests - requests
                self.retries += transfer.retries - retries
        with self._lock:
            self.bytes_used += sum(map(len, images.values()))
        return images

    def _read_cached(self, piece: Piece, content: memoryview, transfer: Transfer) -> Images | None:
        """Return the images from the cache; None if there is no cache, or its copy is damaged."""
        if self._cache is None:
            return None
        index, shard = self._index, piece.shard
        size, requests = int(index.shard_bytes[shard]), transfer.requests
        file = self._cache.open(self._store, index.shards[shard], index.shard_sha256[shard], size, transfer)
        if file is None:
            return None
        with self._lock:
            self.bytes_read += size if transfer.requests > requests else 0
        with file:
            try:
                # Read, not mapped: with mmap the decoders would wait for the disk, and a bad block would be a SIGBUS.
                fill(content, file, piece.start, Transfer())
                images = self._images(piece, content)
            except (OSError, DataError) as error:
                log.warning("a cached shard is damaged; reading it from the store instead: %s", error)
                self._cache.discard(index.shard_sha256[shard])
                return None
        with self._lock:
            self.bytes_cached += len(content)
        return images

    def _read_stored(self, piece: Piece, content: memoryview, transfer: Transfer) -> Images:
        name = self._index.shards[piece.shard]
        got = self._store.read_into(name, piece.start, content, transfer=transfer)
        with self._lock:
            self.bytes_read += got
        if got < len(content):
            last = next(s for s in piece.samples if self._stop(s) > piece.start + got or s == piece.samples[-1])
            raise self._changed_error(last, f"it ends at byte {piece.start + got}" if got else "it ends before")
        images = self._images(piece, content)
        if len(content) == self._index.shard_bytes[piece.shard]:
            self._check_hash(piece, content)
        return images

    def _images(self, piece: Piece, content: memoryview) -> Images:
        index = self._index
        numbers = np.array(piece.samples)
        starts = (index.image_offsets[numbers] - piece.start).tolist()
        sizes = index.image_sizes[numbers].tolist()
        read_only = content.toreadonly()
        images: Images = {}
        for number, start, size in zip(piece.samples, starts, sizes, strict=True):
            self._check_header(number, bytes(read_only[start - _HEADER_BYTES : start]), size)
            images[number] = read_only[start : start + size]
        return images

    def _check_header(self, number: int, header: bytes, size: int) -> None:
        """Check that the header is the tar header of this sample's image."""
        starts = self._index.key_starts
        key = self._index.key_bytes[starts[number] : starts[number + 1]]
        if _is_plain(header, key, size):
            return
        try:
            found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise self._changed_error(number, "there is no tar header") from None
        if found.size != size:
            raise self._changed_error(number, f"there is a file of {found.size} bytes, not of {size}")
        # A name that is long or not ASCII is in a separate header, which may not have been read.
        if len(key) + len(".jpeg") <= _NAME_BYTES and key.isascii() and not found.name.startswith(f"{key.decode()}."):
            raise self._changed_error(number, f"there is '{found.name}'")

    def _check_hash(self, piece: Piece, content: memoryview) -> None:
        """Check the hash of a whole shard, once: that costs about as much as reading it."""
        with self._lock:
            if piece.shard in self._hashed:
                return
        found = hashlib.sha256(content).hexdigest()  # without the GIL
        if found != self._index.shard_sha256[piece.shard]:
            url = self._store.locate(self._index.shards[piece.shard])
            first, last = (self._index.key(piece.samples[i]) for i in (0, -1))
            what = f"the SHA-256 of the shard with the samples '{first}' to '{last}' is now {found}"
            raise changed_shard_error(url, what)
        with self._lock:
            self._hashed.add(piece.shard)

    def _stop(self, number: int) -> int:
        return int(self._index.image_offsets[number] + self._index.image_sizes[number])

    def _changed_error(self, number: int, what: str) -> DataError:
        shard = self._index.shards[int(self._index.shard_of(np.array(number)))]
        where = f"sample '{self._index.key(number)}' should be at byte {self._index.image_offsets[number]}"
        return changed_shard_error(self._store.locate(shard), f"{where}, but {what}")


def _is_plain(header: bytes, key: bytes, size: int) -> bool:
    """Whether a header is the expected one; False if only tarfile can tell, which takes five times as long."""
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    try:
        numbers = int(header[148:156].rstrip(b" \0"), 8), int(header[124:136].rstrip(b" \0"), 8)
    except ValueError:
        return False
    return numbers == (checksum, size) and header.startswith(key + b".")
