"""How much memory of a host the ranks of a job need: blocks of encoded images, decoded batches, and the ranks."""

from __future__ import annotations

from dataclasses import dataclass

from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.global_batch import GlobalBatch
from rsb_cluster.data.index import ShardIndex
from rsb_cluster.data.order import DRAWS, groups_of

# Batches that are decoded ahead of the one in use. (Those that share images with the last of them are started, too.)
AHEAD = 3
# Batches whose copies to a GPU may be under way while the next ones are decoded and used.
COPYING = 2
# Blocks of a stream that are held at a time: one in use, one that is being read.
_BLOCKS = 2
# Of a rank with torch and timm, on a CPU: 0.98 GB are measured, with what processes share. CUDA's is not in it.
_RANK_BYTES = 1_000_000_000
_NUMBERS_BYTES = 16  # of an image: its label and its number


@dataclass(frozen=True)
class HostMemory:
    """Memory of a node, at least.

    Attributes:
        ranks: Ranks per node.
        blocks: Bytes of encoded images of a rank, in shuffle blocks.
        batches: Bytes of decoded batches of a rank.
    """

    ranks: int
    blocks: int
    batches: int

    @property
    def total(self) -> int:
        """Bytes of a node."""
        return self.ranks * (_RANK_BYTES + self.blocks + self.batches)

    def __str__(self) -> str:
        parts = {"": _RANK_BYTES, "encoded images ": self.blocks, "batches ": self.batches}
        each = ", ".join(f"{name}{size / 1e9:.2f} GB" for name, size in parts.items())
        return f"{self.total / 1e9:.1f} GB per node = {self.ranks} ranks × ({each})"


def batches_held(together: int) -> int:
    """Return how many batches of a stream are in memory at a time, if so many are decoded together."""
    return together + AHEAD + COPYING


def host_memory(recipe: Recipe, job: Job, index: ShardIndex, virtual_ranks: int, draws: int = DRAWS) -> HostMemory:
    """Return the memory that a node needs at least.

    Args:
        recipe: What to train.
        job: Where to train, on the fewest nodes that it may start on.
        index: The index of the training shards.
        virtual_ranks: Virtual ranks of the run.
        draws: The run's version of the order.
    """
    world = (job.min_nodes or job.nodes) * job.ranks_per_node
    batch = GlobalBatch.of(recipe, virtual_ranks)
    per_rank = max(1, virtual_ranks // world)
    groups = groups_of(virtual_ranks, recipe.augment.repeats, draws)
    mine_of = [range(first, first + per_rank) for first in range(0, virtual_ranks, per_rank)]
    ranks = [mine for mine in mine_of for _ in range(batch.parts(world))]
    in_processes = bool(job.loader_workers and job.loader_processes) and recipe.data.pipeline == "fast"
    together, streams = 1, 0.0
    for number, mine in enumerate(ranks):
        first = number // job.ranks_per_node * job.ranks_per_node
        node = ranks[first : first + job.ranks_per_node] if in_processes else [mine]
        own = [group for group in groups if _common(group, mine)]
        # Those ranks of the node that have members of a group hold its block between them.
        shares = [1 / sum(_common(group, other) > 0 for other in node) for group in own]
        together, streams = max(together, *(_common(group, mine) for group in own)), max(streams, sum(shares))
    block = min(recipe.data.shuffle_samples, index.num_samples) * float(index.image_sizes.mean())
    micro_batch = batch.images_at_once(world)
    if in_processes:
        held, evaluated = batches_held(together), batches_held(1)
    elif job.loader_workers:
        held, evaluated = together + AHEAD, 1 + AHEAD
    else:
        held, evaluated = together, 1
    training = held * micro_batch * _image_bytes(recipe.augment.resolution)
    evaluation = evaluated * max(micro_batch, 64) * _image_bytes(recipe.eval.resolution)
    return HostMemory(job.ranks_per_node, int(_BLOCKS * streams * block), training + evaluation)


def _common(one: range, other: range) -> int:
    """Return how many numbers two ranges share."""
    return len(range(max(one.start, other.start), min(one.stop, other.stop)))


def _image_bytes(side: int) -> int:
    return 3 * side * side + _NUMBERS_BYTES
