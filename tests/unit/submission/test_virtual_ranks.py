"""A job's ranks share a recipe's batch, or the error says why not."""

import re
from pathlib import Path

import pytest

from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.errors import ConfigError
from rsb_cluster.submission.virtual_ranks import choose_virtual_ranks
from tests.unit.bundled import JOBS, load_job, load_recipe

RECIPES = ("a1", "a2", "a3", "deit", "digits", "fashion-mnist")


def choose(recipe: Recipe, job: Job, stored: int = 0) -> int:
    return choose_virtual_ranks(recipe, job, Path(f"jobs/{job.name}.toml"), stored)


@pytest.mark.parametrize(
    "shape", [(), ("nodes=2",), ("nodes=3",), ("gpus_per_node=1",), ("nodes=4", "gpus_per_node=4")]
)
@pytest.mark.parametrize("job_name", JOBS)
@pytest.mark.parametrize("recipe_name", RECIPES)
def test_a_recipe_fits_a_job_or_the_error_says_why_not(recipe_name, job_name, shape):
    recipe = load_recipe(recipe_name)
    try:
        job = load_job(job_name, *shape)
        chosen = choose(recipe, job)
    except ConfigError as error:
        assert re.search(r"Use |Leave ", str(error)), "what to do next"
        assert job_name in str(error)
        return
    batch = recipe.train.global_batch
    assert batch % chosen == 0 and chosen % job.world_size == 0
    assert batch // chosen <= job.max_micro_batch
    assert chosen >= recipe.augment.repeats
    assert batch // chosen % 2 == 0


@pytest.mark.parametrize(
    ("recipe", "job", "chosen"),
    [
        (("a1",), ("slurm", "gpus_per_node=1"), 4),  # of 512: the paper's own on one GPU
        (("a1",), ("slurm", "gpus_per_node=4"), 4),
        (("a1",), ("slurm",), 8),
        (("a1",), ("slurm", "nodes=4"), 32),
        (("a1",), ("slurm", "gpus_per_node=1", "max_micro_batch=128"), 16),
        (("a1",), ("slurm", "gpus_per_node=1", "max_micro_batch=2048"), 4),  # three copies in different micro-batches
        (("a3",), ("slurm", "gpus_per_node=1", "max_micro_batch=2048"), 1),
        (("a1", "train.virtual_ranks=4"), ("slurm", "gpus_per_node=1"), 4),
        (("a1", "train.virtual_ranks=16"), ("slurm",), 16),
        (("a1", "train.global_batch=1536"), ("slurm", "gpus_per_node=1", "nodes=3"), 3),
        (("a1", "train.global_batch=1000"), ("slurm", "gpus_per_node=1"), 4),  # 2 would be 500, and too few
        (("a3", "train.global_batch=12"), ("slurm", "gpus_per_node=4"), None),  # 3 images each: odd
        (("a3", "train.global_batch=12", "augment.mixup=0", "augment.cutmix=0"), ("slurm", "gpus_per_node=4"), 4),
    ],
)
def test_the_smallest_number_that_fits_is_chosen(recipe, job, chosen):
    if chosen is None:
        with pytest.raises(ConfigError, match=r"and an even number with Mixup or CutMix\. Use another batch"):
            choose(load_recipe(*recipe), load_job(*job))
    else:
        assert choose(load_recipe(*recipe), load_job(*job)) == chosen


def test_a_batch_that_ranks_cannot_share_is_refused_with_its_neighbours():
    recipe, job = load_recipe("a1", "train.global_batch=1000"), load_job("slurm", "nodes=2")
    with pytest.raises(ConfigError) as caught:
        choose(recipe, job)
    assert str(caught.value) == (
        "train.global_batch = 1000 is not divisible by 16 ranks (slurm.toml: 2 nodes × 8 GPUs). Use 992 or 1008."
    )


def test_a_batch_of_zero_is_never_advised():
    with pytest.raises(ConfigError, match=r"16 ranks \(.*\)\. Use 16\.$"):
        choose(load_recipe("a1", "train.global_batch=10"), load_job("slurm", "nodes=2"))


def test_a_run_keeps_its_virtual_ranks_on_fewer_gpus():
    recipe = load_recipe("a1")
    stored = choose(recipe, load_job("slurm", "nodes=4"))
    assert stored == 32
    assert choose(recipe, load_job("slurm", "gpus_per_node=1"), stored) == 32
    assert choose(load_recipe("a1", "train.virtual_ranks=4"), load_job("slurm"), stored) == 32


@pytest.mark.parametrize(
    ("assignments", "stored", "who"), [((), 4, "this run has"), (("train.virtual_ranks=4",), 0, "the recipe has")]
)
def test_more_gpus_than_virtual_ranks_are_refused_with_what_would_fit(assignments, stored, who):
    with pytest.raises(ConfigError) as caught:
        choose(load_recipe("a1", *assignments), load_job("slurm"), stored)
    assert str(caught.value) == (
        f"{who} 4 virtual ranks, which 8 ranks (slurm.toml: 1 node × 8 GPUs) cannot share equally. "
        "Use a job with 1, 2 or 4 ranks in all."
    )


def test_one_virtual_rank_on_two_gpus_is_refused_in_good_english():
    with pytest.raises(ConfigError, match=r"Use a job with 1 rank in all\.$"):
        choose(load_recipe("a3", "train.virtual_ranks=1"), load_job("slurm", "gpus_per_node=2"))


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("train.virtual_ranks=3",), "train.global_batch = 2048 is not divisible by 3 virtual ranks."),
        (("train.virtual_ranks=2048",), "a micro-batch has 1 images (2048 / 2048 virtual ranks), but Mixup and CutMix"),
    ],
)
def test_invalid_virtual_ranks_are_refused(assignments, message):
    with pytest.raises(ConfigError) as caught:
        choose(load_recipe("a1", *assignments), load_job("slurm", "gpus_per_node=1"))
    assert message in str(caught.value)


def test_an_odd_micro_batch_is_fine_without_mixup():
    recipe = load_recipe("a3", "augment.mixup=0", "augment.cutmix=0", "train.virtual_ranks=2048")
    assert choose(recipe, load_job("slurm", "gpus_per_node=1")) == 2048
