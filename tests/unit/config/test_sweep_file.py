"""Sweep files and the command line become the points of a grid that are meant."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsb_cluster.config import catalog
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.config.sweep_file import Grid, Point, expand, leaves, load_sweep, parse_vary
from rsb_cluster.errors import ConfigError
from tests.unit.sweeps import file

pytestmark = pytest.mark.usefixtures("here")


SWEEPS = {"resnet-depths": 15, "deit": 5, "seeds": 10, "smoke": 8}


def jobs(points: list[Point]) -> dict[tuple[str, str], int]:
    return {(p.resolved.recipe.name, p.resolved.recipe.model.name): p.job.nodes for p in points}


# --- files ----------------------------------------------------------------------------------------------------------


def test_every_bundled_sweep_is_tested_here():
    assert set(catalog.available("sweeps")) == set(SWEEPS)


@pytest.mark.parametrize(("name", "runs"), SWEEPS.items())
def test_a_bundled_sweep_is_what_its_name_says(name, runs):
    found, path = load_sweep(name)
    assert found.name == name == path.stem and found.description
    for job in ("slurm", "slurm-cpu"):
        points = expand(found, job=job)
        assert sum(len(point.seeds) for point in points) == runs


def test_deeper_networks_get_more_nodes():
    points = expand(load_sweep("resnet-depths")[0], job="slurm")
    nodes = {"resnet18": 1, "resnet34": 1, "resnet50": 2, "resnet101": 2, "resnet152": 4}
    assert jobs(points) == {(recipe, model): n for recipe in ("a1", "a2", "a3") for model, n in nodes.items()}


def test_the_command_line_comes_after_the_file():
    points = expand(
        load_sweep("resnet-depths")[0],
        job="slurm",
        job_overrides=parse_overrides(["nodes=1"]),
        recipe_overrides=parse_overrides(["optimizer.lr=1"]),
    )
    assert {point.job.nodes for point in points} == {1}
    assert {point.resolved.recipe.optimizer.lr for point in points} == {1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "x.toml: 'grid' is missing."),
        ({"grid": []}, "x.toml: grid = []: list should have at least 1 item"),
        ({"grid": [{"recipes": []}]}, "x.toml: grid.0.recipes = []: list should have at least 1 item"),
        ({"grid": [{"recipes": ["a1"], "seeds": 0}]}, "x.toml: seeds = 0: give a list of seeds, or how many."),
        ({"grid": [{"recipes": ["a1"], "seeds": [-1]}]}, "x.toml: grid.0.seeds.0 = -1: "),
        ({"grid": [{"recipes": ["a1"], "seeds": [2**32]}]}, "x.toml: grid.0.seeds.0 = 4294967296: must be <"),
        ({"grid": [{"recipes": ["a1"], "seeds": 2**32 + 1}]}, "x.toml: seeds = 4294967297: give a list"),
        ({"grid": [{"recipes": ["a1"], "seeds": True}]}, "x.toml: grid.0.seeds = True: "),
        ({"grid": [{"recipe": ["a1"]}]}, "x.toml: unknown key 'grid.0.recipe'. Did you mean 'grid.recipes'?"),
        ({"grid": [{"recipes": ["a1"], "vary": {"optimizer": {"lr": 1}}}]},
         "x.toml: vary.optimizer.lr = 1: give a list of values, for example [1e-3, 2e-3]."),
        ({"grid": [{"recipes": ["a1"], "vary": {"optimizer.lr": []}}]}, "vary.optimizer.lr = []: give a list"),
        ({"grid": [{"recipes": ["a1"]}], "resources": [{"nodes": 4}]}, "x.toml: unknown key 'resources.0.nodes'."),
        ({"grid": [{"recipes": ["a1"]}], "name": "a b"}, "x.toml: name = 'a b': string should match pattern"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_sweep_file_is_explained(values, message):
    with pytest.raises(ConfigError) as caught:
        file(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grid": [{"recipes": ["a9"]}]}, "there is no recipe 'a9'."),
        ({"grid": [{"recipes": ["a1"], "vary": {"optimizer.rl": [1]}}]}, "unknown key 'optimizer.rl'. Did you mean"),
        ({"grid": [{"recipes": ["a1"], "vary": {"optimizer.lr": [1e-3, -1]}}]}, "optimizer.lr = -1: must be a"),
        (
            {"grid": [{"recipes": ["a1"]}], "resources": [{"set": {"node": 4}}]},
            "unknown key 'node'. Did you mean 'nodes'",
        ),
    ],
)
def test_a_mistake_in_a_point_is_explained(values, message):
    with pytest.raises(ConfigError) as caught:
        expand(file(**values), job="slurm")
    assert message in str(caught.value)


# --- grids ----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from(["a1", "a2", "digits"]), min_size=1, unique=True),
    st.lists(st.sampled_from(["resnet18", "resnet50"]), unique=True),
    st.lists(st.sampled_from([1e-3, 2e-3, 5e-3]), unique=True),
    st.integers(1, 3),
)
def test_a_grid_is_every_combination_once(recipes, models, rates, seeds):
    vary = {"optimizer": {"lr": rates}} if rates else {}
    points = expand(file(grid=[{"recipes": recipes, "models": models, "seeds": seeds, "vary": vary}]), job="slurm")
    found = Counter(
        (p.resolved.recipe.name, p.resolved.recipe.model.name, p.resolved.recipe.optimizer.lr, seed)
        for p in points
        for seed in p.seeds
    )
    assert set(found.values()) == {1}
    assert len(found) == len(recipes) * (len(models) or 1) * (len(rates) or 1) * seeds
    if rates:
        assert {lr for _, _, lr, _ in found} == set(rates) == {p.varied["optimizer.lr"] for p in points}
    for point in points:
        assert ("optimizer.lr" in point.resolved.modified) == (
            point.resolved.recipe.optimizer.lr != catalog.load_recipe(point.resolved.recipe.name).recipe.optimizer.lr
        )


def test_two_grids_that_meet_have_the_seeds_of_both():
    points = expand(
        file(
            grid=[{"recipes": ["a1", "a3"], "seeds": 2}, {"recipes": ["a3"], "models": ["resnet50"], "seeds": [1, 7]}]
        ),
        job="slurm",
    )
    assert [(p.resolved.recipe.name, p.seeds) for p in points] == [("a1", (0, 1)), ("a3", (0, 1, 7))]


def test_the_first_resources_that_fit_count():
    resources = [
        {"recipes": ["a3"], "models": ["resnet1*"], "set": {"nodes": 3, "slurm": {"partition": "p"}}},
        {"models": ["resnet1*"], "set": {"nodes": 2}},
    ]
    grid = {"recipes": ["a1", "a3"], "models": ["resnet18", "resnet50", "resnet152"]}
    points = expand(file(grid=[grid], resources=resources), job="slurm")
    assert list(jobs(points).values()) == [2, 1, 2, 3, 1, 3]
    assert [p.job.slurm for p in points if p.job.nodes == 3] == [{"partition": "p"}] * 2


def test_values_on_the_command_line():
    assert parse_vary(["optimizer.lr=1e-3,2e-3", "loss.name=bce,ce", "eval.exact=true"]) == {
        "optimizer.lr": [1e-3, 2e-3], "loss.name": ["bce", "ce"], "eval.exact": [True],
    }  # fmt: skip
    assert parse_vary(["optimizer.betas=[0.9, 0.99],[0.9, 0.999]"]) == {"optimizer.betas": [[0.9, 0.99], [0.9, 0.999]]}
    for wrong in ("optimizer.lr", "optimizer.lr=", "=1"):
        with pytest.raises(ConfigError, match="is not of the form key=value,value"):
            parse_vary([wrong])


def test_nested_tables_are_dotted_names():
    assert leaves({"a": {"b": 1, "c": {"d": [2]}}, "e.f": 3}) == {"a.b": 1, "a.c.d": [2], "e.f": 3}


def test_the_seeds_of_a_grid_are_a_list_or_a_count():
    assert Grid(recipes=("a1",), seeds=3).seeds == (0, 1, 2)
    assert Grid(recipes=("a1",), seeds=[5, 2]).seeds == (5, 2)
    assert Grid(recipes=("a1",)).seeds == (0,)
