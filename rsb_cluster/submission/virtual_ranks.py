"""The number of virtual ranks of a run: into how many micro-batches its global batch is split."""

from __future__ import annotations

from pathlib import Path

from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.errors import ConfigError


def choose_virtual_ranks(recipe: Recipe, job: Job, job_path: Path, stored: int = 0) -> int:
    """Return the number of virtual ranks.

    An existing run keeps its number. For a new run it is the recipe's, or else the smallest with which all ranks
    have the same number of micro-batches, a micro-batch has at most ``job.max_micro_batch`` images, and the copies of
    repeated augmentation fall into different micro-batches.

    Args:
        recipe: What to train.
        job: Where to train.
        job_path: The job's file, for messages.
        stored: The number of an existing run; 0 for a new run.

    Raises:
        ConfigError: The job cannot train the recipe.
    """
    batch, world, where = recipe.train.global_batch, job.world_size, f"{job_path.name}: {job.shape}"
    if batch % world:
        below = batch // world * world
        options = [str(b) for b in (below, below + world) if b]
        raise ConfigError(
            f"train.global_batch = {batch} is not divisible by {world} ranks ({where}). Use {' or '.join(options)}."
        )
    fixed = stored or recipe.train.virtual_ranks
    if fixed:
        if batch % fixed:
            raise ConfigError(f"train.global_batch = {batch} is not divisible by {fixed} virtual ranks.")
        if fixed % world:
            shares = [str(w) for w in range(1, fixed + 1) if fixed % w == 0]
            owner = "this run has" if stored else "the recipe has"
            raise ConfigError(
                f"{owner} {fixed} virtual rank{'s' if fixed > 1 else ''}, which {world} ranks ({where}) cannot share "
                f"equally. Use a job with {' or '.join(filter(None, [', '.join(shares[:-1]), shares[-1]]))} "
                f"rank{'s' if fixed > 1 else ''} in all."
            )
        chosen = fixed
    else:
        repeats = min(recipe.augment.repeats, batch)
        mixes = bool(recipe.augment.mixup or recipe.augment.cutmix)
        fitting = [
            v
            for v in range(world, batch + 1, world)
            if batch % v == 0 and v >= repeats and batch // v <= job.max_micro_batch and not (mixes and batch // v % 2)
        ]
        if not fitting:
            raise ConfigError(
                f"train.global_batch = {batch} cannot be split into equal micro-batches for {world} ranks ({where}) of "
                f"at most {job.max_micro_batch} images (job.max_micro_batch), and an even number with Mixup or CutMix. "
                "Use another batch size."
            )
        chosen = fitting[0]
    micro_batch = batch // chosen
    if (recipe.augment.mixup or recipe.augment.cutmix) and micro_batch % 2:
        raise ConfigError(
            f"a micro-batch has {micro_batch} images ({batch} / {chosen} virtual ranks), but Mixup and CutMix mix "
            "pairs and need an even number. Use another --virtual-ranks."
        )
    return chosen
