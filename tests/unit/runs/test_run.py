"""A run's small files are read back as they were written, and it is made once."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from rsb_cluster.cli import main
from rsb_cluster.config import catalog
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.errors import MissingError, NewerVersionError, StorageError
from rsb_cluster.runs.lookup import find_runs, list_runs
from rsb_cluster.runs.run import Attempt, Run, Spec, Submission, check_same_recipe, environment_changes
from tests.unit.new_runs import make_run
from tests.unit.runs.made import IDS, make


def test_a_run_is_read_as_it_was_written(anywhere):
    assert list_runs(anywhere.url) == []
    run, spec = make(anywhere.url, IDS[0], "optimizer.lr=4e-3", "model.kwargs.x=[1, 2]")
    make(anywhere.url, IDS[1])
    anywhere.write_bytes("submissions/x.json", b"")
    anywhere.write_bytes("other/x", b"")
    assert [r.run_id for r in list_runs(anywhere.url)] == [IDS[0], IDS[1]]
    assert [r.run_id for r in find_runs("/nonexistent", (f"{anywhere.url}/{IDS[1]}",))] == [IDS[1]]
    assert run.exists() and not Run.at(anywhere.url, "x").exists()
    assert run.url == f"{anywhere.url}/{IDS[0]}"
    assert run.spec() == spec
    assert (
        run.recipe()
        == catalog.load_recipe("a1", overrides=parse_overrides(["optimizer.lr=4e-3", "model.kwargs.x=[1, 2]"])).recipe
    )
    assert run.result() is None
    assert run.submissions() == run.attempts() == []
    run.store.write_json("result.json", {"top1": 80.4})
    assert run.result() == {"top1": 80.4}


def test_the_spec_is_what_makes_a_run_exist(tmp_path):
    run, _ = make(tmp_path, IDS[0])
    (tmp_path / IDS[0] / "spec.json").unlink()
    assert not run.exists()
    with pytest.raises(MissingError):
        run.spec()


def test_a_run_is_created_once(anywhere):
    """Of two submits at once one writes; the spec of the other is dropped, and it gets to know."""
    run, spec = make(anywhere.url, IDS[0])
    before = run.store.read_bytes("spec.json")
    again = spec.model_copy(update={"virtual_ranks": 8, "created": 99.0})
    assert run.create(catalog.load_recipe("a1").recipe, again) is False
    assert run.store.read_bytes("spec.json") == before
    other = catalog.load_recipe("a1", overrides=parse_overrides(["optimizer.lr=1"])).recipe
    with pytest.raises(StorageError, match=r"recipe\.json is not the recipe of its run id"):
        run.create(other, again)
    assert run.recipe().optimizer.lr == 5e-3


def test_of_many_that_create_a_run_at_once_one_does(tmp_path):
    run, recipe = Run.at(tmp_path, IDS[0]), catalog.load_recipe("a1").recipe
    specs = [Spec(run_id=IDS[0], seed=0, virtual_ranks=n, data="", train_digest="", val_digest="") for n in range(1, 9)]
    barrier = threading.Barrier(len(specs))

    def create(spec):
        barrier.wait()
        return run.create(recipe, spec)

    with ThreadPoolExecutor(len(specs)) as pool:
        created = list(pool.map(create, specs))
    assert sum(created) == 1
    assert run.spec() == specs[created.index(True)] and run.recipe() == recipe


def test_a_folder_that_a_killed_submit_left_becomes_a_run(tmp_path):
    run, spec = make(tmp_path, IDS[0])
    (tmp_path / IDS[0] / "spec.json").unlink()
    with pytest.raises(StorageError, match="is not the recipe"):
        run.create(catalog.load_recipe("a1", overrides=parse_overrides(["optimizer.lr=1"])).recipe, spec)
    assert not run.exists()
    assert run.create(catalog.load_recipe("a1").recipe, spec) and run.spec() == spec


def test_all_jobs_that_a_user_cancelled_are_known(anywhere):
    run = Run.at(anywhere.url, "r")
    assert run.cancelled() == () and not run.is_cancelled("7")
    run.request_cancel(["7", "8_1"])
    assert [job for job in ("7", "8", "8_1", "9") if run.is_cancelled(job)] == ["7", "8_1"]
    assert run.store.read_json("cancelled.json")["job_id"] == "8_1", "what a job of an earlier version reads"
    run.request_cancel([])
    assert not run.store.exists("cancelled.json") and not run.is_cancelled("7")
    run.store.write_json("cancelled.json", {"job_id": "5"})  # by an earlier version
    assert run.cancelled() == ("5",) and run.is_cancelled("5")


def submission(job_id, time):
    return Submission(backend="slurm", job_id=job_id, folder="/f", shape="1 node × 1 GPUs", time=time)


def test_submissions_are_in_order_of_time_even_within_a_second(anywhere):
    run = Run.at(anywhere.url, "r")
    expected = [submission("999", 1e9), submission("1000", 1e9 + 0.2), submission("5_1", 1e9 + 7), submission("3", 2e9)]
    for one in expected:
        run.add_submission(one)
    assert run.submissions() == expected


def test_a_submission_is_the_newest_also_if_an_earlier_one_was_made_where_the_clock_is_ahead(anywhere):
    run = Run.at(anywhere.url, "r")
    for one in (submission("1", 2e9), submission("2", 1e9), submission("3", 1e9 + 5)):
        run.add_submission(one)
    assert [(s.job_id, s.time) for s in run.submissions()] == [("1", 2e9), ("2", 2e9 + 1), ("3", 2e9 + 2)]


def test_the_data_are_where_the_last_submit_that_says_so_found_them(tmp_path):
    run, spec = make(tmp_path, IDS[0])
    assert run.data_url() == spec.data
    run.add_submission(submission("1", 1.0))
    assert run.data_url() == spec.data, "earlier versions did not say"
    run.add_submission(submission("2", 2.0).model_copy(update={"data": "/moved"}))
    assert run.data_url() == "/moved" and run.spec() == spec


def attempt(number):
    return Attempt(number=number, job_id="7", world_size=2, hosts=("a", "b"), started=1.0, start_step=0)


def test_what_changed_between_attempts_is_told():
    def with_(number, **environment):
        return attempt(number).model_copy(update={"environment": environment})

    found = [attempt(1), with_(2, torch="2.6"), attempt(3), with_(4, torch="2.7", GPU="H100"), with_(5, torch="2.7")]
    assert environment_changes(found) == [
        "torch: 2.6 in attempt 2, 2.7 in attempt 4",
        "GPU: none in attempt 2, H100 in attempt 4",
        "GPU: H100 in attempt 4, none in attempt 5",
    ]
    assert environment_changes(found[:3]) == environment_changes([]) == []


def test_failures_of_ranks_are_not_attempts(anywhere):
    run = Run.at(anywhere.url, "r")
    for number in (2, 1, 10):
        run.write_attempt(attempt(number))
    run.store.write_json("attempts/0001-rank00003.json", {"message": "three"})
    run.store.write_json("attempts/0001-rank00000.json", {"message": "none"})
    run.store.write_json("attempts/0010-rank00001.json", {"message": "one"})
    assert [a.number for a in run.attempts()] == [1, 2, 10]
    assert run.rank_failures(1) == {0: {"message": "none"}, 3: {"message": "three"}}
    assert run.rank_failures(2) == {}
    assert run.rank_failures(10) == {1: {"message": "one"}}
    ended = attempt(2).model_copy(update={"cause": "preempted", "end_step": 40, "message": "é"})
    run.write_attempt(ended)
    assert run.attempts()[1] == ended


@pytest.mark.parametrize("name", ["recipe.json", "spec.json"])
def test_a_file_of_a_newer_version_or_a_damaged_one_is_named(tmp_path, name):
    run, _ = make(tmp_path, IDS[0])
    path = tmp_path / IDS[0] / name
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"x": 1}))
    read = {"recipe.json": run.recipe, "spec.json": run.spec}[name]
    with pytest.raises(NewerVersionError, match=f"{name} was written by a newer version of rsb-cluster: 'x' in it"):
        read()
    path.write_text("{")
    with pytest.raises(StorageError, match=f"{name} is not JSON"):
        read()


def test_another_science_in_a_runs_folder_is_refused(tmp_path):
    run, _ = make(tmp_path, IDS[0])
    check_same_recipe(run, catalog.load_recipe("a1").recipe)
    check_same_recipe(
        run,
        catalog.load_recipe(
            "a1", overrides=parse_overrides(["description=other", "paper=", "train.virtual_ranks=4"])
        ).recipe,
    )
    with pytest.raises(StorageError, match=r"recipe\.json is not the recipe of its run id"):
        check_same_recipe(run, catalog.load_recipe("a1", overrides=parse_overrides(["optimizer.lr=1"])).recipe)


def test_a_run_is_readable_by_its_owner_alone(tmp_path):
    before = os.umask(0o022)
    try:
        run, _ = make(tmp_path / "runs", IDS[0])
    finally:
        os.umask(before)
    assert Path(run.url).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("content", [b"[]", b"5", b'"x"', b"null", b'{"top1": "high"}', b'{"steps": [1]}'])
def test_a_result_that_is_none_is_named_by_every_command(tmp_path, content):
    run = make_run(tmp_path)
    run.store.write_bytes("result.json", content)
    for command in (["runs", "show", run.run_id], ["compare", run.run_id, run.run_id], ["status"], ["collect"]):
        done = CliRunner().invoke(main, [*command, "--runs", str(tmp_path)])
        assert isinstance(done.exception, SystemExit | None) and "result.json" in done.output, (command, done.output)
