"""What the paper's Table 3 sets for a model."""

import pytest

from rsb_cluster.config import catalog, paper
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.errors import ConfigError
from tests.unit.bundled import load_recipe, put_recipe

pytestmark = pytest.mark.usefixtures("here")


def load(name: str, model: str, *assignments: str) -> catalog.Resolved:
    return catalog.load_recipe(name, model=model, overrides=parse_overrides(assignments))


@pytest.mark.parametrize(
    ("procedure", "model", "gpus", "train_px", "test_px"),
    [
        ("A1", "resnet18", 2, 224, 224),
        ("A1", "resnet50", 4, 224, 224),
        ("A2", "resnet152", 8, 224, 224),
        ("A1", "resnext50_32x4d", 8, 224, 224),
        ("A3", "resnext50_32x4d", 4, 160, 224),  # the one model with other GPUs by procedure
        ("A3", "efficientnet_b4", 32, 320, 380),
        ("A2", "efficientnetv2_rw_m", 32, 320, 384),
        ("A3", "vit_small_patch16_224", 8, 160, 224),
    ],
)
def test_a_model_has_its_gpus_and_resolutions_of_table_3(procedure, model, gpus, train_px, test_px):
    assert paper.setup_of(procedure, model) == paper.Setup(gpus, train_px, test_px)
    assert paper.setup_of(procedure, f"{model}.some_tag") == paper.Setup(gpus, train_px, test_px)
    recipe = load(procedure.lower(), model)
    assert recipe.recipe.train.virtual_ranks == gpus
    assert (recipe.recipe.augment.resolution, recipe.recipe.eval.resolution) == (train_px, test_px)
    assert recipe.modified == {}


def test_all_of_table_3_is_there_and_each_micro_batch_is_one_that_mixup_can_pair():
    assert len(paper.tables()["table3"]) == 25
    for model in paper.tables()["table3"]:
        for procedure in paper.TABLE3_PROCEDURES:
            setup = paper.setup_of(procedure, model)
            assert setup is not None and 2048 % (2 * setup.gpus) == 0


def test_a_model_that_is_not_in_table_3_has_the_stated_number_and_the_files_resolutions():
    assert paper.setup_of("A1", "resnet26") is None and paper.setup_of("DeiT", "deit_small_patch16_224") is None
    recipe = load("a3", "resnet26").recipe
    assert (recipe.train.virtual_ranks, recipe.augment.resolution, recipe.eval.resolution) == (8, 160, 224)


def test_what_a_user_sets_wins_and_is_modified():
    resolved = load("a1", "efficientnet_b4", "augment.resolution=224", "train.virtual_ranks=8")
    assert resolved.recipe.augment.resolution == 224 and resolved.recipe.eval.resolution == 380
    assert resolved.modified == {"augment.resolution": (380, 224), "train.virtual_ranks": (32, 8)}
    assert load("a1", "resnet50", "model.name=efficientnet_b4").recipe.augment.resolution == 380


def test_a_file_with_a_resolution_of_its_own_keeps_it(here):
    put_recipe(here / "recipes", "mine.toml", ("resolution = 224           # Table 2: train", "resolution = 192 #"))
    resolved = load("mine", "efficientnet_b4")
    assert (resolved.recipe.augment.resolution, resolved.recipe.eval.resolution) == (192, 380)
    assert resolved.modified == {"augment.resolution": (380, 192)}


def test_the_papers_number_is_only_for_its_procedures():
    with pytest.raises(ConfigError, match=r"Table 3, which has a1, a2 and a3 only\. Use a number"):
        load("deit", "deit_small_patch16_224", "train.virtual_ranks=paper")


@pytest.mark.parametrize(
    ("name", "assignments", "number"),
    [
        ("a1", ("model.name=resnet152",), 8),  # Table 3, as it is A1
        ("a1", ("paper=",), 4),  # three copies in different micro-batches
        ("a3", ("paper=",), 4),
        ("a1", ("paper=", "train.global_batch=96", "augment.repeats=1"), 1),
        ("a1", ("paper=", "train.global_batch=1000"), 4),  # 2 would be 500, and too few
        ("a3", ("paper=", "train.global_batch=6", "augment.repeats=4", "schedule.epochs=9"), 1),
    ],
)
def test_a_recipe_that_does_not_say_gets_a_number_that_no_job_can_change(name, assignments, number):
    assert load_recipe(name, "train.virtual_ranks=0", *assignments).train.virtual_ranks == number


def test_a_batch_that_cannot_be_mixed_in_pairs_is_refused():
    with pytest.raises(ConfigError, match="Use an even batch"):
        load_recipe("a3", "train.virtual_ranks=0", "paper=", "train.global_batch=7")


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("train.virtual_ranks=3",), "2048 is not divisible by train.virtual_ranks = 3. Use a batch of"),
        (("train.global_batch=1002",), "Use a batch of 1000 or 1004, or other --virtual-ranks"),
        (("train.virtual_ranks=2048",), "a micro-batch has 1 image (2048 / 2048 virtual ranks), but Mixup and CutMix"),
    ],
)  # fmt: skip
def test_micro_batches_that_are_unequal_or_unpaired_are_refused(assignments, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe("a1", *assignments)
    assert message in str(caught.value)


def test_an_odd_micro_batch_is_fine_without_mixing():
    recipe = load_recipe("a3", "augment.mixup=0", "augment.cutmix=0", "train.virtual_ranks=2048")
    assert recipe.train.virtual_ranks == 2048
