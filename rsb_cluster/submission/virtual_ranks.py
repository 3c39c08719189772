"""Into how many parts the global batch of a run is cut, so that all ranks of a job get an equal share."""

from __future__ import annotations

from pathlib import Path

from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.errors import ConfigError


def choose_virtual_ranks(recipe: Recipe, job: Job, job_path: Path, stored: int = 0) -> int:
    """Return the number of parts of the global batch, or say why the job cannot train it.

    A run that exists keeps its number. Else it is the recipe's, or the smallest that gives each rank an equal share,
    fits ``job.max_micro_batch``, and lets the copies of repeated augmentation go to different micro-batches.
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
            what = "this run has" if stored else "the recipe has"
            raise ConfigError(
                f"{what} {fixed} virtual rank{'s' if fixed > 1 else ''}, which {world} ranks ({where}) cannot share "
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
                f"train.global_batch = {batch} has no equal parts for {world} ranks ({where}) of at most "
                f"{job.max_micro_batch} images (job.max_micro_batch), even in number for Mixup. Use another batch."
            )
        chosen = fitting[0]
    micro_batch = batch // chosen
    if (recipe.augment.mixup or recipe.augment.cutmix) and micro_batch % 2:
        raise ConfigError(
            f"a micro-batch of {micro_batch} images ({batch} / {chosen} virtual ranks) is odd; Mixup mixes pairs. "
            "Use another --virtual-ranks."
        )
    return chosen
