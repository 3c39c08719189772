"""Points become runs; finished runs are not submitted again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.config.sweep_file import Grid, SweepFile, expand
from rsb_cluster.errors import ConfigError, DataError, MissingError, RsbError, StorageError
from rsb_cluster.monitor import actions
from rsb_cluster.node.processes import Process
from rsb_cluster.runs.run import Attempt, Run, Spec, Submission
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.plan_runs import plan_runs
from tests.unit.bundled import load_job
from tests.unit.fine_tuning import SHORT, from_, plan_short, write_weights
from tests.unit.sweeps import file, finish, make, planned, planned_with_notes

pytestmark = pytest.mark.usefixtures("here")


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


def other_version(one, virtual_ranks: int, *, in_recipe: bool = False) -> Run:
    """The run as version 1 of the draws would have begun it: the number in the recipe, or chosen by the job."""
    number = one.recipe.train.virtual_ranks if in_recipe else 0
    train = one.recipe.train.model_copy(update={"virtual_ranks": number})
    recipe = one.recipe.model_copy(update={"train": train})
    digest = recipe.digest(one.seed, one.data.digest)
    run = Run.at(one.run.runs_url, f"{one.recipe.name}-{one.recipe.model.name}-s{one.seed}-{digest}")
    run.create(
        recipe,
        Spec(run_id=run.run_id, seed=one.seed, virtual_ranks=virtual_ranks, data="", train_digest="", val_digest=""),
    )
    return run


@pytest.mark.parametrize("in_recipe", [True, False])
def test_an_unfinished_run_of_an_earlier_version_is_resumed_as_it_is(tmp_path, digits, in_recipe):
    older = other_version(planned(tmp_path, digits)[0], 4, in_recipe=in_recipe)
    older.add_submission(Submission(backend="local", job_id="1", folder="/f", shape="", time=1))
    again, notes = planned_with_notes(tmp_path, digits)
    assert [p.state for p in again] == ["unfinished", "new", "new", "new"]
    assert again[0].run.url == older.url and older.spec().draws == 1
    assert notes == [
        f"{older.run_id} was begun by an earlier version with its own order of samples, which it keeps: it is resumed "
        "in place of a new run."
    ]


def test_a_run_of_an_earlier_version_with_other_virtual_ranks_is_another_run_and_named(tmp_path, digits):
    older = other_version(planned(tmp_path, digits)[0], 32)
    again, notes = planned_with_notes(tmp_path, digits)
    assert [p.state for p in again] == ["new"] * 4 and older.run_id not in {p.run.run_id for p in again}
    assert notes == [
        f"{older.run_id} was begun by an earlier version with 32 virtual ranks; this is another run, with 4. To resume "
        "that one, submit with --virtual-ranks 32."
    ]


def test_a_finished_run_of_an_earlier_version_is_not_taken_for_this_one(tmp_path, digits):
    older = other_version(planned(tmp_path, digits)[0], 4)
    finish(older)
    again, notes = planned_with_notes(tmp_path, digits)
    assert [p.state for p in again] == ["new"] * 4
    assert len(notes) == 1 and notes[0].startswith(f"{older.run_id} was finished by an earlier version, with 4 virtual")


def test_more_nodes_are_the_same_run(tmp_path, digits):
    """The number of virtual ranks is the recipe's, whatever the job."""
    for shape in ((), ("nodes=2",), ("nodes=4",)):
        again = planned(tmp_path, digits, *shape)
        assert {p.virtual_ranks for p in again} == {4}
        assert [p.run.run_id for p in again] == [p.run.run_id for p in planned(tmp_path, digits)]


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


def test_missing_data_is_one_refusal_for_all(tmp_path):
    points = expand(file(grid=[{"recipes": ["a1", "a2"], "seeds": 3}]), job="slurm")
    refusals: list[RsbError] = []
    runs, notes = plan_runs(points, str(tmp_path), "", dry_run=True, refusals=refusals)
    assert len(runs) == 6 and {p.run.run_id[-8:] for p in runs} == {"-unknown"} and notes == []
    (refusal,) = refusals
    assert isinstance(refusal, DataError) and "no shards of 'imagenet-1k' were found" in str(refusal)


def test_a_queued_run_whose_data_are_elsewhere_by_now_is_named(tmp_path, digits, monkeypatch):
    """Its job will look for them where they were when it was sent."""
    run = make(planned(tmp_path, digits)[0])
    job = str(Process.of(os.getpid()))
    where = {"backend": "local", "folder": str(tmp_path), "shape": "", "time": 0}
    where["job"] = load_job("slurm-cpu").model_dump(mode="json")
    run.add_submission(Submission(job_id=job, data="/gone", **where))
    runs, notes = planned_with_notes(tmp_path, digits)
    assert runs[0].state == "already submitted"
    assert notes == [
        f"{run.run_id} is queued as job {job}, which keeps data = '/gone' (here '{digits}'). --resubmit cancels the "
        "queued job and submits it anew."
    ]
    run.add_submission(Submission(job_id=job, data=str(digits), **where | {"time": 1}))
    assert planned_with_notes(tmp_path, digits)[1] == []


def test_a_dry_run_names_what_will_be_made_and_needs_no_network(here, monkeypatch):
    names = Store.names

    def unreachable(self, *path):
        if "://" in self.url:
            raise StorageError("no network")
        return names(self, *path)

    monkeypatch.setattr(Store, "names", unreachable)
    points = expand(SweepFile(name="x", grid=(Grid(recipes=("digits",)),)), job="local")
    refusals: list[RsbError] = []
    (planned,), _ = plan_runs(points, "s3://bucket/runs", "", dry_run=True, refusals=refusals)
    assert (planned.data.to_make, planned.run.run_id[-8:]) != ("", "-unknown")
    assert planned.data.url == f"{here}/data/digits"
    assert list(map(str, refusals)) == ["could not check which of the runs exist: no network"]
    assert list(here.iterdir()) == []


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


def test_a_dry_run_without_the_weights_continues_with_a_refusal(tmp_path: Path, digits: Path) -> None:
    points = expand(
        SweepFile(name="test", grid=(Grid(recipes=("digits",)),)),
        job="local",
        recipe_overrides=parse_overrides([from_(tmp_path / "no.pth")]),
    )
    refusals: list[RsbError] = []
    [one], _ = plan_runs(points, str(tmp_path), str(digits), dry_run=True, refusals=refusals)
    assert one.run.run_id.endswith("-unknown") and one.init is None
    assert [type(refusal) for refusal in refusals] == [MissingError]
    with pytest.raises(MissingError):
        plan_runs(points, str(tmp_path), str(digits), dry_run=False)


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (("train.ema_decay=0.999",), "after 550 steps, 58% of the averaged weights (train.ema_decay = 0.999) is still"),
        (("train.ema_decay=0.999", "train.ema_warmup=true"), ""),
        (("train.ema_decay=0.99",), ""),
        ((), ""),
    ],
)
def test_an_average_that_is_still_the_initial_weights_is_warned_of(tmp_path, digits, assignments, said):
    points = expand(
        file(grid=[{"recipes": ["digits"]}]), job="local", recipe_overrides=parse_overrides(list(assignments))
    )
    notes = plan_runs(points, str(tmp_path), str(digits), dry_run=True)[1]
    assert [note[: len(said)] for note in notes] == ([said] if said else [])
