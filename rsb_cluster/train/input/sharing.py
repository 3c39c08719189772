"""How the ranks of a node share the reading and decoding of images that several of them need.

These are images whose copies go to virtual ranks of several of them, and the stream of a virtual rank that several of
them share. A pure function of the order and of the shares of all: every process computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rsb_cluster.data.global_batch import Share
from rsb_cluster.data.index import ShardIndex
from rsb_cluster.data.order import Draw, Ints


@dataclass(frozen=True)
class Sharing:
    """The ranks of a node that decode for each other.

    Attributes:
        virtual_ranks: The virtual ranks of each, consecutive numbers.
        mine: Which of them this process decodes beside.
        slots: The images of a micro-batch that each has, as positions in it, where processes share virtual ranks;
            empty: all.
    """

    virtual_ranks: tuple[Sequence[int], ...]
    mine: int
    slots: tuple[Sequence[int], ...] = ()

    @staticmethod
    def among(shares: Sequence[Share], mine: int) -> Sharing:
        """Return how ranks with these shares of a global batch decode for each other."""
        slots = () if shares[mine].is_whole else tuple(share.slots for share in shares)
        return Sharing(tuple(share.virtual_ranks for share in shares), mine, slots)

    @property
    def my_slots(self) -> Sequence[int] | None:
        """The images of a micro-batch that this process's rank has; None: all."""
        return self.slots[self.mine] if self.slots else None

    def of(self, rank: int, draw: Draw) -> Draw:
        """Return what a rank has of a micro-batch."""
        if not self.slots:
            return draw
        slots = list(self.slots[rank])
        return Draw(draw.samples[slots], draw.copies[slots])

    def members(self, group: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield each micro-batch of a group that is needed on this node: the rank, and its place in the rank's step."""
        for rank, numbers in enumerate(self.virtual_ranks):
            for at, virtual_rank in enumerate(numbers):
                if virtual_rank in group:
                    yield rank, at

    def ranks(self, group: Sequence[int]) -> list[int]:
        """Return the ranks that need images of a group."""
        return list(dict.fromkeys(rank for rank, _ in self.members(group)))

    def peers(self, groups: Sequence[Sequence[int]]) -> list[int]:
        """Return the other ranks that need images which this one needs, too.

        Args:
            groups: All groups of virtual ranks that share copies.
        """
        found = {rank for group in groups if self.mine in (ranks := self.ranks(group)) for rank in ranks}
        return sorted(found - {self.mine})

    def part(self, group: Sequence[int], samples: Ints, index: ShardIndex) -> Ints:
        """Return those samples of a group's block that are read and decoded here.

        Each rank that needs images of the group gets as many bytes as the others, of consecutive samples: a piece of a
        shard is read by one process, but for the few pieces that are cut.
        """
        ranks = self.ranks(group)
        if len(ranks) == 1:
            return samples
        ordered = np.sort(samples)
        stops = np.cumsum(index.image_sizes[ordered])
        mine: Ints = ordered[(stops - 1) * len(ranks) // stops[-1] == ranks.index(self.mine)]
        return mine
