"""A recipe with other data than its own: what is filled in, what is refused, and what is said not to fit."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.config.sweep_file import expand
from rsb_cluster.data.index import load_index
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.data_location import DataLocation
from rsb_cluster.submission.own_data import doubts, filled, fit_to_data, imbalance
from rsb_cluster.submission.plan_runs import plan_runs
from tests.unit.bundled import load_job
from tests.unit.own_pictures import shards_of_pictures
from tests.unit.sweeps import file

COUNTS = {"data.set": "photos", "data.num_classes": 3, "data.train_samples": 100, "data.val_samples": 12}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return shards_of_pictures(tmp_path_factory.mktemp("own"))


def at(folder: Path) -> DataLocation:
    return DataLocation(str(folder), load_index(Store(folder / "train")), load_index(Store(folder / "val")))


def fitted(recipe: str, folder: Path, *changes: str, stats: bool = False):
    resolved = load_recipe(recipe, overrides=parse_overrides(changes))
    after = fit_to_data(resolved, at(folder), stats=stats)
    return filled(resolved.recipe, after.recipe), after


def test_the_index_fills_in_what_it_knows_and_a_batch_that_the_data_fill(photos):
    changes, after = fitted("a3", photos)
    assert changes == COUNTS | {"train.global_batch": 16}
    assert after.modified.keys() == changes.keys()
    assert after.modified["data.num_classes"] == (1000, 3)


def test_what_the_user_gives_is_left_alone(photos):
    changes, after = fitted("a3", photos, "data.num_classes=5", "train.global_batch=32")
    assert changes == {key: value for key, value in COUNTS.items() if key != "data.num_classes"}
    assert (after.recipe.data.num_classes, after.recipe.train.global_batch) == (5, 32)
    with pytest.raises(ConfigError, match=r"--set data\.train_samples=100"):
        at(photos).check(fitted("a3", photos, "data.train_samples=90", "train.global_batch=32")[1].recipe)


def test_shards_that_are_missing_from_a_recipes_own_set_are_refused_and_not_filled_in(digits, photos, tmp_path):
    """By the set's recorded name, by its folder's, or as all but one number is that of the recipe."""
    assert fitted("digits", digits, "train.global_batch=8")[0] == {}
    for folder, changes in (
        (digits, ["data.train_samples=1500"]),  # recorded by 'shards make'
        (photos, ["data.set=photos", "data.train_samples=64", "train.global_batch=8"]),
        (photos, ["data.set=other", "data.num_classes=3", "data.train_samples=64", "data.val_samples=12",
                  "train.global_batch=8"]),
    ):  # fmt: skip
        given = tmp_path / "given.toml"
        resolved = load_recipe("digits", overrides=parse_overrides(changes))
        shutil.copyfile(resolved.path, given)  # values of a file, which the user did not give on the command line
        written = resolved.__class__(resolved.recipe, given, resolved.original)
        after = fit_to_data(written, at(folder))
        assert filled(resolved.recipe, after.recipe) == {}
        with pytest.raises(ConfigError, match="samples, but the recipe has"):
            at(folder).check(after.recipe)


def test_mean_and_std_are_measured_where_they_are_asked_for(photos):
    changes, after = fitted("a3", photos, stats=True)
    assert changes.keys() == {*COUNTS, "train.global_batch", "data.mean", "data.std"}
    assert np.allclose(after.recipe.data.mean, 0.5, atol=0.05)  # the pictures are noise
    assert fitted("a3", photos, "data.std=[1, 1, 1]", stats=True)[1].recipe.data.std == (1, 1, 1)


def test_a_plan_says_what_it_filled_in_and_the_runs_id_is_that_of_the_same_values_given(photos, tmp_path):
    runs, notes = plan_runs(expand(file(grid=[{"recipes": ["a3"]}]), job="local"), str(tmp_path), str(photos),
                            dry_run=False)  # fmt: skip
    (said,) = [note for note in notes if note.startswith("from ")]
    assert said == f"from {photos} (modified): " + ", ".join(f"{k} = {v}" for k, v in
                                                            (COUNTS | {"train.global_batch": 16}).items())  # fmt: skip
    given = parse_overrides([f"{key}={value}" for key, value in (COUNTS | {"train.global_batch": 16}).items()])
    points = expand(file(grid=[{"recipes": ["a3"]}]), job="local", recipe_overrides=given)
    same, quiet = plan_runs(points, str(tmp_path), str(photos), dry_run=False)
    assert [p.run.run_id for p in same] == [p.run.run_id for p in runs]
    assert not [note for note in quiet if note.startswith("from ")]


@pytest.mark.parametrize(
    ("recipe", "job", "changes", "said"),
    [
        ("a3", "local", (), "optimizer.lr = 0.008 is for a batch of 2,048, and this one has 16. Scaled by the square"),
        ("a3", "local", (), "train.amp = fp16 is slow on CPUs"),
        ("a1", "slurm", (), "600 epochs of 100 images from random weights mostly repeat them."),
        ("a3", "local", (), "most pictures are smaller than the crop of 224 px: the shorter sides of 64 are 24 px"),
        ("a3", "local", (), "classes are imbalanced: 3, 4 (owl) to 60 (cat) images each (15 times)."),
        ("a3", "local", ("data.num_classes=9",), "data.num_classes = 9, and the data have 3: the other outputs are"),
    ],
)
def test_what_does_not_fit_is_said(photos, recipe, job, changes, said):
    found = doubts(fitted(recipe, photos, *changes)[1], load_job(job), at(photos))
    assert [doubt for doubt in found if doubt.startswith(said)], found


def test_nothing_is_said_of_what_fits(photos, digits):
    changes = ("optimizer.lr=1e-3", "schedule.epochs=20", "augment.resolution=24", "eval.resolution=24")
    found = doubts(fitted("a3", photos, *changes)[1], load_job("slurm"), at(photos))
    assert [doubt.partition(":")[0] for doubt in found] == ["classes are imbalanced"]
    assert doubts(load_recipe("digits"), load_job("local"), at(digits)) == []
    assert imbalance(at(digits).train) == ""


def test_two_commands_train_on_a_folder_of_pictures(rsb, photos):
    """'shards make' ends with the second of them."""
    pictures = photos.parent / "pictures"
    made = rsb.run("shards", "make", str(pictures), "data/photos")
    *_, last = made.stderr.splitlines()
    assert last == "train on it: rsb-cluster submit --recipe a3 --data data/photos"
    done = rsb.run(*last.split()[4:], "--job", "local", "--model", "test_resnet", "--dry-run")
    lines = dict(line.split("  ", 1) for line in done.stdout.split("\n\n")[0].splitlines() if "  " in line.strip())
    assert lines["steps"].strip() == "600 (100 epochs of 6), 4 images dropped each epoch"
    assert lines["classes"].strip() == "3, 4 (owl) to 60 (cat) images each"
    only = rsb.run("shards", "make", str(pictures), "data/half", "--split", "train").stderr
    assert only.endswith("make its val/, too: rsb-cluster shards make SOURCE data/half --split val\n")


def test_a_copied_recipe_has_the_values_of_the_data_and_says_what_they_were(rsb, photos):
    said = rsb.run("recipes", "copy", "a3", "mine.toml", "--data", str(photos)).stderr
    assert "  data.num_classes = 3\n" in said
    assert said.endswith(f"train on it: rsb-cluster submit --recipe mine.toml --data {photos}\n")
    text = (rsb.cwd / "mine.toml").read_text()
    assert f"num_classes = 3  # from {photos}; was 1000\n" in text and "lr = 8e-3                  # Table 2" in text
    shown = rsb.json("recipes", "show", "./mine.toml", "--json")
    assert (shown["name"], shown["data"]["train_samples"], shown["train"]["global_batch"]) == ("mine", 100, 16)
    assert "--stats needs --data." in rsb.error("recipes", "copy", "a3", "other.toml", "--stats")


def test_chosen_classes_are_counted_and_their_images_too(rsb, digits):
    options = ("--data", str(digits), "--job", "local", "--model", "test_resnet", "--dry-run", "--json")
    plan = rsb.json("submit", "--recipe", "digits", "--set", "data.classes=3,8", *options)
    shown = plan["recipe"]["data"]
    assert (shown["classes"], shown["num_classes"], shown["set"]) == (["3", "8"], 2, "digits")
    assert (shown["train_samples"], shown["val_samples"]) == (286, 71)


def test_one_class_is_nothing_to_learn(photos):
    resolved = load_recipe("a3", overrides=parse_overrides(["data.classes=cat"]))
    resolved = fit_to_data(resolved, one := at(photos).choose(("cat",)))
    assert any("all images are of one class (cat)" in doubt for doubt in doubts(resolved, load_job("local"), one))
    assert not any("one class" in doubt for doubt in doubts(resolved, load_job("local"), at(photos)))
