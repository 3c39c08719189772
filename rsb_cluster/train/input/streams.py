"""The encoded samples of a process, in order, read ahead in blocks, each byte once.

``data.order`` alone decides which samples are read, and in which order.
"""

from __future__ import annotations

import itertools
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.ahead import ReadAhead
from rsb_cluster.data.index import ShardIndex
from rsb_cluster.data.order import EpochOrder, Ints, derive_seed
from rsb_cluster.data.reader import ShardReader

# epoch, group of virtual ranks, block of the group's stream
BlockKey = tuple[int, int, int]


@dataclass(frozen=True)
class EncodedSample:
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


class TrainStream:
    """The micro-batches of a process, in order, from a step to the end of the run.

    Micro-batches of a step that share images are yielded together, so each image is decoded once; without repeated
    augmentation each is yielded alone.

    Args:
        reader: Reads the samples.
        recipe: The recipe.
        index: The index of the training shards.
        seed: The run's seed.
        virtual_ranks: Micro-batches per step.
        local_virtual_ranks: The virtual ranks of this process.
        start_step: First optimizer step, counted over the whole run.
        stop_step: The step after the last one.
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
    ) -> None:
        self._reader, self._recipe, self._index = reader, recipe, index
        self._seed, self._virtual_ranks, self._local = seed, virtual_ranks, local_virtual_ranks
        self._start, self._stop = start_step, stop_step

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
        )

    def __iter__(self) -> Iterator[list[list[EncodedSample]]]:
        # Read ahead one block of each group of this process, as the blocks in use all end at about the same step.
        depth = len(set(map(self.epoch_order(0).group_of, self._local)))
        with ReadAhead(self._reader, self._blocks(), depth) as ahead:
            held: set[BlockKey] = set()
            for epoch, order, step in self._steps():
                for group, members in itertools.groupby(self._local, order.group_of):
                    first, last = order.blocks(step, group)
                    for key in [k for k in held if k[0] < epoch or (k[1] == group and k[2] < first)]:
                        ahead.release(key)
                        held.discard(key)
                    needed = [(epoch, group, block) for block in range(first, last + 1)]
                    images = ChainMap(*(ahead.get(key) for key in needed))
                    held.update(needed)
                    yield [self._encode(epoch, order, step, virtual_rank, images) for virtual_rank in members]

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
                    yield (epoch, group, block), order.block(group, block)

    def _encode(
        self, epoch: int, order: EpochOrder, step: int, virtual_rank: int, images: Mapping[int, memoryview]
    ) -> list[EncodedSample]:
        draw = order.draw(step, virtual_rank)
        return [
            EncodedSample(
                number=number,
                key=self._index.key(number),
                image=images[number],
                label=int(self._index.labels[number]),
                seed=derive_seed(self._seed, epoch, number, copy, 2),
                copy=copy,
            )
            for number, copy in zip(draw.samples.tolist(), draw.copies.tolist(), strict=True)
        ]


class EvalStream:
    """The evaluation samples of a process: a contiguous part, so each image belongs to exactly one process.

    Args:
        reader: Reads the samples.
        index: The index of the evaluation shards.
        rank: Rank of this process.
        world_size: Number of processes.
        batch: Images per batch.
    """

    def __init__(self, reader: ShardReader, index: ShardIndex, *, rank: int, world_size: int, batch: int) -> None:
        self._reader, self._index, self._batch = reader, index, batch
        total = index.num_samples
        self.first, self.stop = total * rank // world_size, total * (rank + 1) // world_size
        # The number of rounds is the same on every rank, so the ranks can agree to stop after each.
        largest = max(total * (r + 1) // world_size - total * r // world_size for r in range(world_size))
        self.rounds = -(-largest // batch)

    def __iter__(self) -> Iterator[list[list[EncodedSample]]]:
        with ReadAhead(self._reader, self._blocks(), depth=2) as ahead:
            for start, numbers in self._blocks():
                images = ahead.get(start)
                yield [
                    [
                        EncodedSample(i, self._index.key(i), images[i], int(self._index.labels[i]), 0, 0)
                        for i in numbers.tolist()
                    ]
                ]
                ahead.release(start)

    def _blocks(self) -> Iterator[tuple[int, Ints]]:
        for start in range(self.first, self.stop, self._batch):
            yield start, np.arange(start, min(start + self._batch, self.stop))
