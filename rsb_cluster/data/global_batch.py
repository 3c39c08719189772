"""How processes share a global batch: V virtual ranks of m images each, on W processes.

If W divides V, a process has V/W whole virtual ranks and accumulates their gradients. If V divides W, k = W/V processes
share each virtual rank: m/k images each, of which Mixup and CutMix may split no pair. A run does the same mathematics
with all of these; other W are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rsb_cluster.config.recipe import Recipe


@dataclass(frozen=True)
class Share:
    """What a process computes of each global batch.

    Attributes:
        virtual_ranks: Its virtual ranks.
        part: Its part of a virtual rank that several processes share, from 0.
        parts: Number of these processes; 1: it has whole virtual ranks.
        slots: The images of a micro-batch that it has, as positions from 0, in its order.
    """

    virtual_ranks: range
    part: int
    parts: int
    slots: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the process has whole virtual ranks."""
        return self.parts == 1


@dataclass(frozen=True)
class GlobalBatch:
    """A global batch, and the numbers of processes that can share it.

    Attributes:
        virtual_ranks: Micro-batches of a step, V.
        micro_batch: Images of each, m.
        mixes: Whether images are mixed in pairs: i with m - 1 - i, as timm does.
        unshared: Why a virtual rank cannot be shared by several processes; empty: it can.
    """

    virtual_ranks: int
    micro_batch: int
    mixes: bool
    unshared: str = ""

    @staticmethod
    def of(recipe: Recipe, virtual_ranks: int, *, recomputes: bool = False) -> GlobalBatch:
        """Return the global batch of a run of a recipe.

        Args:
            recipe: The recipe.
            virtual_ranks: The run's virtual ranks.
            recomputes: Whether the job has gradient checkpointing.
        """
        unshared = ""
        if recipe.train.compile:
            unshared = "train.compile: torch.compile cannot follow BatchNorm statistics to other processes"
        elif recomputes:
            unshared = "job.gradient_checkpointing: processes do not compute BatchNorm's statistics together twice"
        elif recipe.data.pipeline == "timm" and recipe.data.max_bad_samples:
            unshared = "data.pipeline = 'timm' with data.max_bad_samples: a bad image's substitute may be elsewhere"
        return GlobalBatch(virtual_ranks, recipe.train.global_batch // virtual_ranks, recipe.mixes, unshared)

    def fits(self, processes: int) -> bool:
        """Whether so many processes can share it equally."""
        if self.virtual_ranks % processes == 0:
            return True
        if processes % self.virtual_ranks or self.unshared:
            return False
        return self.micro_batch % (processes // self.virtual_ranks * (2 if self.mixes else 1)) == 0

    def parts(self, processes: int) -> int:
        """Return how many processes share a virtual rank, k; 1 where a process has whole ones."""
        return max(1, processes // self.virtual_ranks)

    def images_at_once(self, processes: int) -> int:
        """Return how many images a process has in one forward pass."""
        return self.micro_batch // self.parts(processes)

    def largest(self, allowed: int) -> int:
        """Return the largest number of processes, at most so many, that can share it."""
        return next(count for count in range(allowed, 0, -1) if self.fits(count))

    @property
    def most(self) -> int:
        """The largest number of processes that can share it."""
        return self.largest(self.virtual_ranks * self.micro_batch)

    def nearest(self, processes: int, multiple_of: int) -> list[int]:
        """Return the nearest numbers of processes that can share it, one below and one above, where there are any.

        Args:
            processes: A number of processes.
            multiple_of: Only multiples of this number, such as the GPUs of a node.
        """
        fitting = [count for count in range(multiple_of, self.most + 1, multiple_of) if self.fits(count)]
        below, above = [c for c in fitting if c <= processes], [c for c in fitting if c > processes]
        return [*below[-1:], *above[:1]]

    def share(self, place: int, processes: int) -> Share:
        """Return the share of a process.

        Args:
            place: Its place among the processes (``places_by_host``).
            processes: How many there are; a number that ``fits``.
        """
        parts = self.parts(processes)
        if parts == 1:
            each = self.virtual_ranks // processes
            return Share(range(place * each, (place + 1) * each), 0, 1, tuple(range(self.micro_batch)))
        virtual_rank, part = divmod(place, parts)
        return Share(range(virtual_rank, virtual_rank + 1), part, parts, self._slots(part, parts))

    def _slots(self, part: int, parts: int) -> tuple[int, ...]:
        """Return the images of a part.

        With mixing they are some from the front and their partners from the back. In this order timm's own pairing of
        a part, first with last, is that of the whole micro-batch.
        """
        size = self.micro_batch // parts
        if not self.mixes:
            return tuple(range(part * size, (part + 1) * size))
        front = range(part * size // 2, (part + 1) * size // 2)
        return (*front, *(self.micro_batch - 1 - slot for slot in reversed(front)))


def places_by_host(hosts: Sequence[str], parts: int) -> list[int]:
    """Return the place of each rank, so that processes that share a virtual rank are on one host where they can be.

    Where ranks are numbered host by host, and a host has a multiple of ``parts``, each place is the rank.

    Args:
        hosts: Host of each rank.
        parts: Processes that share a virtual rank.
    """
    if parts == 1:
        return list(range(len(hosts)))
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        by_host.setdefault(host, []).append(rank)
    whole: list[int] = []
    rest: list[int] = []
    for ranks in by_host.values():
        fitting = len(ranks) // parts * parts
        whole += ranks[:fitting]
        rest += ranks[fitting:]
    places = [0] * len(hosts)
    for place, rank in enumerate([*whole, *rest]):
        places[rank] = place
    return places


def hosts_of_parts(hosts: Sequence[str], places: Sequence[int], parts: int) -> list[set[str]]:
    """Return the hosts on which each shared virtual rank is computed."""
    found: list[set[str]] = [set() for _ in range(len(hosts) // parts)]
    for host, place in zip(hosts, places, strict=True):
        found[place // parts].add(host)
    return found
