"""Recipes say what the paper says, say where each value comes from, and keep their digest."""

import json
import math
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from rsb_cluster.config import catalog
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import Section, flatten, parse_toml, validate
from rsb_cluster.data.datasets import known_data_sets
from rsb_cluster.errors import ConfigError
from rsb_cluster.results import references
from tests.unit.bundled import FINE_TUNING, OPEN_IN_TABLE_2, PARTLY_OPEN, RECIPES, load_recipe

RECONSTRUCTED = ("a1h", "a2-reg", "t2", *FINE_TUNING)
BUNDLED = ("a1", "a2", "a3", "deit", "digits", "fashion-mnist", *RECONSTRUCTED)


def yes(value: object) -> str:
    return "yes" if value else "no"


def or_no(value: float) -> float | str:
    return value or "no"


def thousands(steps: int) -> str:
    return f"{math.floor(steps / 1000 + 0.5)}k"


def magnitude(recipe: Recipe) -> str:
    """Return timm's rand-m7-mstd0.5-inc1 in the table's notation, 7/0.5."""
    found = re.fullmatch(r"rand-m(\d+)-mstd([\d.]+)-inc1", recipe.augment.rand_augment)
    return f"{found[1]}/{found[2]}" if found else "no"


def has(recipe: Recipe, *words: str) -> str:
    """Say whether the recipe has a field for an ingredient that we do not implement."""
    return yes(any(word in key for key in flatten(recipe) for word in words))


# Table 2 of arXiv:2110.00476, columns DeiT, A1, A2, A3: what it prints, and how that is read off a recipe.
COLUMNS = ("deit", "a1", "a2", "a3")
TABLE_2 = {
    "Train res": (lambda r: r.augment.resolution, (224, 224, 224, 160)),
    "Test res": (lambda r: r.eval.resolution, (224, 224, 224, 224)),
    "Epochs": (lambda r: r.schedule.epochs, (300, 600, 300, 100)),
    "# forward passes": (lambda r: thousands(r.total_steps), ("375k", "375k", "188k", "63k")),
    "Batch size": (lambda r: r.train.global_batch, (1024, 2048, 2048, 2048)),
    "Optimizer": (
        lambda r: {"lamb": "LAMB", "adamw": "AdamW", "sgd": "SGD-M"}[r.optimizer.name],
        ("AdamW", "LAMB", "LAMB", "LAMB"),
    ),
    "LR": (lambda r: r.optimizer.lr, (1e-3, 5e-3, 5e-3, 8e-3)),
    "LR decay": (lambda r: r.schedule.name, ("cosine",) * 4),
    "decay rate": (lambda r: has(r, "decay_rate", "decay_epochs", "gamma"), ("no",) * 4),
    "Weight decay": (lambda r: r.optimizer.weight_decay, (0.05, 0.01, 0.02, 0.02)),
    "Warmup epochs": (lambda r: r.schedule.warmup_epochs, (5, 5, 5, 5)),
    "Label smoothing": (lambda r: or_no(r.loss.smoothing), (0.1, 0.1, "no", "no")),
    "Dropout": (lambda r: or_no(r.model.drop_rate), ("no",) * 4),
    "Stoch. depth": (lambda r: or_no(r.model.drop_path_rate), (0.1, 0.05, 0.05, "no")),
    "Repeated aug": (lambda r: yes(r.augment.repeats > 1), ("yes", "yes", "yes", "no")),
    "Gradient clip": (lambda r: yes(r.optimizer.clip_grad_norm), ("no",) * 4),
    "H. flip": (lambda r: yes(r.augment.hflip == 0.5), ("yes",) * 4),
    "RRC": (lambda r: yes(r.augment.crop_scale == (0.08, 1.0)), ("yes",) * 4),
    "Rand Augment": (magnitude, ("9/0.5", "7/0.5", "7/0.5", "6/0.5")),
    "Auto Augment": (lambda r: yes(not r.augment.rand_augment.startswith("rand-")), ("no",) * 4),
    "Mixup alpha": (lambda r: r.augment.mixup, (0.8, 0.2, 0.1, 0.1)),
    "CutMix alpha": (lambda r: r.augment.cutmix, (1.0, 1.0, 1.0, 1.0)),
    "Erasing prob.": (lambda r: or_no(r.augment.erase_prob), (0.25, "no", "no", "no")),
    "ColorJitter": (lambda r: yes(r.augment.color_jitter), ("no",) * 4),
    "PCA lighting": (lambda r: has(r, "pca", "lighting"), ("no",) * 4),
    "SWA": (lambda r: has(r, "swa"), ("no",) * 4),
    "EMA": (lambda r: yes(r.train.ema_decay), ("no",) * 4),
    "Test crop ratio": (lambda r: r.eval.crop, (0.875, 0.95, 0.95, 0.95)),
    "CE loss": (lambda r: yes(r.loss.name == "ce"), ("yes", "no", "no", "no")),
    "BCE loss": (lambda r: yes(r.loss.name == "bce"), ("no", "yes", "yes", "yes")),
    "Mixed precision": (lambda r: yes(r.train.amp == "fp16"), ("yes",) * 4),
}


