"""Recipes and jobs are found where the user would look, and a changed recipe is known for one."""

from __future__ import annotations

import os

import pytest

from rsb_cluster.config import catalog
from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.errors import ConfigError
from tests.unit.bundled import RECIPES, put_recipe


def test_the_first_of_the_four_places_wins(here, tmp_path, monkeypatch):
    team, other = tmp_path / "team", tmp_path / "other"
    monkeypatch.setenv("RSB_CLUSTER_PATH", f"{team}{os.pathsep}{os.pathsep}{other}")
    assert catalog.find("recipes", "a1") == RECIPES / "a1.toml"
    last = put_recipe(other / "recipes", "a1.toml")
    assert catalog.find("recipes", "a1") == last
    earlier = put_recipe(team / "recipes", "a1.toml")
    assert catalog.find("recipes", "a1") == earlier
    mine = put_recipe(here / "recipes", "a1.toml")
    assert catalog.find("recipes", "a1") == mine
    path = put_recipe(here, "a1.toml")
    assert catalog.find("recipes", "a1") == mine
    assert catalog.find("recipes", "./a1.toml").resolve() == path
    assert catalog.find("recipes", "a1.toml").resolve() == path
    assert catalog.find("recipes", str(last)) == last


def test_recipes_and_jobs_do_not_mix(here):
    put_recipe(here / "jobs", "mine.toml")
    put_recipe(here / "recipes", "yours.toml")
    assert "mine" in catalog.available("jobs") and "mine" not in catalog.available("recipes")
    assert "yours" in catalog.available("recipes") and "yours" not in catalog.available("jobs")


