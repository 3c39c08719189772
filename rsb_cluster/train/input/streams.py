"""The encoded samples of a process, in order, read ahead in blocks, each byte once.

``data.order`` alone decides which samples are read, and in which order.
"""

from __future__ import annotations

import itertools
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.ahead import ReadAhead
from rsb_cluster.data.index import ShardIndex
from rsb_cluster.data.order import DRAWS, Draw, EpochOrder, Ints, derive_seeds, groups_of
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.train.input.sharing import Sharing

# epoch, group of virtual ranks, block of the group's stream
BlockKey = tuple[int, int, int]


class EncodedSample(NamedTuple):
    """A sample for the decoder.

    Attributes:
        number: Number of the sample in the index.
        key: Key of the sample in its shard.
        image: The encoded image.
        label: Number of the class.
        seed: Seed of the augmentation.
        copy: Number of the copy of the image, from 0 (repeated augmentation).
    """

    number: int
    key: str
    image: memoryview | bytes
    label: int
    seed: int
    copy: int


class MicroBatch(NamedTuple):
    """A rank's images of a micro-batch, and those of them that are decoded in this process.

    Attributes:
        samples: Numbers of all its samples, shape (m,), or (m/k,) where k processes share the virtual rank.
        labels: Their classes, shape (m,) or (m/k,).
        encoded: What is decoded here.
        at: The position of each of these in ``samples``.
        rank: The rank that it is for, among those of ``Sharing``.
        number: How many micro-batches of that rank's stream come before it.
    """

    samples: Ints
    labels: Ints
    encoded: list[EncodedSample]
    at: Sequence[int]
    rank: int = 0
    number: int = 0


class TrainStream:
    """The micro-batches of a process, in order, from a step to the end of the run.

    Micro-batches of a step that share images are yielded together, so each image is decoded once; without repeated
    augmentation each is yielded alone. With ``sharing`` those of the node's other ranks are among them, and of all of
    them only the part that is read here.

    Args:
        reader: Reads the samples.
        recipe: The recipe.
        index: The index of the training shards.
        seed: The run's seed.
        virtual_ranks: Micro-batches per step.
        local_virtual_ranks: The virtual ranks of this process.
        start_step: First optimizer step, counted over the whole run.
        stop_step: The step after the last one.
        sharing: The ranks of this node, which decode for each other; None: this process decodes for itself, and has
            whole virtual ranks.
        draws: The run's version of the order.
    """

    def __init__(
        self,
        reader: ShardReader,
        recipe: Recipe,
        index: ShardIndex,
        *,
        seed: int,
        virtual_ranks: int,
        local_virtual_ranks: Sequence[int],
        start_step: int,
        stop_step: int,
        sharing: Sharing | None = None,
        draws: int = DRAWS,
    ) -> None:
        self._reader, self._recipe, self._index = reader, recipe, index
        self._seed, self._virtual_ranks, self._local = seed, virtual_ranks, local_virtual_ranks
        self._start, self._stop = start_step, stop_step
        self.sharing = sharing or Sharing((local_virtual_ranks,), 0)
        self._draws, self._groups = draws, groups_of(virtual_ranks, recipe.augment.repeats, draws)

    @property
    def batch_size(self) -> int:
        """Images that this process's rank has of a micro-batch."""
        slots = self.sharing.my_slots
        return len(slots) if slots is not None else self._recipe.train.global_batch // self._virtual_ranks

    @property
    def together(self) -> int:
        """Most micro-batches that are yielded together."""
        groups = map(self.epoch_order(0).group_of, self._local)
        return max(len(list(members)) for _, members in itertools.groupby(groups))

    def ranks_of(self, number: int) -> list[int]:
        """Return the ranks of ``sharing`` whose processes decode images of a micro-batch of this process's stream."""
        virtual_rank = self._local[number % len(self._local)]
        return self.sharing.ranks(next(group for group in self._groups if virtual_rank in group))

    def epoch_order(self, epoch: int) -> EpochOrder:
        """Return the order of an epoch."""
        return EpochOrder(
            self._index,
            seed=self._seed,
            epoch=epoch,
            global_batch=self._recipe.train.global_batch,
            virtual_ranks=self._virtual_ranks,
            repeats=self._recipe.augment.repeats,
            block=self._recipe.data.shuffle_samples,
            piece=self._recipe.data.shuffle_piece,
            draws=self._draws,
        )

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        # Read ahead one block of each group of this process, as the blocks in use all end at about the same step.
        depth = len(set(map(self.epoch_order(0).group_of, self._local)))
        with ReadAhead(self._reader, self._blocks(), depth) as ahead:
            held: set[BlockKey] = set()
            for epoch, order, step in self._steps():
                for group in dict.fromkeys(map(order.group_of, self._local)):
                    first, last = order.blocks(step, group)
                    for key in [k for k in held if k[0] < epoch or (k[1] == group and k[2] < first)]:
                        ahead.release(key)
                        held.discard(key)
                    needed = [(epoch, group, block) for block in range(first, last + 1)]
                    images = ChainMap(*(ahead.get(key) for key in needed))
                    held.update(needed)
                    yield [
                        self._encode(epoch, order, step, rank, at, images)
                        for rank, at in self.sharing.members(order.members(group))
                    ]

    def _steps(self) -> Iterator[tuple[int, EpochOrder, int]]:
        """Yield each step's epoch, the epoch's order, and the step's number in the epoch."""
        order: EpochOrder | None = None
        for step in range(self._start, self._stop):
            epoch, epoch_step = divmod(step, self._recipe.steps_per_epoch)
            if order is None or epoch_step == 0:
                order = self.epoch_order(epoch)
            yield epoch, order, epoch_step

    def _blocks(self) -> Iterator[tuple[BlockKey, Ints]]:
        """Yield the blocks in the order of their first use."""
        latest: dict[tuple[int, int], int] = {}
        for epoch, order, step in self._steps():
            for group in dict.fromkeys(map(order.group_of, self._local)):
                first, last = order.blocks(step, group)
                for block in range(max(first, latest.get((epoch, group), -1) + 1), last + 1):
                    latest[epoch, group] = block
                    samples = order.block(group, block)
                    yield (epoch, group, block), self.sharing.part(order.members(group), samples, self._index)

    def _encode(
        self, epoch: int, order: EpochOrder, step: int, rank: int, at: int, images: Mapping[int, memoryview]
    ) -> MicroBatch:
        """Return the part of a rank's micro-batch whose images were read here."""
        ranks = self.sharing.virtual_ranks[rank]
        draw = self.sharing.of(rank, order.draw(step, ranks[at]))
        here = [i for i, number in enumerate(draw.samples.tolist()) if number in images]
        encoded = self._encoded(epoch, Draw(draw.samples[here], draw.copies[here]), images)
        labels = self._index.labels[draw.samples].astype(np.int64)
        done = epoch * self._recipe.steps_per_epoch + step - self._start
        return MicroBatch(draw.samples, labels, encoded, here, rank, done * len(ranks) + at)

    def _encoded(self, epoch: int, draw: Draw, images: Mapping[int, memoryview]) -> list[EncodedSample]:
        """Return what was drawn in an epoch, for the decoder."""
        return [
            EncodedSample(number, self._index.key(number), images[number], label, seed, copy)
            for number, label, seed, copy in zip(
                draw.samples.tolist(),
                self._index.labels[draw.samples].tolist(),
                derive_seeds(self._seed, epoch, draw.samples, draw.copies, 2).tolist(),
                draw.copies.tolist(),
                strict=True,
            )
        ]

    def substitutes(self, number: int, at: int) -> Iterator[int | EncodedSample]:
        """Yield what may take the place of a bad image, in order: the images that follow it in the virtual rank.

        Which that is does not depend on how many processes share the virtual rank.

        Args:
            number: How many micro-batches of this process's stream come before the one with the image.
            at: Position of the image among those that this process's rank has of it.

        Yields:
            The position of another image that the rank has, or an image of another rank, read for this.
        """
        slots = self.sharing.my_slots
        if slots is None:
            yield from followers(self.batch_size, at)
            return
        step, local = divmod(number, len(self._local))
        epoch, epoch_step = divmod(self._start + step, self._recipe.steps_per_epoch)
        draw = self.epoch_order(epoch).draw(epoch_step, self._local[local])
        position = {slot: i for i, slot in enumerate(slots)}
        for slot in followers(len(draw.samples), slots[at]):
            if slot in position:
                yield position[slot]
            else:
                one = Draw(draw.samples[[slot]], draw.copies[[slot]])
                yield from self._encoded(epoch, one, self._reader.read(one.samples))


