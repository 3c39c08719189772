"""Whether the ranks of a job can share the virtual ranks of a run, and how that is put into words."""

from __future__ import annotations

from pathlib import Path

from rsb_cluster.config.job import Job
from rsb_cluster.config.paper import is_papers_batch
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.global_batch import GlobalBatch
from rsb_cluster.errors import ConfigError


def check_share(recipe: Recipe, virtual_ranks: int, job: Job, job_path: Path) -> None:
    """Check that all ranks of a job get equal shares of a run's global batch.

    Args:
        recipe: What to train.
        virtual_ranks: The run's number of virtual ranks.
        job: Where to train.
        job_path: The job's file, for messages.

    Raises:
        ConfigError: They cannot; the message names the nearest numbers of ranks that can.
    """
    world = job.world_size
    batch = GlobalBatch.of(recipe, virtual_ranks, recomputes=job.gradient_checkpointing)
    if batch.fits(world):
        return
    nearest = batch.nearest(world, job.ranks_per_node) or batch.nearest(world, 1)
    ranks = " or ".join(map(str, nearest))
    why = f" (a virtual rank cannot be shared with {batch.unshared})" if batch.unshared else ""
    raise ConfigError(
        f"{world} ranks ({job_path.name}: {job.shape}) cannot equally share {_count(batch)}{why}. Use a job with "
        f"{ranks} rank{'' if nearest == [1] else 's'} in all, or other --virtual-ranks, which is another run."
    )


def memory_note(recipe: Recipe, virtual_ranks: int, job: Job) -> str:
    """Return a remark if a rank has more images at once than the job says that a device holds; empty if not.

    Args:
        recipe: What to train.
        virtual_ranks: The run's number of virtual ranks.
        job: Where to train; it may start on its fewest nodes.
    """
    batch = GlobalBatch.of(recipe, virtual_ranks, recomputes=job.gradient_checkpointing)
    ranks = batch.largest((job.min_nodes or job.nodes) * job.ranks_per_node)

    def fit(ranks: int) -> bool:
        return batch.images_at_once(ranks) <= job.max_micro_batch

    if fit(ranks):
        return ""
    enough = next((r for r in range(ranks, batch.most + 1) if batch.fits(r) and fit(r)), 0)
    more = f"use {enough} ranks, which share them; or " if enough else ""
    return (
        f"{batch.images_at_once(ranks)} images in one forward pass on each of {ranks} ranks are more than the "
        f"{job.max_micro_batch} that fit (job.max_micro_batch). If a GPU runs out of memory: {more}use more "
        "--virtual-ranks, which is another run with other BatchNorm statistics."
    )


def describe_sharing(recipe: Recipe, virtual_ranks: int, ranks: int) -> str:
    """Return how ranks share a global batch, and over how many images BatchNorm's statistics are.

    Args:
        recipe: What to train.
        virtual_ranks: The run's number of virtual ranks.
        ranks: Number of ranks.
    """
    batch = GlobalBatch.of(recipe, virtual_ranks)
    parts = batch.parts(ranks)
    text = _count(batch)
    if parts > 1:
        text += f", {'each ' if virtual_ranks > 1 else ''}shared by {parts} processes"
    elif virtual_ranks > ranks:
        text += f", {virtual_ranks // ranks} on each process"
    is_papers = is_papers_batch(recipe.paper, recipe.model.name, virtual_ranks, recipe.train.global_batch)
    return f"{text}, BatchNorm over {batch.micro_batch}{' as in the paper' if is_papers else ''}"


def _count(batch: GlobalBatch) -> str:
    plural = "s" if batch.virtual_ranks > 1 else ""
    return f"{batch.virtual_ranks} virtual rank{plural} of {batch.micro_batch} images"
