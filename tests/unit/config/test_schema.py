"""Mistakes in a file or in --set are named with file and key, all at once."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rsb_cluster.config import catalog
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import override, parse_overrides, read_record
from rsb_cluster.errors import ConfigError, NewerVersionError
from rsb_cluster.runs.run import Attempt
from tests.unit.bundled import RECIPES, load_recipe


def edited(tmp_path: Path, old: str, new: str, name: str = "a1") -> Path:
    text = (RECIPES / f"{name}.toml").read_text()
    assert text.count(old) == 1
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[optimizer]", "[optimiser]", "unknown key 'optimiser'. Did you mean 'optimizer'?"),
        ("hflip =", "hflipp =", "unknown key 'augment.hflipp'. Did you mean 'augment.hflip'?"),
        ("lr = 5e-3 ", "learning_rate = 5e-3 ", "'optimizer.lr' is missing."),
        ("lr = 5e-3 ", 'lr = "fast" ', "optimizer.lr = 'fast': must be a number > 0"),
        ("lr = 5e-3 ", "lr = true ", "optimizer.lr = True: must be a number > 0"),
        ("epochs = 600 ", "epochs = true ", "schedule.epochs = True: must be an integer > 0"),
        ("epochs = 600 ", "epochs = 600.5 ", "schedule.epochs = 600.5: must be an integer > 0"),
        ("epochs = 600 ", "epochs = 1979-05-27 ", "schedule.epochs = datetime.date(1979, 5, 27): must be an"),
        ('name = "lamb"', 'name = "lars"', "optimizer.name = 'lars': must be 'lamb', 'adamw' or 'sgd'"),
        ("betas = [0.9, 0.999]", "betas = [0.9]", "optimizer.betas = [0.9]: must be a list such as [0.9, 0.999]."),
        ("hflip = 0.5", "hflip = [0.5]", "augment.hflip = [0.5]: must be a number ≥ 0 and ≤ 1."),
        ("[loss]\n", "[loss]\nx = {y = 1}\n", "unknown key 'loss.x'"),
        ('name = "a1"', 'name = "A 1"', "name = 'A 1': string should match pattern"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_file_and_key(tmp_path, old, new, message):
    path = edited(tmp_path, old, new)
    with pytest.raises(ConfigError) as caught:
        catalog.load_recipe(str(path))
    assert f"{path}: {message}" in str(caught.value)


def test_all_mistakes_are_named_at_once(tmp_path):
    path = edited(tmp_path, "hflip = 0.5", "hflip = 5\nh_flip = 1")
    with pytest.raises(ConfigError) as caught:
        catalog.load_recipe(str(path))
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        "augment.hflip = 5", "unknown key 'augment.h_flip'. Did you mean 'augment.hflip'?",
    ]  # fmt: skip


def test_a_syntax_error_names_file_and_line(tmp_path):
    path = edited(tmp_path, "hflip = 0.5 ", "hflip 0.5 ")
    line = path.read_text().splitlines().index(next(x for x in path.read_text().splitlines() if "hflip 0.5" in x)) + 1
    with pytest.raises(ConfigError, match=f"mine.toml is not valid TOML: .*line {line}, column"):
        catalog.load_recipe(str(path))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigError, match=r"mine\.toml: line 1 is not UTF-8"):
        catalog.load_recipe(str(path))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4e-3", 4e-3), ("1_000", 1000), ("true", True), ("[1, 2]", [1, 2]), ("{a = 1}", {"a": 1}), ('"4e-3"', "4e-3"),
        ("'x'", "x"), ("rand-m7-mstd0.5-inc1", "rand-m7-mstd0.5-inc1"), ("", ""), ("a=b", "a=b"), ("a b", "a b"),
        ("s3://b/x?y#z", "s3://b/x?y#z"), ("é", "é"), (".5", ".5"),
    ],
)  # fmt: skip
def test_set_reads_toml_and_else_a_plain_string(text, value):
    before = {"a": {"b": 0, "c": 1}}
    assert override(before, parse_overrides([f"a.b={text}"])) == {"a": {"b": value, "c": 1}}
    assert before == {"a": {"b": 0, "c": 1}}


def test_set_makes_tables_and_the_last_one_wins():
    assert override({}, parse_overrides(["a.b.c=1", "a.b.d=2", "a.b.c=3"])) == {"a": {"b": {"c": 3, "d": 2}}}


@pytest.mark.parametrize("bad", ["optimizer.lr", "=1", " =1", "", "optimizer.lr:4e-3"])
def test_set_without_key_and_value_is_refused(bad):
    with pytest.raises(ConfigError, match=re.escape(f"--set {bad!r} is not of the form key=value")):
        load_recipe("a1", bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("name.x=1", "'name' is a value, not a table"),
        ("optimizer.lr.x=1", "'lr' is a value, not a table"),
        ("optimizer=adamw", "optimizer = 'adamw': must be a table: [optimizer], or optimizer.KEY"),
        ("optimizer.l=1", "unknown key 'optimizer.l'. Did you mean 'optimizer.lr'?"),
        ("learning_rate=1", "unknown key 'learning_rate'. Did you mean 'optimizer.lr'?"),
        ("optimizer.learning_rate=1", "unknown key 'optimizer.learning_rate'. Did you mean 'optimizer.lr'?"),
        ("hflip=1", "unknown key 'hflip'. Did you mean 'augment.hflip'?"),
        ("resolution=1", "unknown key 'resolution'. Did you mean 'augment.resolution' or 'eval.resolution'?"),
        ("data.max_bad_samples=-1", "data.max_bad_samples = -1: must be an integer ≥ 0."),
        ("optimizer.betas=[0.9, 2]", "optimizer.betas.1 = 2: must be ≤ 1."),
        ("data.mean=[1, 2]", "data.mean = [1, 2]: must be a list such as [0.485, 0.456, 0.406]."),
        (
            "train.compile=maybe",
            "train.compile = 'maybe': must be true or false, or 'max-autotune' or 'reduce-overhead'.",
        ),
        ("model.kwargs=3", "model.kwargs = 3: must be a table of names and values."),
        ("optimiser.lr=1", "unknown key 'optimiser'. Did you mean 'optimizer'?"),
        ("data.trian_samples=1", "unknown key 'data.trian_samples'. Did you mean 'data.train_samples'?"),
        ("optimizer..lr=1", "unknown key 'optimizer.'"),
    ],
)
def test_a_mistake_in_set_is_explained(bad, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe("a1", bad)
    assert message in str(caught.value)


def nested(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    values = load_recipe("a1").model_dump(mode="json")
    change(values)
    return values


@pytest.mark.parametrize(
    ("change", "unknown"),
    [
        (lambda v: v.update(later=1), "later"),
        (lambda v: v["augment"].update(later=1), "augment.later"),
        (lambda v: v["optimizer"].update(name="muon"), "optimizer.name"),
        (lambda v: v.update(later=1, name="A 1"), "later"),
    ],
)
@pytest.mark.parametrize("form", [dict, lambda values: json.dumps(values).encode()], ids=["values", "bytes"])
def test_a_record_that_says_what_is_not_known_was_written_by_a_newer_version(form, change, unknown):
    with pytest.raises(NewerVersionError) as caught:
        read_record(Recipe, form(nested(change)), "runs/x/recipe.json")
    message = f"runs/x/recipe.json was written by a newer version of rsb-cluster: '{unknown}' in it is not known to "
    assert str(caught.value).startswith(message) and "pip install --upgrade rsb-cluster" in str(caught.value)
    assert "unknown key" not in str(caught.value)


def test_a_record_that_lacks_something_is_damaged_and_not_newer():
    with pytest.raises(ConfigError, match=r"recipe\.json: 'augment' is missing"):
        read_record(Recipe, nested(lambda v: v.pop("augment")), "recipe.json")
    with pytest.raises(ConfigError, match=r"recipe\.json: "):
        read_record(Recipe, b"{", "recipe.json")
    with pytest.raises(ConfigError) as caught:
        read_record(Recipe, None, "recipe.json")
    assert str(caught.value).startswith("recipe.json is no JSON object.\nWas it cut off, or edited by hand?")


def test_of_a_value_that_a_newer_version_added_the_field_is_named():
    record = {"number": 1, "job_id": "1", "world_size": 1, "hosts": ["h"], "started": 0.0, "start_step": 0}
    with pytest.raises(NewerVersionError, match="version of rsb-cluster: 'cause' in it is not known to "):
        read_record(Attempt, record | {"cause": "paused"}, "0001.json")
    with pytest.raises(ConfigError, match="cause"):
        read_record(Attempt, record | {"cause": 5}, "0001.json")
