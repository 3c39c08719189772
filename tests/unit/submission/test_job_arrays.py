"""Runs with the same resources are submitted together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from rsb_cluster.backends.slurm.backend import Slurm
from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError
from rsb_cluster.runs import sharing
from rsb_cluster.runs.run import Run
from rsb_cluster.submission.job_arrays import ToSubmit, make_arrays, submissions_folder
from tests.unit.bundled import load_job

pytestmark = pytest.mark.usefixtures("here")


def some_runs(count: int, folder: str = "/runs") -> list[Run]:
    return [Run.at(folder, f"r{i}") for i in range(count)]


def some_members(runs: Iterable[Run], jobs: Iterable[Job]) -> list[ToSubmit]:
    return [ToSubmit(run, job, f"/data/{run.run_id}") for run, job in zip(runs, jobs, strict=False)]


@pytest.mark.parametrize("job", ["slurm", "local"])
def test_a_folder_with_a_percent_sign_is_refused(job):
    run = Run.at("/runs %j", "x")
    with pytest.raises(ConfigError, match=r"to /runs %j/submissions/.*x-\d+: .*--set job.submissions=FOLDER"):
        make_arrays("/runs %j", some_members([run], [load_job(job)]), name="x")


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
    assert {array.folder.parent for array in arrays} == {Path("/runs/submissions") / sharing.user_folder()}
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


def test_a_user_of_a_directory_service_has_a_folder_that_sbatch_can_name(monkeypatch):
    monkeypatch.setattr(sharing, "user_name", lambda uid: r"CAMPUS\ada")
    assert submissions_folder(load_job("slurm"), "/runs") == Path("/runs/submissions/CAMPUS-ada")