@pytest.mark.parametrize("row", TABLE_2)
@pytest.mark.parametrize("name", COLUMNS)
def test_a_recipe_equals_table_2(name, row):
    read, printed = TABLE_2[row]
    assert read(load_recipe(name)) == printed[COLUMNS.index(name)]


@pytest.mark.parametrize(("name", "steps"), [("a1", 375_000), ("a2", 187_500), ("a3", 62_500), ("deit", 375_300)])
def test_the_remainder_of_an_epoch_is_not_a_step(name, steps):
    assert load_recipe(name).total_steps == steps


@pytest.mark.parametrize("name", ["a1", "a2", "a3"])
def test_what_table_2_leaves_open_is_chosen_and_said_to_be_open(name):
    values, notes = flatten(load_recipe(name)), catalog.value_comments(RECIPES / f"{name}.toml")
    assert {key: values[key] for key in OPEN_IN_TABLE_2} == OPEN_IN_TABLE_2
    assert values["loss.targets"] == "paper"
    said_open = {key for key, note in notes.items() if re.search(r"\bopen\b", note)}
    partly = PARTLY_OPEN - ({"augment.repeats"} if name == "a3" else set())
    assert said_open == OPEN_IN_TABLE_2.keys() | partly
    assert {key for key, note in notes.items() if note.startswith("open: ")} == OPEN_IN_TABLE_2.keys() - {
        "augment.crop_scale"
    }


def test_the_deit_recipe_has_the_defaults_of_the_published_code():
    values = flatten(load_recipe("deit"))
    assert {
        "model.name": "deit_small_patch16_224",
        "augment.repeats": 3,
        "augment.rand_augment": "rand-m9-mstd0.5-inc1",
        "augment.interpolation": "bicubic",
        "augment.erase_mode": "pixel",
        "augment.mix_prob": 1.0,
        "augment.mix_switch_prob": 0.5,
        "loss.targets": "soft",
        "optimizer.eps": 1e-8,
        "optimizer.lr": 5e-4 * 1024 / 512,
        "schedule.warmup_lr": 1e-6,
        "schedule.min_lr": 1e-5,
        "schedule.update": "epoch",
        "eval.interpolation": "bicubic",
    }.items() <= values.items()


