"""The ranks of a job share a recipe's virtual ranks, or the error says which would."""

import re
from pathlib import Path

import pytest

from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.global_batch import GlobalBatch
from rsb_cluster.errors import ConfigError
from rsb_cluster.submission.virtual_ranks import check_share, describe_sharing, memory_note
from tests.unit.bundled import JOBS, load_job, load_recipe

RECIPES = ("a1", "a2", "a3", "deit", "digits", "fashion-mnist", "t2", "ft-cars")


def check(recipe: Recipe, job: Job) -> None:
    check_share(recipe, recipe.train.virtual_ranks, job, Path(f"jobs/{job.name}.toml"))


@pytest.mark.parametrize(
    "shape", [(), ("nodes=2",), ("nodes=3",), ("gpus_per_node=1",), ("nodes=4", "gpus_per_node=4")]
)
@pytest.mark.parametrize("job_name", JOBS)
@pytest.mark.parametrize("recipe_name", RECIPES)
def test_a_recipe_fits_a_job_or_the_error_says_why_not(recipe_name, job_name, shape):
    recipe = load_recipe(recipe_name)
    try:
        job = load_job(job_name, *shape)
        check(recipe, job)
    except ConfigError as error:
        assert re.search(r"Use |Leave ", str(error)), "what to do next"
        assert job_name in str(error)
        return
    batch = GlobalBatch.of(recipe, recipe.train.virtual_ranks)
    shares = [batch.share(place, job.world_size) for place in range(job.world_size)]
    assert sum(len(share.virtual_ranks) * len(share.slots) for share in shares) == recipe.train.global_batch


@pytest.mark.parametrize(("nodes", "nearest"), [(3, "16 or 32"), (5, "32 or 64"), (6, "32 or 64"), (2000, "1024")])
def test_ranks_that_cannot_share_are_refused_with_the_nearest_numbers_of_whole_nodes(nodes, nearest):
    with pytest.raises(ConfigError) as caught:
        check(load_recipe("a1"), load_job("slurm", f"nodes={nodes}"))
    assert str(caught.value) == (
        f"{nodes * 8} ranks (slurm.toml: {nodes} nodes × 8 GPUs) cannot equally share 4 virtual ranks of 512 images. "
        f"Use a job with {nearest} ranks in all, or other --virtual-ranks, which is another run."
    )


def test_with_torch_compile_a_virtual_rank_is_not_shared_and_the_error_says_so():
    compiled = load_recipe("a1", "train.compile=true")
    check(compiled, load_job("slurm", "gpus_per_node=4"))
    with pytest.raises(ConfigError) as caught:
        check(compiled, load_job("slurm"))
    assert "(a virtual rank cannot be shared with train.compile: " in str(caught.value)
    assert "Use a job with 4 ranks in all" in str(caught.value)


def test_one_virtual_rank_on_two_ranks_is_refused_in_good_english():
    with pytest.raises(ConfigError, match=r"share 1 virtual rank of 2048 images .* Use a job with 1 rank in all, or"):
        check(load_recipe("a3", "train.virtual_ranks=1", "train.compile=true"), load_job("slurm", "gpus_per_node=2"))


def test_more_images_than_a_gpu_holds_are_a_remark_with_the_ranks_that_would_do():
    resnet18 = load_recipe("a1", "model.name=resnet18")
    assert memory_note(resnet18, 2, load_job("slurm", "gpus_per_node=4")) == ""
    said = memory_note(resnet18, 2, load_job("slurm", "gpus_per_node=2"))
    assert said.startswith("1024 images in one forward pass on each of 2 ranks are more than the 512 that fit")
    assert "use 4 ranks, which share them; or use more --virtual-ranks" in said
    elastic = load_job("slurm", "gpus_per_node=2", "nodes=4", "min_nodes=1")
    assert memory_note(resnet18, 2, elastic) == said, "it may start on its fewest nodes"
    assert "use 4 ranks" not in memory_note(
        load_recipe("a1", "model.name=resnet18", "train.compile=true"), 2, load_job("slurm", "gpus_per_node=2")
    )


@pytest.mark.parametrize(
    ("assignments", "ranks", "words"),
    [
        ((), 32, "4 virtual ranks of 512 images, each shared by 8 processes, BatchNorm over 512 as in the paper"),
        ((), 4, "4 virtual ranks of 512 images, BatchNorm over 512 as in the paper"),
        ((), 1, "4 virtual ranks of 512 images, 4 on each process, BatchNorm over 512 as in the paper"),
        (("train.virtual_ranks=32",), 32, "32 virtual ranks of 64 images, BatchNorm over 64"),
        (("train.virtual_ranks=1",), 2, "1 virtual rank of 2048 images, shared by 2 processes, BatchNorm over 2048"),
        (("train.global_batch=16",), 8, "4 virtual ranks of 4 images, each shared by 2 processes, BatchNorm over 4"),
        (("model.name=resnet26",), 8, "8 virtual ranks of 256 images, BatchNorm over 256"),
    ],
)
def test_how_a_batch_is_shared_is_one_sentence(assignments, ranks, words):
    recipe = load_recipe("a1", *assignments)
    assert describe_sharing(recipe, recipe.train.virtual_ranks, ranks) == words
