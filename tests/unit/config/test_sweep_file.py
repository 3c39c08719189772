"""Sweep files become the runs and job arrays that are meant; what is finished is not sent again."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsb_cluster.backends import slurm
from rsb_cluster.config import catalog
from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import validate
from rsb_cluster.config.sweep_file import Grid, Point, SweepFile, expand, leaves, load_sweep, parse_vary
from rsb_cluster.errors import ConfigError
from rsb_cluster.monitor import actions
from rsb_cluster.monitor.status import read_status
from rsb_cluster.runs.run import Attempt, Run, Spec, Submission
from rsb_cluster.runs.sweep import Member, Sweep
from rsb_cluster.submission.data_location import find_data
from rsb_cluster.submission.estimate import gpu_hours, parse_rates
from rsb_cluster.submission.plan import Plan, make_arrays, plan_runs
from rsb_cluster.submission.preview import sweep_as_dict, sweep_rows, sweep_summary

SWEEPS = {"resnet-depths": 15, "deit": 5, "seeds": 10, "smoke": 8}


@pytest.fixture(autouse=True)
def _nothing_of_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def file(**values: object) -> SweepFile:
    return validate(SweepFile, {"name": "x"} | values, "x.toml")


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
    points = expand(load_sweep("resnet-depths")[0], job="slurm", for_jobs=["nodes=1"], for_recipes=["optimizer.lr=1"])
    assert {point.job.nodes for point in points} == {1}
    assert {point.resolved.recipe.optimizer.lr for point in points} == {1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "x.toml: 'grid' is missing."),
        ({"grid": []}, "x.toml: grid = []: tuple should have at least 1 item"),
        ({"grid": [{"recipes": []}]}, "x.toml: grid.0.recipes = []: tuple should have at least 1 item"),
        ({"grid": [{"recipes": ["a1"], "seeds": 0}]}, "x.toml: seeds = 0: give a list of seeds, or how many."),
        ({"grid": [{"recipes": ["a1"], "seeds": [-1]}]}, "x.toml: grid.0.seeds.0 = -1: "),
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
        ({"grid": [{"recipes": ["a1"], "vary": {"optimizer.lr": [1e-3, -1]}}]}, "optimizer.lr = -1: input should be"),
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


# --- runs -----------------------------------------------------------------------------------------------------------


DIGITS = {"recipes": ["digits"], "models": ["resnet10t", "test_resnet"], "seeds": 2}


def planned(runs: Path, digits: Path, *for_jobs: str):
    return planned_with_notes(runs, digits, *for_jobs)[0]


def planned_with_notes(runs: Path, digits: Path, *for_jobs: str):
    points = expand(file(grid=[DIGITS]), job="slurm-cpu", for_jobs=for_jobs)
    return plan_runs(points, str(runs), str(digits), dry_run=False)


def make(one, job: Job | None = None) -> Run:
    spec = Spec(run_id=one.run.run_id, seed=one.seed, virtual_ranks=2, data="", train_digest="", val_digest="")
    one.run.create(one.recipe, spec)
    if job:
        one.run.add_submission(
            Submission(backend="local", job_id="1", folder="/f", shape="", time=1, job=job.model_dump(mode="json"))
        )
    return one.run


def finish(run: Run) -> None:
    run.store.write_json("result.json", {"top1": 90, "attempts": 1, "epochs": 25, "steps": 550, "images_per_s": 9.5})


def test_only_what_is_not_finished_is_sent_again(tmp_path, digits):
    runs = planned(tmp_path, digits)
    assert len({p.run.run_id for p in runs}) == 4 and [p.state for p in runs] == ["new"] * 4
    assert {p.virtual_ranks for p in runs} == {4}
    finish(make(runs[0]))
    make(runs[3])
    again = planned(tmp_path, digits)
    assert [p.run.url for p in again] == [p.run.url for p in runs]
    assert [p.state for p in again] == ["finished", "new", "new", "unfinished"]
    assert [p.is_to_submit for p in again] == [False, True, True, True]
    assert [p.virtual_ranks for p in again] == [2, 4, 4, 2], "a run that exists keeps its own"


def test_runs_without_gpu_hours_left_are_not_sent(tmp_path, digits):
    runs = planned(tmp_path, digits)
    for planned_run in runs[:2]:
        make(planned_run).write_attempt(
            Attempt(number=1, job_id="1", world_size=4, hosts=(), started=0, ended=3600, start_step=0, end_step=9)
        )
    again, notes = planned_with_notes(tmp_path, digits, "max_gpu_hours=4")
    assert [p.state for p in again] == ["over budget", "over budget", "new", "new"]
    assert [p.is_to_submit for p in again] == [False, False, True, True]
    one, other = [note for note in notes if "GPU-hours" in note]
    assert one.startswith(f"{runs[0].run.run_id} has used 4.00 of the 4 ") and other != one
    assert [p.state for p in planned(tmp_path, digits, "max_gpu_hours=4.1")][:2] == ["unfinished", "unfinished"]
    for planned_run in runs[2:]:
        finish(make(planned_run))
    with pytest.raises(ConfigError, match="submit it again with a larger --max-gpu-hours"):
        planned(tmp_path, digits, "max_gpu_hours=4")
    refused = actions.retry([make(runs[0], job("local", "max_gpu_hours=4"))], failed_only=False).refused
    assert "has used 4.00 of the 4 GPU-hours" in refused[runs[0].run.run_id]


def test_a_set_is_looked_for_once(tmp_path, digits):
    assert len({id(p.data) for p in planned(tmp_path, digits)}) == 1


def test_other_resources_are_the_same_runs(tmp_path, digits):
    one, other = planned(tmp_path, digits), planned(tmp_path, digits, "nodes=2", "slurm.partition=x")
    assert [p.run.url for p in one] == [p.run.url for p in other]


def test_missing_data_is_one_note_for_all(tmp_path):
    points = expand(file(grid=[{"recipes": ["a1", "a2"], "seeds": 3}]), job="slurm")
    runs, notes = plan_runs(points, str(tmp_path), "", dry_run=True)
    assert len(runs) == 6 and {p.run.run_id[-8:] for p in runs} == {"-unknown"}
    assert len(notes) == 1 and "no shards of 'imagenet-1k' were found" in notes[0]


# --- arrays ---------------------------------------------------------------------------------------------------------


def job(name: str = "slurm", *assignments: str) -> Job:
    return catalog.load_job(name, assignments=assignments)[0]


def some_runs(count: int, folder: str = "/runs") -> list[Run]:
    return [Run.at(folder, f"r{i}") for i in range(count)]


def test_runs_with_the_same_resources_are_one_array():
    small, large = job("slurm", "nodes=1"), job("slurm", "nodes=4")
    runs = some_runs(5)
    arrays = make_arrays(
        "/runs", list(zip(runs, [small, large, job("slurm", "nodes=1"), large, small], strict=True)), name="x-1"
    )
    assert [(array.job, array.runs) for array in arrays] == [
        (small, (runs[0], runs[2], runs[4])),
        (large, (runs[1], runs[3])),
    ]
    assert len({array.folder for array in arrays}) == 2
    assert {array.folder.parent for array in arrays} == {Path("/runs/submissions")}
    assert {array.name for array in arrays} == {"x-1"}
    assert make_arrays("/runs", [], name="x") == ()


def test_one_run_is_a_job_of_its_own_name():
    (array,) = make_arrays("/runs", [(some_runs(1)[0], job())], name="x")
    assert array.name == "r0" and "#SBATCH --array" not in array.script


def test_an_array_is_no_larger_than_slurm_takes(monkeypatch):
    """Where no Slurm answers, its own default limit is taken; no test machine has a cluster by default."""
    monkeypatch.setenv("SLURM_CONF", "/nonexistent")
    assert slurm.max_runs() == 1001
    runs = some_runs(2500)
    arrays = make_arrays("/runs", [(run, job()) for run in runs], name="x")
    assert [len(array.runs) for array in arrays] == [1001, 1001, 498]
    assert [run for array in arrays for run in array.runs] == runs
    (local,) = make_arrays("/runs", [(run, job("local")) for run in runs], name="x")
    assert len(local.runs) == 2500


# --- the dry run ----------------------------------------------------------------------------------------------------


def test_rates_are_for_models():
    rates = parse_rates(["resnet18=3000", "resnet*=1000", "50"])
    recipe = catalog.load_recipe("a3").recipe
    images = recipe.total_steps * 2048
    for model, rate in (("resnet18", 3000), ("resnet50", 1000), ("vit", 50)):
        named = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": model})})
        assert gpu_hours(named, rates) == pytest.approx(images / rate / 3600)
    assert gpu_hours(recipe, parse_rates(["resnet18=3000"])) is None
    for wrong in ("x", "resnet18=", "resnet18=-1", "0", "nan"):
        with pytest.raises(ConfigError, match="is neither images/s, as in 1200, nor MODEL=images/s"):
            parse_rates([wrong])


def test_the_table_of_a_sweep_adds_up(tmp_path, digits):
    finish(make(planned(tmp_path, digits)[0]))
    runs = tuple(planned(tmp_path, digits))
    arrays = make_arrays(str(tmp_path), [(p.run, p.point.job) for p in runs if p.is_to_submit], name="x")
    members = tuple(Member(run_id=p.run.run_id, recipe="digits", model="", seed=0) for p in runs)
    plan = Plan(str(tmp_path), runs, arrays, Sweep(sweep_id="x-1", file="", created=0, members=members))
    rates = parse_rates(["resnet10t=100", "test_resnet=400"])
    hours = 550 * 64 / 3600 / 100
    one, other, total = sweep_rows(plan, rates)
    assert [row["state"] for row in (one, other, total)] == ["1 finished, 1 new", "2 new", "1 finished, 3 new"]
    assert [row["runs"] for row in (one, other, total)] == ["2", "2", "4"]
    assert [row["GPU-hours"] for row in (one, other, total)] == [
        f"{h:,.1f}" for h in (2 * hours, hours / 2, 2.5 * hours)
    ]
    assert one["batch"] == "2 × 32" and other["batch"] == "4 × 16" and one["steps"] == "550"
    assert "values" not in one
    said = sweep_as_dict(plan, rates)
    assert said["gpu_hours"] == pytest.approx(2.5 * hours)
    assert said["gpu_hours_to_submit"] == pytest.approx(1.5 * hours)
    assert [len(array["runs"]) for array in said["arrays"]] == [3]
    assert json.loads(json.dumps(said)) == said or said["runs"][0]["modified"] == {}
    assert "sweep x-1: 3 of 4 runs to submit, in 1 job, 0.1 GPU-hours" in sweep_summary(plan, rates)
    assert sweep_as_dict(plan, {})["gpu_hours"] is None
    assert {row["GPU-hours"] for row in sweep_rows(plan, parse_rates(["resnet10t=100"]))} == {
        f"{2 * hours:,.1f}",
        "unknown",
    }


# --- retry ----------------------------------------------------------------------------------------------------------


def test_retry_says_what_it_cannot_send_and_why(tmp_path, digits):
    runs = planned(tmp_path, digits)
    finish(make(runs[0]))
    never, broken, gone = make(runs[1]), make(runs[2], job("slurm-cpu")), runs[3].run
    broken.store.write_bytes("recipe.json", b"{")
    done = actions.retry([p.run for p in runs], failed_only=True)
    assert done.sent == {}
    assert done.refused.keys() == {never.run_id, broken.run_id, gone.run_id}
    assert "how it was sent is not noted" in done.refused[never.run_id]
    assert "recipe.json is not JSON" in done.refused[broken.run_id]
    assert "its folder is gone; send the sweep again" in done.refused[gone.run_id]


def test_what_is_wrong_with_one_run_is_no_others_business(tmp_path, digits):
    runs = planned(tmp_path, digits)
    finish(make(runs[0], job("local")))
    make(runs[1]).store.write_bytes("recipe.json", b"{")
    make(runs[2]).store.write_json("result.json", {"top1": "high"})
    found = read_status([p.run for p in runs])
    assert [status.state for status in found] == ["finished", "broken", "broken", "missing"]
    assert "recipe.json is not JSON" in found[1].cause
    assert "its metrics or result.json" in found[2].cause
    assert (found[0].top1, found[0].step, found[0].total_steps, found[0].images_per_s) == (90, 550, 550, 9.5)


def test_the_seeds_of_a_grid_are_a_list_or_a_count():
    assert Grid(recipes=("a1",), seeds=3).seeds == (0, 1, 2)
    assert Grid(recipes=("a1",), seeds=[5, 2]).seeds == (5, 2)
    assert Grid(recipes=("a1",)).seeds == (0,)


def test_data_is_found_by_name_below_a_root(digits, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "digits").symlink_to(digits)
    where = [find_data("digits", given, job("local")).url for given in (str(digits), str(root))]
    assert where == [str(digits), f"{root}/digits"]
    missing = find_data("digits", str(tmp_path / "no"), job("local"))
    assert not missing.is_found and "Looked for" in missing.problem