# DeiT's author on fine-tuning (github.com/facebookresearch/deit/issues, 45 and 105): "else as on ImageNet", that is the
# deit recipe.
SGD_FINE_TUNING = {
    "optimizer.name": "sgd", "optimizer.lr": 0.01, "optimizer.weight_decay": 1e-4, "schedule.epochs": 1000,
    "augment.erase_prob": 0.0, "model.drop_path_rate": 0.0,
}  # fmt: skip
OF_INAT = {
    "optimizer.name": "adamw", "optimizer.lr": 7.5e-5, "optimizer.weight_decay": 0.05, "schedule.epochs": 360,
    "augment.erase_prob": 0.1, "model.drop_path_rate": 0.1,
}  # fmt: skip
OUR_CHOICE = {"train.channels_last", "train.virtual_ranks", "eval.every_epochs"}


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_is_deits_procedure_but_for_what_its_author_says(name):
    values, deit = flatten(load_recipe(name)), flatten(load_recipe("deit"))
    said = (OF_INAT if name == "ft-inat2019" else SGD_FINE_TUNING) | {
        "train.global_batch": 768, "model.name": "resnet50", "init.weights": "resnet50.a1_in1k", "reconstruction": True,
    }  # fmt: skip
    assert {key: values[key] for key in said} == said
    differ = {key for key in values if values[key] != deit[key]} - {"name", "description", "paper"}
    of_data = {"data.set", "data.num_classes", "data.train_samples", "data.val_samples"}
    assert differ - of_data - OUR_CHOICE <= said.keys()


@pytest.mark.parametrize("name", FINE_TUNING)
def test_a_fine_tuning_recipe_is_of_a_data_set_that_shards_make_knows(name):
    data = load_recipe(name).data
    known = known_data_sets()[data.set]
    assert (data.train_samples, data.val_samples) == (known.samples["train"], known.samples["val"])
    assert data.num_classes == known.classes


# What is public of them (facts, 1.2): all else is our guess.
@pytest.mark.parametrize(
    ("name", "base", "public", "top1"),
    [
        (
            "t2",
            "a2",
            {"model.name": "deit_small_patch16_224", "schedule.epochs": 300, "train.global_batch": 2048},
            80.4,
        ),
        ("a2-reg", "a2", {"model.name": "resnet152", "schedule.epochs": 300, "train.global_batch": 2048}, 82.4),
        ("a1h", "a1", {"model.name": "resnet152", "schedule.epochs": 600}, 82.818),
    ],
)
def test_a_reconstruction_keeps_what_is_public_and_says_that_the_rest_is_ours(name, base, public, top1):
    recipe, notes = load_recipe(name), catalog.value_comments(RECIPES / f"{name}.toml")
    values, of_base = flatten(recipe), flatten(load_recipe(base))
    assert {key: values[key] for key in public} == public
    assert recipe.reconstruction
    assert references.lookup(recipe.paper, recipe.model.name).references[0].top1 == top1
    ours = {key for key in values if values[key] != of_base[key]} - public.keys() - {"name", "description", "paper"}
    ours -= {"train.virtual_ranks"}  # Table 3's for another model
    assert {key for key in ours if not re.match(r"ours: |open: ", notes[key])} == {"reconstruction"}
    strength = ("model.drop_rate", "model.drop_path_rate", "augment.mixup")
    assert all(values[key] >= of_base[key] for key in strength)
    assert int(magnitude(recipe).split("/")[0]) > int(magnitude(load_recipe(base)).split("/")[0])


@pytest.mark.parametrize("name", BUNDLED)
def test_only_what_is_not_public_is_a_reconstruction(name):
    assert load_recipe(name).reconstruction == (name in RECONSTRUCTED)
    assert load_recipe(name).paper.lower() in (name, "")


@pytest.mark.parametrize("name", BUNDLED)
def test_every_value_has_a_comment_with_its_source(name):
    notes = catalog.value_comments(RECIPES / f"{name}.toml")
    bare = {key for key, note in notes.items() if len(note) < 5}
    assert bare == set()
    assert notes.keys() == set(_written(RECIPES / f"{name}.toml"))


def _written(path: Path) -> list[str]:
    values = parse_toml(path)
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    return [key for key in values if key not in tables] + [f"{t}.{key}" for t, v in tables.items() for key in v]


@pytest.mark.parametrize("name", BUNDLED)
def test_no_recipe_hides_a_value_behind_a_default(name):
    recipe = load_recipe(name)
    assert set(flatten(recipe)) == set(_written(RECIPES / f"{name}.toml"))


def test_every_bundled_recipe_is_tested_here():
    assert sorted(path.stem for path in RECIPES.glob("*.toml")) == sorted(BUNDLED)


