"""The order of samples: a pure function of (seed, epoch, position).

It does not depend on nodes, processes, loader workers, attempts or checkpoints, so none of them can change it.

An epoch is the list of all samples with *pieces* of shards permuted: a few dozen consecutive samples each, read with
one request. The list is cut into *streams* of equal length, one per group of virtual ranks, so no sample is read by two
groups. Within a stream samples are shuffled in blocks of a few thousand, by a permutation that can be computed for any
block alone: a resume seeks and never replays.

Pieces are permuted and not whole shards, so that a block mixes many places of the data set: with shards sorted by
class, four whole shards would fill a micro-batch with four classes (tests/benchmarks/shuffle.py measures it).

Without repeated augmentation each virtual rank is a group of its own. With R repeats a group has the smallest power of
two that is not below R, so that nodes of four or eight processes hold whole groups, whose images they read and decode
once; where that does not divide the virtual ranks, and in runs of draws 1, it has R or a few more. Its stream gives
ceil(g·m/R) images a step, and their copies are dealt round-robin to the g micro-batches of m, so that the copies of an
image are in one global batch and in different micro-batches. If g·m is not a multiple of R, the last image of a step
has fewer copies; none straddles two steps.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rsb_cluster.data.index import ShardIndex

Ints = NDArray[np.int64]

# The version of all that is drawn from a run's seed: the order of samples, augmentation, mixing, dropped paths. What
# draws otherwise raises it. It is part of a run's spec, and of its id unless it is 1; a node refuses a higher one.
DRAWS = 2

_EVEN_GROUPS = 2  # from these draws on, groups are of a power of two

_POOL, _WORD = 4, 2**32 - 1  # of NumPy's SeedSequence: words of its state, and the largest one


def permutation(n: int, *key: int) -> Ints:
    """Return a permutation of ``range(n)`` that depends on the key alone.

    It sorts raw 64-bit words of a counter-based generator: NumPy guarantees that these, unlike
    ``Generator.permutation``, stay the same in later versions, and a run must survive an upgrade.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(raw, kind="stable").astype(np.int64)


def derive_seed(*key: int) -> int:
    """Return a 64-bit seed that depends on the key alone, for the random numbers of a sample or a micro-batch."""
    high, low = np.random.SeedSequence(key).generate_state(2)
    return int(high) << 32 | int(low)