def followers(count: int, at: int) -> Iterator[int]:
    """Yield the other positions among so many, from the next one on, the first after the last."""
    return ((at + k) % count for k in range(1, count))


class EvalStream:
    """The evaluation samples of a process: a contiguous part, so each image belongs to exactly one process.

    Args:
        reader: Reads the samples.
        index: The index of the evaluation shards.
        rank: Rank of this process.
        world_size: Number of processes.
        batch: Images per batch.

    Attributes:
        batch_size: Images per batch.
        together: Batches that are yielded together.
        sharing: An evaluation is not shared: each image belongs to one process anyhow.
    """

    together = 1
    sharing = Sharing((range(1),), 0)

    def ranks_of(self, number: int) -> list[int]:
        """Return the only rank."""
        return [0]

    def __init__(self, reader: ShardReader, index: ShardIndex, *, rank: int, world_size: int, batch: int) -> None:
        self._reader, self._index, self.batch_size = reader, index, batch
        total = index.num_samples
        self.first, self.stop = total * rank // world_size, total * (rank + 1) // world_size
        # The number of rounds is the same on every rank, so the ranks can agree to stop after each.
        largest = max(total * (r + 1) // world_size - total * r // world_size for r in range(world_size))
        self.rounds = -(-largest // batch)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        with ReadAhead(self._reader, self._blocks(), depth=2) as ahead:
            for batch, (start, numbers) in enumerate(self._blocks()):
                images = ahead.get(start)
                labels = self._index.labels[numbers].astype(np.int64)
                encoded = [
                    EncodedSample(i, self._index.key(i), images[i], label, 0, 0)
                    for i, label in zip(numbers.tolist(), labels.tolist(), strict=True)
                ]
                yield [MicroBatch(numbers, labels, encoded, range(len(encoded)), number=batch)]
                ahead.release(start)

    def substitutes(self, number: int, at: int) -> Iterator[int | EncodedSample]:
        """Yield the positions that may take the place of a bad image (see ``TrainStream``)."""
        start = self.first + number * self.batch_size
        yield from followers(min(self.batch_size, self.stop - start), at)

    def _blocks(self) -> Iterator[tuple[int, Ints]]:
        for start in range(self.first, self.stop, self.batch_size):
            yield start, np.arange(start, min(start + self.batch_size, self.stop))