def test_a_path_in_the_home_folder_is_expanded(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    put_recipe(here / "x", "mine.toml")
    assert catalog.find("recipes", "~/x/mine.toml") == here / "x" / "mine.toml"


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("recipes", "diet", "there is no recipe 'diet'. Did you mean 'deit'? Known: a1, a1h, a2"),
        ("recipes", "zzz", "there is no recipe 'zzz'. Known: a1, a1h, a2, a2-reg, a3, deit, digits,"),
        ("jobs", "slrum", "there is no job 'slrum'. Did you mean 'slurm'? Known: cloud, cloud-aws-spot,"),
        ("jobs", "", "there is no job ''. Known: cloud, cloud-aws-spot"),
        ("recipes", "x/a1", "there is no file x/a1."),
        ("recipes", "mine.toml", "there is no file mine.toml."),
        ("recipes", "recipes/", "there is no file recipes."),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(here, kind, name, message):
    with pytest.raises(ConfigError) as caught:
        catalog.find(kind, name)
    assert str(caught.value).startswith(message)


# --- modified -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a1", "a2", "a3", "deit", "digits", "fashion-mnist"])
def test_a_bundled_recipe_is_not_modified(name):
    assert catalog.load_recipe(name).modified == {}


def test_set_modifies_with_both_values():
    assert catalog.load_recipe("a1", overrides=parse_overrides(["optimizer.lr=4e-3"])).modified == {
        "optimizer.lr": (5e-3, 4e-3)
    }
    assert catalog.load_recipe("a1", overrides=parse_overrides(["optimizer.lr=5e-3"])).modified == {}
    assert catalog.load_recipe("digits", overrides=parse_overrides(["schedule.epochs=3"])).modified == {
        "schedule.epochs": (25, 3)
    }


def test_the_model_and_what_only_changes_the_speed_are_no_modification():
    overrides = parse_overrides(["train.channels_last=false", "train.compile=true", "name=x"])
    resolved = catalog.load_recipe("a1", model="resnet18", overrides=overrides)
    assert resolved.modified == {}
    assert resolved.recipe.model.name == "resnet18"
    assert resolved.recipe.train.virtual_ranks == 2


def test_other_virtual_ranks_are_a_modification():
    overrides = parse_overrides(["train.virtual_ranks=32"])
    assert catalog.load_recipe("a1", overrides=overrides).modified == {"train.virtual_ranks": (4, 32)}
    assert catalog.load_recipe("digits", overrides=overrides).modified == {"train.virtual_ranks": (4, 32)}


def test_a_record_of_an_earlier_version_has_no_virtual_ranks_to_compare():
    now = catalog.load_recipe("a1").recipe
    before = now.model_copy(update={"train": now.train.model_copy(update={"virtual_ranks": 0})})
    assert catalog.differences(before, now) == {} == catalog.differences(now, before)


@pytest.mark.parametrize("model", ["resnet50.a1_in1k", "hf_hub:timm/x", 'a"b', "1e3", "a b"])
def test_a_models_name_is_taken_as_it_is(model):
    assert catalog.load_recipe("a1", model=model).recipe.model.name == model


def test_a_users_copy_with_another_rate_is_a_modified_a1(here):
    put_recipe(here / "recipes", "mine.toml", ("lr = 5e-3 ", "lr = 1e-3 "), ('name = "a1"', 'name = "mine"'))
    resolved = catalog.load_recipe("mine", overrides=parse_overrides(["schedule.epochs=300"]))
    assert resolved.modified == {"optimizer.lr": (5e-3, 1e-3), "schedule.epochs": (600, 300)}
    assert resolved.recipe.name == "mine"


def test_a_users_a1_in_place_of_the_bundled_one_is_compared_with_the_bundled_one(here):
    put_recipe(here / "recipes", "a1.toml", ("lr = 5e-3 ", "lr = 1e-3 "))
    assert catalog.load_recipe("a1").modified == {"optimizer.lr": (5e-3, 1e-3)}


def test_a_copy_that_does_not_claim_the_paper_is_compared_with_its_own_file(here):
    changes = (
        ("lr = 5e-3 ", "lr = 1e-3 "),
        ('paper = "A1"', 'paper = ""'),
        ('virtual_ranks = "paper"', "virtual_ranks = 4"),
    )
    put_recipe(here / "recipes", "mine.toml", *changes)
    assert catalog.load_recipe("mine").modified == {}
    assert catalog.load_recipe("mine", overrides=parse_overrides(["optimizer.lr=2e-3"])).modified == {
        "optimizer.lr": (1e-3, 2e-3)
    }


def test_a_copy_that_claims_another_procedure_is_compared_with_that_one(here):
    put_recipe(here / "recipes", "mine.toml", ('paper = "A1"', 'paper = "A2"'))
    assert catalog.load_recipe("mine").modified.keys() == {
        "augment.mixup", "loss.smoothing", "optimizer.weight_decay", "schedule.epochs",
    }  # fmt: skip


# --- jobs, notes ------------------------------------------------------------------------------------------------------


def test_a_job_takes_assignments(here):
    job, path = catalog.load_job(
        "slurm", overrides=parse_overrides(["nodes=4", "slurm.partition=gpu", "checkpoint.keep=3"])
    )
    assert (job.nodes, job.slurm, job.checkpoint.keep) == (4, {"partition": "gpu"}, 3)
    assert path == catalog.bundled_dir("jobs") / "slurm.toml"
    with pytest.raises(ConfigError, match=r"slurm\.toml: unknown key 'node'\. Did you mean 'nodes'\?"):
        catalog.load_job("slurm", overrides=parse_overrides(["node=4"]))


def test_notes_are_the_comments_behind_values(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(
        '# top\na = 1 # one\nb = "#no" #two\nc = 2\n[t] # table\nd = {x = 1} # in "line"\n[t.u]\ne = [1]# é\n'
    )
    assert catalog.value_comments(path) == {"a": "one", "b": "two", "c": "", "t.d": 'in "line"', "t.u.e": "é"}


def test_a_procedure_from_other_weights_is_modified_unless_it_is_fine_tuning() -> None:
    assert load_recipe("a1", overrides=parse_overrides(['init.weights="w.pth"'])).modified == {
        "init.weights": ("", "w.pth")
    }
    assert load_recipe("ft-cars", overrides=parse_overrides(['init.weights="w.pth"'])).modified == {}