# --- values that make no sense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1e-3", "0", "0.0", "-1", "1e400"])
def test_a_learning_rate_is_a_positive_number(text):
    with pytest.raises(ConfigError, match=r"a1\.toml with --set: optimizer\.lr = "):
        load_recipe("a1", f"optimizer.lr={text}")


@pytest.mark.parametrize(
    "assignment",
    [
        "optimizer.weight_decay=-0.1", "optimizer.weight_decay=nan", "optimizer.betas=[0.9, 1.1]", "optimizer.eps=0",
        "model.drop_path_rate=1.5", "model.drop_rate=-0.1", "data.num_classes=0", "data.train_samples=-1",
        "data.max_bad_samples=-1", "augment.resolution=0", "augment.crop_scale=[0.1, 2]", "augment.crop_ratio=[0, 1]",
        "augment.hflip=1.1", "augment.mixup=-1", "augment.cutmix=inf", "augment.repeats=0", "augment.mix_prob=2",
        "loss.smoothing=1", "loss.smoothing=-0.1", "loss.target_threshold=2", "schedule.epochs=0",
        "schedule.warmup_epochs=-1", "schedule.min_lr=-1", "train.global_batch=0", "train.virtual_ranks=-1",
        "train.ema_decay=1", "train.amp=fp8", "eval.crop=0", "eval.crop=1.01", "eval.every_epochs=0",
        "data.mean=[0.5, 0.5]", "data.mean=[0.5, 0.5, nan]", "paper=A4", "schedule.name=step",
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_and_named(assignment):
    key = assignment.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"a1\.toml with --set: .*{re.escape(key)}"):
        load_recipe("a1", assignment)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["loss.name=ce"], "loss.targets = 'paper' is for BCE; cross-entropy takes 'soft'"),
        (
            ["loss.targets=soft", "loss.target_threshold=0.2"],
            "loss.target_threshold has no effect unless loss.targets = 'paper' or 'timm'",
        ),
        (["loss.targets=deit"], "makes every class a positive"),
        (["data.train_samples=2047"], "data.train_samples = 2047 is less than one global batch"),
        (["schedule.epochs=5"], "schedule.warmup_epochs = 5 leaves nothing of schedule.epochs = 5"),
        (["train.global_batch=2"], "train.global_batch is smaller than augment.repeats"),
        (
            ["data.classes=a,b", "data.num_classes=1000"],
            "data.classes names 2 classes, and data.num_classes = 1000. Use --set data.num_classes=2",
        ),
        (['data.classes=["a","a"]'], "data.classes names a class twice"),
        (["data.classes=./none.txt"], "there is no file none.txt"),
        (["augment.crop_scale=[1.0, 0.08]"], "augment.crop_scale = (1.0, 0.08): the first is above the second"),
        (["augment.crop_ratio=[2, 1]"], "augment.crop_ratio = (2.0, 1.0): the first is above the second"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(assignments, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe("a1", *assignments)
    assert message in str(caught.value)


# --- the digest -----------------------------------------------------------------------------------------------------


def _other(annotation: Any, value: Any) -> Any:
    """Return another value of a field's type."""
    if get_origin(annotation) is Literal:
        return next(choice for choice in get_args(annotation) if choice != value)
    if isinstance(value, bool):
        return not value
    if value == ():
        return ("cat",)
    if isinstance(value, tuple):
        return (*value[:-1], value[-1] / 2)
    if isinstance(value, dict):
        return {"img_size": 64}
    if isinstance(value, str):
        return value + "x"
    return value + 1 if isinstance(value, int) else value / 2 or 0.125


def _fields() -> list[str]:
    # Of schedules there is but one. Where initial weights lie is no science; their SHA-256 is.
    without = ("name", "description", "paper", "reconstruction", "schedule.name", "init.weights")
    return [key for key in flatten(load_recipe("a1")) if key not in without]


@pytest.mark.parametrize("recipe", [load_recipe("a1"), load_recipe("digits")], ids=["a1", "digits"])
@pytest.mark.parametrize("key", _fields())
def test_any_field_of_the_science_changes_the_digest(recipe, key):
    section, name = key.split(".")
    table: Section = getattr(recipe, section)
    value = _other(type(table).model_fields[name].annotation, getattr(table, name))
    changed = recipe.model_copy(update={section: table.model_copy(update={name: value})})
    assert changed.digest(0, "d") != recipe.digest(0, "d")


def test_seed_and_data_change_the_digest():
    recipe = load_recipe("a1")
    assert len({recipe.digest(0, "d"), recipe.digest(1, "d"), recipe.digest(0, "e"), recipe.digest(10, "")}) == 4
    assert re.fullmatch("[0-9a-f]{8}", recipe.digest(0, "d"))


def test_the_weights_that_a_run_starts_from_change_the_digest_and_not_where_they_lie():
    here, there = load_recipe("a1", "init.weights=here.pth"), load_recipe("a1", "init.weights=s3://b/there.pth")
    assert here.digest(0, "d", "sha") == there.digest(0, "d", "sha")
    assert len({load_recipe("a1").digest(0, "d"), here.digest(0, "d", "sha"), here.digest(0, "d", "other")}) == 3


def test_a_file_of_classes_is_its_names_and_no_classes_are_no_other_run(tmp_path):
    (tmp_path / "some.txt").write_text("dog\n\n cat \n")
    two = "data.num_classes=2"
    read, listed = (load_recipe("a1", two, f"data.classes={value}") for value in (tmp_path / "some.txt", "dog, cat"))
    assert read.data.classes == listed.data.classes == ("dog", "cat")
    assert load_recipe("a1", two, "data.classes=[]").digest(0, "d") == load_recipe("a1", two).digest(0, "d")
    other = load_recipe("a1", two, "data.classes=cat,dog")
    assert len({recipe.digest(0, "d") for recipe in (read, other, load_recipe("a1", two))}) == 3
    assert read.digest(0, "d") == listed.digest(0, "d")


def test_names_do_not_change_the_digest():
    other = load_recipe(
        "a1", "name=mine", "description=of my own", "paper=", "reconstruction=true", "train.virtual_ranks=4"
    )
    assert other.digest(0, "d") == load_recipe("a1").digest(0, "d")


def test_a_value_written_as_its_default_is_no_other_science():
    """So a later version may add a field, and what was begun before it goes on."""
    values = parse_toml(RECIPES / "a1.toml")
    recipe = validate(Recipe, values, "a1")
    left_out = 0
    for section, table in list(values.items()):
        for key in list(table) if isinstance(table, dict) else []:
            field = type(getattr(recipe, section)).model_fields[key]
            if not field.is_required() and field.default == getattr(getattr(recipe, section), key):
                del table[key]
                left_out += 1
    assert left_out > 15
    assert validate(Recipe, values, "a1").digest(0, "d") == recipe.digest(0, "d")


def test_the_digest_survives_being_written_and_read_and_the_spelling_of_numbers():
    recipe = load_recipe("a1", "optimizer.lr=1", "model.kwargs.b=1", "model.kwargs.a=2")
    again = validate(Recipe, json.loads(recipe.model_dump_json()), "again")
    assert again == recipe
    assert again.digest(3, "d") == recipe.digest(3, "d")
    other = load_recipe("a1", "optimizer.lr=1.0", "model.kwargs.a=2", "model.kwargs.b=1")
    assert other.digest(3, "d") == recipe.digest(3, "d")


def test_the_digest_of_a1_stays_what_it_was():
    """Runs that people have begun are found by it: a change here makes each of them a stranger."""
    assert load_recipe("a1").digest(0, "train+val", draws=2) == "c605f6cb"
    assert load_recipe("a1").digest(0, "train+val", draws=3) != "c605f6cb"


def test_the_digests_of_earlier_versions_stay_what_they_were():
    """Of version 1 of the draws: with the number of virtual ranks in the recipe, and with the job's choice."""
    assert load_recipe("a1").earlier_digests(0, "train+val", "", draws=2) == ["2f501fc4", "2df9ebd6"]
    assert load_recipe("a1").earlier_digests(0, "train+val", "", draws=1) == []
