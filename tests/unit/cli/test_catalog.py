"""Listing, showing, comparing and copying recipes and jobs."""

import json
import shutil

import pytest
from click.testing import CliRunner

from rsb_cluster.cli import main
from rsb_cluster.config import catalog
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import flatten, validate
from tests.unit.bundled import OPEN_IN_TABLE_2, PARTLY_OPEN, RECIPES, load_job, load_recipe, put_recipe


def run(*args: str, code: int = 0) -> tuple[str, str]:
    done = CliRunner().invoke(main, args)
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


@pytest.mark.parametrize("name", ["a1", "a2", "a3"])
def test_show_marks_what_the_paper_leaves_open(name):
    shown, _ = run("recipes", "show", name)
    marked = {line.split()[0] for line in shown.splitlines() if "open in the paper" in line}
    assert marked == OPEN_IN_TABLE_2.keys() | (PARTLY_OPEN - ({"augment.repeats"} if name == "a3" else set()))
    assert f"optimizer.lr {load_recipe(name).optimizer.lr} Table 2" in " ".join(shown.split())


def test_show_marks_what_was_changed():
    shown, _ = run("recipes", "show", "a1", "--set", "optimizer.lr=4e-3", "--model", "resnet18")
    lines = [" ".join(line.split()) for line in shown.splitlines() if "modified" in line]
    assert lines == [
        "model.name \"resnet18\" modified, in the file 'resnet50'",
        "optimizer.lr 0.004 modified, in the file 0.005",
    ]


def test_show_prints_json_that_is_the_recipe_again():
    shown, _ = run("recipes", "show", "a1", "--set", "optimizer.lr=4e-3", "--json")
    assert validate(Recipe, json.loads(shown), "shown") == load_recipe("a1", "optimizer.lr=4e-3")


def test_diff_of_a1_and_a2_prints_just_what_differs():
    shown, _ = run("recipes", "diff", "a1", "a2")
    header, *rows = [line.split() for line in shown.splitlines()]
    assert header == ["field", "a1", "a2"]
    assert rows == [
        ["augment.mixup", "0.2", "0.1"],
        ["loss.smoothing", "0.1", "0.0"],
        ["optimizer.weight_decay", "0.01", "0.02"],
        ["schedule.epochs", "600", "300"],
    ]
    assert json.loads(run("recipes", "diff", "a1", "a2", "--json")[0]) == {
        "augment.mixup": [0.2, 0.1],
        "loss.smoothing": [0.1, 0.0],
        "optimizer.weight_decay": [0.01, 0.02],
        "schedule.epochs": [600, 300],
    }
    assert json.loads(run("recipes", "diff", "a2", "a2", "--json")[0]) == {}


def test_list_names_each_recipe_once_with_its_file(here):
    put_recipe(here / "recipes", "a1.toml", ("description =", 'description = "a [b] of :smile:" #'))
    shown = CliRunner().invoke(main, ["recipes", "list"]).stdout
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in shown.splitlines()}
    assert rows.keys() - {"name"} == {path.stem for path in RECIPES.glob("*.toml")}
    assert rows["a1"] == f"a [b] of :smile: {here}/recipes/a1.toml"
    assert rows["a2"].endswith(f"{RECIPES}/a2.toml")


def test_list_shows_a_broken_file_and_all_others(here):
    (here / "recipes").mkdir()
    (here / "recipes" / "broken.toml").write_text("a = = 1")
    done = CliRunner().invoke(main, ["recipes", "list"])
    assert done.exit_code == 0
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "is not valid TOML" in rows["broken"] and "a1" in rows


def test_a_folder_whose_name_looks_like_markup_is_shown_as_it_is(tmp_path, monkeypatch):
    folder = tmp_path / "[red]x[" / "y]"
    put_recipe(folder / "recipes", "mine.toml", ("Table 1: the reference", "Table 1 [bold]: the reference"))
    monkeypatch.chdir(folder)
    assert f"{folder}/recipes/mine.toml" in CliRunner().invoke(main, ["recipes", "list"]).stdout
    assert "Table 1 [bold]: the reference" in CliRunner().invoke(main, ["recipes", "show", "mine"]).stdout


