"""Whether the classes of a set are mixed enough for training, which shuffles a few thousand samples at a time.

A block of the order of samples (see `rsb_cluster.data.order`) is made of pieces of consecutive samples. If the samples
of a piece are of one class, the classes of a block are few, and the micro-batches drawn from it are less balanced than
random ones, for as many steps as the block lasts. `python -m tests.benchmarks.shuffle` has the figures for whole sets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rsb_cluster.config.recipe import Data
from rsb_cluster.data.index import ShardIndex
from rsb_cluster.data.order import EpochOrder

# Of a usual training: virtual ranks and images of a micro-batch.
_RANKS, _MICRO_BATCH = 32, 64
_BLOCKS = 64  # that are looked at
_MAX_SPREAD = 1.1
_SMALLER_PIECES = (8, 1)


@dataclass(frozen=True)
class Mixing:
    """How well an order of samples mixes the classes.

    Attributes:
        classes: Mean number of classes in a block.
        random_classes: The same in random order.
        spread: Standard deviation of the number of images of a class in a micro-batch, over that in random order.
        noise: Standard deviation of the square of ``spread`` by chance, for a mixed set.
    """

    classes: float
    random_classes: float
    spread: float
    noise: float

    @property
    def is_poor(self) -> bool:
        """Whether the classes are clearly less mixed than training needs."""
        return self.spread**2 > _MAX_SPREAD**2 + 4 * self.noise


def class_mixing(index: ShardIndex, block: int, piece: int) -> Mixing:
    """Return how well training would mix the classes of a set of at least 2,048 samples.

    Args:
        index: The set.
        block: Size of a shuffle block, samples, as in `EpochOrder`.
        piece: Consecutive samples that are read together, likewise.
    """
    order = EpochOrder(
        index, seed=0, epoch=0, global_batch=_RANKS * _MICRO_BATCH, virtual_ranks=_RANKS, repeats=1, block=block,
        piece=piece,
    )  # fmt: skip
    groups = np.arange(_BLOCKS) % _RANKS
    steps = np.linspace(0, order.steps - 1, _BLOCKS).astype(int)
    blocks = dict.fromkeys((int(g), order.blocks(int(s), int(g))[0]) for g, s in zip(groups, steps, strict=True))
    share = np.bincount(index.labels, minlength=index.num_classes) / index.num_samples
    classes, expected, pairs, sizes = [], [], [], []
    for group, number in blocks:
        counts = np.bincount(index.labels[order.block(group, number)], minlength=index.num_classes)
        size = int(counts.sum())
        sizes.append(size)
        classes.append(int((counts > 0).sum()))
        expected.append(float((1 - (1 - share) ** size).sum()))
        if size > 1:
            pairs.append(float((counts * (counts - 1)).sum() / (size * (size - 1))))
    # Two samples of a block are of one class this much more often than any two: their counts' variance follows.
    by_chance = float((share**2).sum())
    more = (np.mean(pairs) - by_chance) / (1 - by_chance) if by_chance < 1 and pairs else 0.0
    spread = float(np.sqrt(max(0.0, 1 + (_MICRO_BATCH - 1) * more)))
    noise = (_MICRO_BATCH - 1) / np.mean(sizes) * np.sqrt(2 / (max(1, (share > 0).sum() - 1) * len(sizes)))
    return Mixing(float(np.mean(classes)), float(np.mean(expected)), spread, float(noise))


def mixing_note(index: ShardIndex) -> str:
    """Return a sentence on a set whose classes training would not mix, with what to do; empty for others."""
    if index.num_samples < _RANKS * _MICRO_BATCH:
        return ""
    fields = Data.model_fields
    block, piece = fields["shuffle_samples"].default, fields["shuffle_piece"].default
    found = class_mixing(index, block, piece)
    if not found.is_poor:
        return ""
    for smaller in _SMALLER_PIECES:
        better = class_mixing(index, block, smaller)
        if not better.is_poor:
            break
    return (
        f"sorted by class: a shuffle block of training holds {found.classes:,.0f} classes ({found.random_classes:,.0f} "
        f"in random order), and the images of a class in a micro-batch vary {found.spread:.2f} times as much as in "
        f"random order. Make the shards again with 'shards make', which shuffles; or train with --set "
        f"data.shuffle_piece={smaller}, which needs more requests ({better.spread:.2f} times)"
    )
