"""A request becomes runs and job arrays; finished runs are not submitted again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from rsb_cluster.backends.slurm import Slurm
from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.config.sweep_file import Grid, SweepFile, expand
from rsb_cluster.errors import ConfigError, MissingError, StorageError
from rsb_cluster.monitor import actions
from rsb_cluster.node.processes import Process
from rsb_cluster.runs.run import Attempt, Run, Submission
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.plan import ToSubmit, make_arrays, parse_seeds, plan_runs
from tests.unit.bundled import load_job
from tests.unit.fine_tuning import SHORT, from_, plan_short, write_weights
from tests.unit.sweeps import file, finish, make, planned, planned_with_notes

pytestmark = pytest.mark.usefixtures("here")


def test_seeds_are_one_or_counted():
    assert parse_seeds(None, None) == (0,)
    assert parse_seeds(3, None) == (3,)
    assert parse_seeds(None, 3) == (0, 1, 2)
    with pytest.raises(ConfigError, match="--seed is one seed, --seeds a number of seeds from 0: use one of them"):
        parse_seeds(0, 3)


@pytest.mark.parametrize("seeds", [(2**32, None), (2**70, None), (None, 2**32 + 1)])
def test_a_seed_that_would_share_draws_with_a_small_one_is_refused(seeds):
    with pytest.raises(ConfigError, match="is too large: seeds of 4294967296 and more share draws with small ones"):
        parse_seeds(*seeds)
    assert parse_seeds(2**32 - 1, None) == (2**32 - 1,)


@pytest.mark.parametrize("job", ["slurm", "local"])
def test_a_folder_with_a_percent_sign_is_refused(job):
    run = Run.at("/runs %j", "x")
    with pytest.raises(ConfigError, match=r"to /runs %j/submissions/.*x-\d+: .*--set job.submissions=FOLDER"):
        make_arrays("/runs %j", some_members([run], [load_job(job)]), name="x")


def test_only_unfinished_runs_are_submitted_again(tmp_path, digits):
    runs = planned(tmp_path, digits)
    assert len({p.run.run_id for p in runs}) == 4 and [p.state for p in runs] == ["new"] * 4
    assert {p.virtual_ranks for p in runs} == {4}
    finish(make(runs[0]))
    make(runs[3])
    again = planned(tmp_path, digits)
    assert [p.run.url for p in again] == [p.run.url for p in runs]
    assert [p.state for p in again] == ["finished", "new", "new", "unfinished"]
    assert [p.should_submit for p in again] == [False, True, True, True]
    assert [p.virtual_ranks for p in again] == [2, 4, 4, 2], "a run that exists keeps its own"


def test_runs_over_budget_are_not_submitted(tmp_path, digits):
    runs = planned(tmp_path, digits)
    for planned_run in runs[:2]:
        make(planned_run).write_attempt(
            Attempt(number=1, job_id="1", world_size=4, hosts=(), started=0, ended=3600, start_step=0, end_step=9)
        )
    again, notes = planned_with_notes(tmp_path, digits, "max_gpu_hours=4")
    assert [p.state for p in again] == ["over budget", "over budget", "new", "new"]
    assert [p.should_submit for p in again] == [False, False, True, True]
    one, other = [note for note in notes if "GPU-hour" in note]
    assert one.startswith(f"{runs[0].run.run_id} exceeded its GPU-hour budget (used 4.00 of 4)") and other != one
    assert [p.state for p in planned(tmp_path, digits, "max_gpu_hours=4.1")][:2] == ["unfinished", "unfinished"]
    for planned_run in runs[2:]:
        finish(make(planned_run))
    with pytest.raises(ConfigError, match="submit it again with a larger --max-gpu-hours"):
        planned(tmp_path, digits, "max_gpu_hours=4")
    refused = actions.retry([make(runs[0], load_job("local", "max_gpu_hours=4"))], failed_only=False).refused
    assert "exceeded its GPU-hour budget (used 4.00 of 4)" in refused[runs[0].run.run_id]


def test_a_data_set_is_searched_once(tmp_path, digits):
    assert len({id(p.data) for p in planned(tmp_path, digits)}) == 1


def test_other_resources_are_the_same_runs(tmp_path, digits):
    one, other = planned(tmp_path, digits), planned(tmp_path, digits, "nodes=2", "slurm.partition=x")
    assert [p.run.url for p in one] == [p.run.url for p in other]


def test_missing_data_is_one_note_for_all(tmp_path):
    points = expand(file(grid=[{"recipes": ["a1", "a2"], "seeds": 3}]), job="slurm")
    runs, notes = plan_runs(points, str(tmp_path), "", dry_run=True)
    assert len(runs) == 6 and {p.run.run_id[-8:] for p in runs} == {"-unknown"}
    assert len(notes) == 1 and "no shards of 'imagenet-1k' were found" in notes[0]


def test_a_queued_run_whose_data_are_elsewhere_by_now_is_named(tmp_path, digits, monkeypatch):
    """Its job will look for them where they were when it was sent."""
    run = make(planned(tmp_path, digits)[0])
    where = {"backend": "local", "folder": str(tmp_path), "shape": "", "time": 0}
    run.add_submission(Submission(job_id=str(Process.of(os.getpid())), data="/gone", **where))
    runs, notes = planned_with_notes(tmp_path, digits)
    assert runs[0].state == "already submitted"
    assert notes == [
        f"{run.run_id} is already submitted, with its data in /gone. To use {digits}, cancel it and submit again."
    ]
    run.add_submission(Submission(job_id=f"{Process.of(os.getpid())}", data=str(digits), **where | {"time": 1}))
    assert planned_with_notes(tmp_path, digits)[1] == []


def some_runs(count: int, folder: str = "/runs") -> list[Run]:
    return [Run.at(folder, f"r{i}") for i in range(count)]


def some_members(runs: Iterable[Run], jobs: Iterable[Job]) -> list[ToSubmit]:
    return [ToSubmit(run, job, f"/data/{run.run_id}") for run, job in zip(runs, jobs, strict=False)]


def test_runs_with_the_same_resources_are_one_array():
    small, large = load_job("slurm", "nodes=1"), load_job("slurm", "nodes=4")
    runs = some_runs(5)
    arrays = make_arrays(
        "/runs", some_members(runs, [small, large, load_job("slurm", "nodes=1"), large, small]), name="x-1"
    )
    assert [(array.job, array.runs) for array in arrays] == [
        (small, (runs[0], runs[2], runs[4])),
        (large, (runs[1], runs[3])),
    ]
    assert len({array.folder for array in arrays}) == 2
    assert {array.folder.parent for array in arrays} == {Path("/runs/submissions")}
    assert {array.name for array in arrays} == {"x-1"}
    assert [task.data for array in arrays for task in array.tasks] == [f"/data/r{i}" for i in (0, 2, 4, 1, 3)]
    assert make_arrays("/runs", [], name="x") == ()


def test_one_run_is_a_job_of_its_own_name():
    (array,) = make_arrays("/runs", some_members(some_runs(1), [load_job("slurm")]), name="x")
    assert array.name == "r0" and "#SBATCH --array" not in array.script


def test_an_array_is_no_larger_than_slurm_accepts(monkeypatch):
    """If no Slurm answers, its default limit applies; no test machine has a cluster by default."""
    monkeypatch.setenv("SLURM_CONF", "/nonexistent")
    assert Slurm().max_array_size() == 1001
    runs = some_runs(2500)
    arrays = make_arrays("/runs", some_members(runs, [load_job("slurm")] * 2500), name="x")
    assert [len(array.runs) for array in arrays] == [1001, 1001, 498]
    assert [run for array in arrays for run in array.runs] == runs
    (local,) = make_arrays("/runs", some_members(runs, [load_job("local")] * 2500), name="x")
    assert len(local.runs) == 2500


def test_a_dry_run_names_what_will_be_made_and_needs_no_network(here, monkeypatch):
    names = Store.names

    def unreachable(self, *path):
        if "://" in self.url:
            raise StorageError("no network")
        return names(self, *path)

    monkeypatch.setattr(Store, "names", unreachable)
    points = expand(SweepFile(name="x", grid=(Grid(recipes=("digits",)),)), job="local")
    (planned,), notes = plan_runs(points, "s3://bucket/runs", "", dry_run=True)
    assert (planned.data.to_make, planned.run.run_id[-8:]) != ("", "-unknown")
    assert planned.data.url == f"{here}/data/digits"
    assert notes == ["could not check which of the runs exist: no network"]
    assert list(here.iterdir()) == []


def test_a_folder_of_runs_that_cannot_be_written_is_refused(rsb, digits):
    (rsb.cwd / "file").write_text("precious")
    said = rsb.error("submit", "--recipe", "digits", "--job", "local", "--data", str(digits), "--runs", "file", code=1)
    assert f"cannot use {rsb.cwd}/file/probe-" in said and said.endswith("Choose another folder.\n")
    assert [path.name for path in rsb.cwd.iterdir()] == ["file"]


def test_the_same_weights_elsewhere_are_the_same_run_and_others_another(tmp_path: Path, digits: Path) -> None:
    for name in ("one", "other"):
        write_weights(tmp_path / f"{name}.safetensors")
    shutil.copyfile(tmp_path / "one.safetensors", tmp_path / "copy.safetensors")
    ids = {
        name: plan_short("digits", digits, tmp_path / "runs", *SHORT, *how)[0].run.run_id
        for name, how in {
            "scratch": (),
            **{name: (from_(tmp_path / f"{name}.safetensors"),) for name in ("one", "copy", "other")},
            "new head": (from_(tmp_path / "one.safetensors"), "init.head=replace"),
        }.items()
    }
    assert ids["one"] == ids["copy"]
    assert len(set(ids.values())) == 4


def test_a_dry_run_without_the_weights_continues_with_a_note(tmp_path: Path, digits: Path) -> None:
    points = expand(
        SweepFile(name="test", grid=(Grid(recipes=("digits",)),)),
        job="local",
        recipe_overrides=parse_overrides([from_(tmp_path / "no.pth")]),
    )
    [one], notes = plan_runs(points, str(tmp_path), str(digits), dry_run=True)
    assert one.run.run_id.endswith("-unknown") and one.init is None
    assert any("there is nothing at" in note for note in notes)
    with pytest.raises(MissingError):
        plan_runs(points, str(tmp_path), str(digits), dry_run=False)