@pytest.mark.parametrize(("kind", "name"), [("recipes", "a1"), ("jobs", "slurm")])
def test_copy_makes_a_file_that_works_and_never_overwrites(here, kind, name):
    def run(*args: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, [kind, "copy", name, *args])
        return done.exit_code, done.stderr

    source = catalog.bundled_dir(kind) / f"{name}.toml"
    assert run("mine.toml") == (0, f"copied {source} to mine.toml\n")
    assert run(".")[0] == 0
    assert (here / "mine.toml").read_bytes() == (here / f"{name}.toml").read_bytes() == source.read_bytes()
    (here / "mine.toml").write_text("precious")
    assert run("mine.toml") == (2, "Error: mine.toml exists already. Choose another destination.\n")
    assert run(".") == (2, f"Error: {name}.toml exists already. Choose another destination.\n")
    assert (here / "mine.toml").read_text() == "precious"
    code, said = run("no/such/folder/mine.toml")
    assert code == 2 and said.startswith("Error: cannot write no/such/folder/mine.toml")
    shutil.copy(here / f"{name}.toml", here / "again.toml")
    shown = CliRunner().invoke(main, [kind, "show", "again.toml", "--json"])
    assert json.loads(shown.stdout)["name"] == name


def test_lists_and_tables_are_data(rsb):
    for kind, names in (
        ("recipes", {"a1", "a2", "a3", "deit", "digits", "fashion-mnist"}),
        ("jobs", {"local", "slurm"}),
    ):
        done = rsb.run(kind, "list")
        assert names <= {line.split()[0] for line in done.stdout.splitlines()}
        assert done.stderr == ""
    done = rsb.run("jobs", "show", "slurm")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines()}
    assert rows["gpus_per_node"] == "8 file 0: train on the CPU" and done.stderr.endswith("/slurm.toml\n")
    assert rsb("jobs", "show", "slurm", "--file").startswith("# GPU nodes")
    assert rsb.json("jobs", "show", "slurm", "--json")["gpus_per_node"] == 8
    assert rsb.json("recipes", "show", "a1", "--json")["optimizer"]["lr"] == 5e-3


def test_jobs_show_lists_each_field_with_what_sets_it_and_its_meaning(rsb):
    rsb.env["RSB_SHARE"] = "group"
    rsb.env["RSB_ACCOUNT"] = "vision"
    shown = rsb("jobs", "show", "slurm", "--set", "job.nodes=2", "--set", "job.checkpoint.keep=3")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in shown.splitlines()}
    assert rows.keys() - {"field"} == flatten(load_job("slurm")).keys()
    assert all(len(row.split()) > 2 for row in rows.values()), "each has a meaning"
    assert rows["nodes"].startswith("2 --set ") and rows["checkpoint.keep"].startswith("3 --set ")
    assert rows["time_min"].startswith("1440 file ") and rows["mem_gb"].startswith("0 default ")
    assert rows["share"].startswith('"group" settings ') and rows["slurm"].startswith('{"account": "vision"} settings ')


@pytest.mark.parametrize(("kind", "name"), [("recipes", "a1"), ("jobs", "slurm")])
def test_copy_refuses_to_overwrite(rsb, kind, name):
    done = rsb.run(kind, "copy", name, "mine.toml")
    assert done.stdout == "" and done.stderr.endswith(f"{name}.toml to mine.toml\n")
    before = (rsb.cwd / "mine.toml").read_bytes()
    assert rsb.error(kind, "copy", "digits" if kind == "recipes" else "local", "mine.toml") == (
        "Error: mine.toml exists already. Choose another destination.\n"
    )
    assert (rsb.cwd / "mine.toml").read_bytes() == before


def test_show_names_table_3_as_the_source_of_what_the_model_changes():
    shown, _ = run("recipes", "show", "a3", "--model", "efficientnet_b4", "--set", "eval.resolution=400")
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "augment.resolution 320 Table 3, for efficientnet_b4; in the file 160" in lines
    assert "train.virtual_ranks 32 Table 3, for efficientnet_b4; in the file 4" in lines
    assert "eval.resolution 400 modified, in the file 224" in lines