def derive_seeds(*key: int | Ints) -> NDArray[np.uint64]:
    """Return ``derive_seed`` of many keys at once.

    It is NumPy's hash, which it promises never to change, on arrays: one by one an image would cost 25 µs.

    Args:
        key: Numbers, or arrays of shape (n,) with one of each key; at least one is an array, of numbers below 2**32.
    """
    words: list[NDArray[np.uint32]] = []
    for part in key:
        if isinstance(part, np.ndarray):
            words.append(part.astype(np.uint32))
        else:
            words += [np.array([part >> 32 * i & _WORD], np.uint32) for i in range(max(1, -(-part.bit_length() // 32)))]
    words += [np.zeros(1, np.uint32)] * (_POOL - len(words))
    constant = 0x43B0D7E5

    def hashed(value: NDArray[np.uint32], factor: int = 0x931E8875) -> NDArray[np.uint32]:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * factor & _WORD
        value = value * np.uint32(constant)
        value ^= value >> np.uint32(16)
        return value

    def mixed(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> NDArray[np.uint32]:
        value = one * np.uint32(0xCA01F9DD) - other * np.uint32(0x4973F715)
        value ^= value >> np.uint32(16)
        return value

    pool = [hashed(word) for word in words[:_POOL]]
    for source in range(_POOL):
        for at in range(_POOL):
            if at != source:
                pool[at] = mixed(pool[at], hashed(pool[source]))
    for word in words[_POOL:]:
        pool = [mixed(value, hashed(word)) for value in pool]
    constant = 0x8B51F9DD
    high, low = (hashed(value, 0x58F38DED).astype(np.uint64) for value in pool[:2])
    return high << np.uint64(32) | low


@dataclass(frozen=True)
class Draw:
    """The micro-batch of a virtual rank in a step.

    Attributes:
        samples: Numbers of the samples in the index, shape (m,).
        copies: Number of the copy of each image, from 0, shape (m,).
    """

    samples: Ints
    copies: Ints


class EpochOrder:
    """The order of one epoch.

    Args:
        index: The training shards.
        seed: The run's seed.
        epoch: Number of the epoch, from 0.
        global_batch: Images in a step, copies included; a multiple of ``virtual_ranks``.
        virtual_ranks: Micro-batches of a step.
        repeats: Copies of an image in a global batch; 1 without repeated augmentation.
        block: Size of a shuffle block, samples of a stream.
        piece: Maximum size of a piece, consecutive samples of a shard.
        draws: The run's version of the order.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        seed: int,
        epoch: int,
        global_batch: int,
        virtual_ranks: int,
        repeats: int,
        block: int,
        piece: int,
        draws: int = DRAWS,
    ) -> None:
        if global_batch % virtual_ranks:
            raise ValueError(f"global batch {global_batch} is not a multiple of {virtual_ranks} virtual ranks")
        self.steps = index.num_samples // global_batch
        self.micro_batch = global_batch // virtual_ranks
        self.dropped = index.num_samples - self.steps * global_batch
        self._seed, self._epoch, self._repeats, self._block_size = seed, epoch, repeats, block
        self._groups = groups_of(virtual_ranks, repeats, draws)
        self._group_of = np.repeat(np.arange(len(self._groups)), [len(group) for group in self._groups])
        per_step = [-(-len(group) * self.micro_batch // repeats) for group in self._groups]
        self._images_per_step = per_step
        self._stream_start = np.concatenate([[0], np.cumsum(per_step)]) * self.steps
        first, sizes = _pieces(index.shard_start, piece)
        permuted = permutation(len(first), seed, epoch)
        self._piece_start = np.concatenate([[0], np.cumsum(sizes[permuted])])  # of each piece, in the epoch's list
        self._first_sample = first[permuted]

    def draw(self, step: int, virtual_rank: int) -> Draw:
        """Return the samples of a virtual rank in a step of this epoch."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside the epoch's {self.steps}")
        group = int(self._group_of[virtual_rank])
        members = self._groups[group]
        slots = np.arange(self.micro_batch, dtype=np.int64) * len(members) + (virtual_rank - members[0])
        images, copies = np.divmod(slots, self._repeats)
        first = step * self._images_per_step[group]
        return Draw(self._stream(group, first + images), copies)

    def group_of(self, virtual_rank: int) -> int:
        """Return the group, and so the stream, of a virtual rank."""
        return int(self._group_of[virtual_rank])

    def members(self, group: int) -> range:
        """Return the virtual ranks of a group."""
        return self._groups[group]

    def blocks(self, step: int, group: int) -> tuple[int, int]:
        """Return the first and the last block of a group's stream that a step touches."""
        first = step * self._images_per_step[group]
        last = first + self._images_per_step[group] - 1
        return first // self._block_size, last // self._block_size

    def _stream(self, group: int, positions: Ints) -> Ints:
        """Return the samples at positions of a stream."""
        result = np.empty_like(positions)
        blocks = positions // self._block_size
        for block in np.unique(blocks):
            here = blocks == block
            result[here] = self.block(group, int(block))[positions[here] - block * self._block_size]
        return result

    @lru_cache(maxsize=256)  # noqa: B019 - an order lives for an epoch, and its blocks may live as long
    def block(self, group: int, block: int) -> Ints:
        """Return the samples of a block of a stream, shuffled."""
        start = int(self._stream_start[group]) + block * self._block_size
        stop = min(start + self._block_size, int(self._stream_start[group + 1]))
        listed = start + permutation(stop - start, self._seed, self._epoch, group, block, 1)
        piece = np.searchsorted(self._piece_start, listed, side="right") - 1
        return np.asarray(self._first_sample[piece] + listed - self._piece_start[piece], dtype=np.int64)


def _pieces(shard_start: Ints, size: int) -> tuple[Ints, Ints]:
    """Cut each shard into even pieces of at most ``size`` samples; return their first samples and their sizes."""
    counts = np.diff(shard_start)
    per_shard = -(-counts // size)
    shard = np.repeat(np.arange(len(counts)), per_shard)
    number = np.arange(len(shard)) - np.repeat(np.cumsum(per_shard) - per_shard, per_shard)
    start = counts[shard] * number // per_shard[shard]
    stop = counts[shard] * (number + 1) // per_shard[shard]
    return shard_start[:-1][shard] + start, stop - start


def groups_of(virtual_ranks: int, repeats: int, draws: int = DRAWS) -> list[range]:
    """Cut the virtual ranks into groups that share images.

    Args:
        virtual_ranks: Virtual ranks of the run.
        repeats: Copies of an image in a global batch.
        draws: The run's version of the order.
    """
    even = 1 << (repeats - 1).bit_length()
    if draws >= _EVEN_GROUPS and virtual_ranks % even == 0:
        return [range(start, start + even) for start in range(0, virtual_ranks, even)]
    count = max(1, virtual_ranks // repeats)
    edges = [virtual_ranks * i // count for i in range(count + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]
