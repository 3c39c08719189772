"""From shards to micro-batches: read blocks ahead on a thread, decode in worker processes, keep the order.

What is read and in which order is decided by ``data.order``; nothing here can change it. The bytes of a block are read
by the rank itself (each byte once), and travel to the decoding processes with the request for a batch.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from webdataset.tariterators import group_by_keys, tar_file_iterator

from rsb_cluster.data.index import ShardIndex
from rsb_cluster.data.order import EpochOrder, Ints, seed_of
from rsb_cluster.data.scan import IMAGE_EXTENSIONS
from rsb_cluster.errors import DataError
from rsb_cluster.recipe import Recipe
from rsb_cluster.storage import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """A sample as it goes to a decoder."""

    number: int
    key: str
    image: bytes
    label: int
    seed: int
    copy: int


@dataclass
class Batch:
    """What a virtual rank trains on in a step, or a part of the evaluation set.

    Attributes:
        images: uint8, shape (B, C, H, W).
        labels: int64, shape (B,).
        samples: Numbers of the samples in the index, shape (B,).
        good: Whether the image could be decoded, shape (B,).
        bad: ``key: reason`` of each image that could not be decoded (first copy only).
    """

    images: Tensor
    labels: Tensor
    samples: Tensor
    good: Tensor
    bad: list[str] = field(default_factory=list)

    def pin_memory(self) -> Batch:
        """Move to page-locked memory; called by the DataLoader where there is a GPU."""
        self.images, self.labels = self.images.pin_memory(), self.labels.pin_memory()
        return self


class BlockReader:
    """Reads sets of samples with one request per contiguous piece of a shard.

    Args:
        store: Folder of the shards.
        index: Their index.
    """

    def __init__(self, store: Store, index: ShardIndex) -> None:
        self._store = store
        self._index = index
        self.bytes_read = 0

    def read(self, samples: Ints) -> dict[int, bytes]:
        """Return the encoded images of the samples, by number.

        Raises:
            DataError: A shard does not hold what the index says.
        """
        ordered = np.sort(samples)
        shards = self._index.shard_of(ordered)
        cuts = np.flatnonzero((np.diff(ordered) != 1) | (np.diff(shards) != 0)) + 1
        images: dict[int, bytes] = {}
        for piece in np.split(ordered, cuts):
            if piece.size:
                self._read_piece(int(piece[0]), int(piece[-1]), images)
        return images

    def _read_piece(self, first: int, last: int, images: dict[int, bytes]) -> None:
        index = self._index
        shard = index.shards[int(index.shard_of(np.array([first]))[0])]
        start, stop = int(index.offsets[first]), int(index.stops[last])
        content = self._store.read_range(shard, start, stop)
        self.bytes_read += len(content)
        number = first
        try:
            # A tar may be entered at any member; the two empty blocks say where this piece ends.
            members = tar_file_iterator(io.BytesIO(content + bytes(1024)))
            for sample in group_by_keys(member | {"__url__": shard} for member in members):
                image = next((value for name, value in sample.items() if name in IMAGE_EXTENSIONS), None)
                if number > last or sample["__key__"] != index.key(number) or image is None:
                    break
                images[number] = image
                number += 1
        except Exception as error:
            raise self._changed(shard, number) from error
        if number != last + 1:
            raise self._changed(shard, number)

    def _changed(self, shard: str, number: int) -> DataError:
        return DataError(
            f"{self._store.locate(shard)} does not hold sample '{self._index.key(number)}' where its index says: the "
            "shard was replaced or damaged after indexing. Run 'rsb-cluster shards verify' on its folder."
        )


class TrainStream:
    """The micro-batches of a process, in order, from a step on to the end of the run.

    Args:
        reader: Where the samples come from.
        recipe: The recipe.
        index: The training shards.
        seed: The run's seed.
        virtual_ranks: Parts of a global batch.
        mine: The virtual ranks of this process.
        start_step: Optimizer step to start at, counted over the whole run.
        stop_step: Step to stop before.
    """

    def __init__(
        self,
        reader: BlockReader,
        recipe: Recipe,
        index: ShardIndex,
        *,
        seed: int,
        virtual_ranks: int,
        mine: Sequence[int],
        start_step: int,
        stop_step: int,
    ) -> None:
        self._reader, self._recipe, self._index = reader, recipe, index
        self._seed, self._virtual_ranks, self._mine = seed, virtual_ranks, mine
        self._start, self._stop = start_step, stop_step

    def order_of(self, epoch: int) -> EpochOrder:
        """Return the order of an epoch."""
        return EpochOrder(
            self._index,
            seed=self._seed,
            epoch=epoch,
            global_batch=self._recipe.train.global_batch,
            virtual_ranks=self._virtual_ranks,
            repeats=self._recipe.augment.repeats,
            block=self._recipe.data.shuffle_samples,
        )

    def __iter__(self) -> Iterator[list[Encoded]]:
        with ThreadPoolExecutor(1, thread_name_prefix="reader") as executor:
            blocks = _Blocks(self._reader, executor)
            for epoch, order, step in self._steps():
                for virtual_rank in self._mine:
                    yield self._encode(epoch, order, step, virtual_rank, blocks)

    def _steps(self) -> Iterator[tuple[int, EpochOrder, int]]:
        per_epoch = self._recipe.steps_per_epoch
        order: EpochOrder | None = None
        for step in range(self._start, self._stop):
            epoch, here = divmod(step, per_epoch)
            if order is None or here == 0:
                order = self.order_of(epoch)
            yield epoch, order, here

    def _encode(self, epoch: int, order: EpochOrder, step: int, virtual_rank: int, blocks: _Blocks) -> list[Encoded]:
        draw = order.draw(step, virtual_rank)
        images = blocks.get(epoch, order, step, virtual_rank)
        return [
            Encoded(
                number=number,
                key=self._index.key(number),
                image=images[number],
                label=int(self._index.labels[number]),
                seed=seed_of(self._seed, epoch, number, copy, 2),
                copy=copy,
            )
            for number, copy in zip(draw.samples.tolist(), draw.copies.tolist(), strict=True)
        ]


class _Blocks:
    """The blocks in memory: those of the present step, and of each stream the one after, read in the background."""

    def __init__(self, reader: BlockReader, executor: ThreadPoolExecutor) -> None:
        self._reader, self._executor = reader, executor
        self._held: dict[tuple[int, int, int], Future[dict[int, bytes]]] = {}

    def get(self, epoch: int, order: EpochOrder, step: int, virtual_rank: int) -> dict[int, bytes]:
        """Return the images of the blocks that a draw touches, and start reading the next block."""
        group, first, last = order.blocks(step, virtual_rank)
        wanted = [(epoch, group, block) for block in range(first, last + 1)]
        for key in wanted:
            self._start(key, order)
        if last + 1 < order.num_blocks(group):
            self._start((epoch, group, last + 1), order)
        for key in [k for k in self._held if k[0] < epoch or (k[1] == group and k[2] < first)]:
            self._held.pop(key)
        if len(wanted) == 1:
            return self._held[wanted[0]].result()
        images: dict[int, bytes] = {}
        for key in wanted:
            images |= self._held[key].result()
        return images

    def _start(self, key: tuple[int, int, int], order: EpochOrder) -> None:
        if key not in self._held:
            self._held[key] = self._executor.submit(self._reader.read, order.block(key[1], key[2]))


class EvalStream:
    """The evaluation samples of a process: a contiguous part, so that each image is dealt exactly once.

    Args:
        reader: Where the samples come from.
        index: The evaluation shards.
        rank: Number of this process.
        world_size: Processes in all.
        batch: Images in a batch.
    """

    def __init__(self, reader: BlockReader, index: ShardIndex, *, rank: int, world_size: int, batch: int) -> None:
        self._reader, self._index, self._batch = reader, index, batch
        total = index.num_samples
        self.first, self.stop = total * rank // world_size, total * (rank + 1) // world_size
        # The same number of rounds on every rank, so that they can agree to stop in between.
        self.rounds = -(
            -max(total * (r + 1) // world_size - total * r // world_size for r in range(world_size)) // batch
        )

    def __iter__(self) -> Iterator[list[Encoded]]:
        starts = list(range(self.first, self.stop, self._batch))
        with ThreadPoolExecutor(1, thread_name_prefix="reader") as executor:
            pending = [self._submit(executor, start) for start in starts[:2]]
            for number, start in enumerate(starts):
                images = pending.pop(0).result()
                if number + 2 < len(starts):
                    pending.append(self._submit(executor, starts[number + 2]))
                yield [
                    Encoded(i, self._index.key(i), images[i], int(self._index.labels[i]), 0, 0)
                    for i in range(start, min(start + self._batch, self.stop))
                ]

    def _submit(self, executor: ThreadPoolExecutor, start: int) -> Future[dict[int, bytes]]:
        return executor.submit(self._reader.read, np.arange(start, min(start + self._batch, self.stop)))


class _Decoder(Dataset[Any]):
    """Decodes and transforms one sample; what a worker process runs."""

    def __init__(self, transform: Callable[[Image.Image, int], Tensor]) -> None:
        self._transform = transform

    def __getitem__(self, sample: Encoded) -> tuple[Encoded, Tensor | None, str]:
        try:
            with Image.open(io.BytesIO(sample.image)) as image:
                return _light(sample), self._transform(image.convert("RGB"), sample.seed), ""
        except Exception as error:  # whatever a broken file does to a decoder; counted and named by the caller
            return _light(sample), None, f"{type(error).__name__}: {error}"


def _light(sample: Encoded) -> Encoded:
    return Encoded(sample.number, sample.key, b"", sample.label, sample.seed, sample.copy)


def _collate(decoded: list[tuple[Encoded, Tensor | None, str]]) -> Batch:
    """Stack a batch. The place of a bad image is taken by the next good one, so that the batch keeps its size."""
    good = [tensor is not None for _, tensor, _ in decoded]
    if not any(good):
        sample, _, reason = decoded[0]
        raise DataError(
            f"none of the {len(decoded)} images of a batch can be decoded; the first is {sample.key}: {reason}"
        )
    fill = [next((i + k) % len(good) for k in range(len(good)) if good[(i + k) % len(good)]) for i in range(len(good))]
    return Batch(
        images=torch.stack([decoded[i][1] for i in fill]),  # type: ignore[misc]
        labels=torch.tensor([decoded[i][0].label for i in fill], dtype=torch.int64),
        samples=torch.tensor([sample.number for sample, _, _ in decoded], dtype=torch.int64),
        good=torch.tensor(good),
        bad=[f"{sample.key}: {reason}" for sample, tensor, reason in decoded if tensor is None and sample.copy == 0],
    )


def batches(
    stream: TrainStream | EvalStream,
    transform: Callable[[Image.Image, int], Tensor],
    *,
    workers: int,
    pin: bool,
) -> DataLoader[Any]:
    """Return the stream's batches, decoded by worker processes (or in this process where ``workers`` is 0)."""
    return DataLoader(
        _Decoder(transform),
        batch_sampler=_AsSampler(stream),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        # Workers are forked by a server that never touched threads, CUDA or a network connection.
        multiprocessing_context="forkserver" if workers else None,
    )


class _AsSampler:
    """Lets a DataLoader take its batches' contents from a stream: the 'indices' are the encoded samples."""

    def __init__(self, stream: TrainStream | EvalStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[list[Encoded]]:
        return iter(self._stream)
