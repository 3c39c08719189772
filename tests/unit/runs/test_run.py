"""Runs are found by what a user types, and their small files are read back as they were written."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rsb_cluster.config import catalog
from rsb_cluster.errors import ConfigError, MissingError, StorageError
from rsb_cluster.runs.run import Attempt, Run, Spec, Submission, check_same, find_named, find_runs, list_runs
from rsb_cluster.runs.sweep import Member, Sweep, list_sweeps, read_sweep, sweep_id, write_sweep

IDS = ("a1-resnet50-s0-00000000", "a1-resnet50-s1-11111111", "a2-resnet50-s0-22222222")


def make(runs, run_id, *assignments):
    run = Run.at(runs, run_id)
    spec = Spec(
        run_id=run_id, seed=3, virtual_ranks=4, data="s3://b/d", train_digest="t", val_digest="v",
        modified={"optimizer.lr": (5e-3, 4e-3), "loss.name": ("bce", "ce")},
        code={"version": "1"}, packages={"torch": "2"}, created=12.5,
    )  # fmt: skip
    run.create(catalog.load_recipe("a1", assignments=assignments).recipe, spec)
    return run, spec


@pytest.fixture
def runs(tmp_path):
    """A folder with three runs, and with what else may lie there."""
    for run_id in IDS:
        make(tmp_path, run_id)
    (tmp_path / "submissions" / "x").mkdir(parents=True)
    (tmp_path / "not-a-run").mkdir()
    (tmp_path / "half-made").mkdir()
    (tmp_path / "half-made" / "recipe.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    return tmp_path


def found(runs, *names):
    return [run.run_id for run in find_runs(str(runs), names)]


def test_without_a_name_all_are_found(runs):
    assert found(runs) == list(IDS)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([IDS[1]], [IDS[1]]),
        ([IDS[1] + "/"], [IDS[1]]),
        (["a1-resnet50-s1"], [IDS[1]]),
        (["a1"], [IDS[0], IDS[1]]),
        (["a1-"], [IDS[0], IDS[1]]),
        (["*s0*"], [IDS[0], IDS[2]]),
        (["a?-resnet50-s[01]-*"], list(IDS)),
        (["a2", "a1"], [IDS[2], IDS[0], IDS[1]]),
        (["a1", IDS[0], "a1*"], [IDS[0], IDS[1]]),
        (["*"], list(IDS)),
    ],
)
def test_a_run_is_found_by_id_beginning_and_glob(runs, names, expected):
    assert found(runs, *names) == expected


def test_a_run_is_found_by_path(runs, tmp_path, monkeypatch):
    assert found("/nonexistent", f"{runs}/{IDS[1]}") == [IDS[1]]
    assert found("/nonexistent", f"{runs}/{IDS[1]}/") == [IDS[1]]
    assert found("/nonexistent", f"file://{runs}/{IDS[1]}") == [IDS[1]]
    monkeypatch.chdir(runs)
    assert found("/nonexistent", f"./{IDS[1]}") == [IDS[1]]
    monkeypatch.chdir(runs.parent)
    (run,) = find_runs("/nonexistent", (f"{runs.name}/{IDS[1]}",))
    assert run.url == f"{runs}/{IDS[1]}"
    with pytest.raises(ConfigError, match="there is no run at x/y"):
        found(runs, "x/y")


def test_an_exact_id_is_not_taken_for_a_beginning(runs):
    make(runs, IDS[0] + "1")
    assert found(runs, IDS[0]) == [IDS[0]]


def test_a_beginning_ends_where_a_word_ends(runs):
    """'cancel a1-resnet50-s1' must not end seed 10, and 'cancel a1' none of the recipe a1h."""
    seeds = [f"a1-resnet50-s{seed}-{seed:08}" for seed in (10, 11, 100)]
    for run_id in (*seeds, "a1h-resnet50-s1-11111111"):
        make(runs, run_id)
    assert found(runs, "a1-resnet50-s1") == found(runs, "a1-resnet50-s1-") == [IDS[1]]
    assert found(runs, "a1-resnet50-s10") == seeds[:1]
    assert sorted(found(runs, "a1")) == sorted([*IDS[:2], *seeds])
    for name in ("a", "a1-res", IDS[1][:-1], "-"):
        with pytest.raises(ConfigError, match="no run or sweep in "):
            found(runs, name)
    with pytest.raises(
        ConfigError, match=rf"matches 'a1-resnet50-s1-1'\. Its last word must be whole: {IDS[1]} begins"
    ):
        found(runs, "a1-resnet50-s1-1")
    with pytest.raises(
        ConfigError, match=r"Its last word must be whole: a1-resnet50-s0-00000000 and 4 more begin so\. "
    ):
        found(runs, "a1-r")
    add_sweep(runs, "depths", *IDS)
    add_sweep(runs, "depths-more", *IDS[:2])
    with pytest.raises(ConfigError, match=r"must be whole: depths-\w+ and 1 more begin so"):
        found(runs, "dep")
    with pytest.raises(ConfigError, match=r"'depths' is the beginning of depths-\w+ and depths-more-\w+\. Say more"):
        found(runs, "depths")
    assert found(runs, "depths-more") == list(IDS[:2])


@pytest.mark.parametrize(
    ("name", "says_several"),
    [("a1", False), ("a1-resnet50", False), (IDS[0], False), ("a1-*", True), ("*", True), ("a1-resnet50-s[0]*", True)],
)
def test_a_glob_or_a_sweep_says_that_several_are_meant(runs, name, says_several):
    (named,) = find_named(str(runs), (name,))
    assert (named.name, named.says_several) == (name, says_several)
    (by_path,) = find_named(str(runs), (f"{runs}/{IDS[0]}",))
    assert not by_path.says_several
    sweep = add_sweep(runs, "depths", *IDS)
    assert [named.says_several for named in find_named(str(runs), ("depths", sweep.sweep_id))] == [True, True]


def test_an_unknown_run_is_refused_with_the_nearest(runs):
    with pytest.raises(ConfigError) as caught:
        found(runs, "a1-resnet50-s0-00000001")
    assert str(caught.value) == (
        f"no run or sweep in {runs} matches 'a1-resnet50-s0-00000001'. Did you mean '{IDS[0]}'? "
        "3 runs are there; 'rsb-cluster status' lists them."
    )
    with pytest.raises(ConfigError, match=r"matches 'zzz'\. 3 runs are there"):
        found(runs, "a1", "zzz")


@pytest.mark.parametrize("name", ["", "/"])
def test_an_empty_name_is_not_all_runs(runs, name):
    """``rsb-cluster cancel "$RUN"`` with a variable that is not set."""
    with pytest.raises(ConfigError, match="a run's name is empty"):
        found(runs, name)


def test_no_folder_of_runs_is_no_runs(tmp_path):
    assert found(tmp_path / "nothing") == []
    with pytest.raises(ConfigError, match="0 runs are there"):
        found(tmp_path / "nothing", "x")


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
    assert run.recipe() == catalog.load_recipe("a1", assignments=["optimizer.lr=4e-3", "model.kwargs.x=[1, 2]"]).recipe
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
    """Of two submits at once one writes; what the other brings is dropped, and it is told."""
    run, spec = make(anywhere.url, IDS[0])
    before = run.store.read_bytes("spec.json")
    again = spec.model_copy(update={"virtual_ranks": 8, "created": 99.0})
    assert run.create(catalog.load_recipe("a1").recipe, again) is False
    assert run.store.read_bytes("spec.json") == before
    other = catalog.load_recipe("a1", assignments=["optimizer.lr=1"]).recipe
    with pytest.raises(StorageError, match=r"recipe\.json is not the recipe that its run id stands for"):
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
        run.create(catalog.load_recipe("a1", assignments=["optimizer.lr=1"]).recipe, spec)
    assert not run.exists()
    assert run.create(catalog.load_recipe("a1").recipe, spec) and run.spec() == spec


def test_all_jobs_that_a_user_ended_are_known(anywhere):
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
    for one in reversed(expected):
        run.add_submission(one)
    assert run.submissions() == expected


def attempt(number):
    return Attempt(number=number, job_id="7", world_size=2, hosts=("a", "b"), started=1.0, start_step=0)


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
def test_a_file_that_was_edited_by_hand_is_named(tmp_path, name):
    run, _ = make(tmp_path, IDS[0])
    path = tmp_path / IDS[0] / name
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"x": 1}))
    read = {"recipe.json": run.recipe, "spec.json": run.spec}[name]
    with pytest.raises(ConfigError, match=f"{name}: unknown key 'x'"):
        read()
    path.write_text("{")
    with pytest.raises(StorageError, match=f"{name} is not JSON"):
        read()


def test_another_science_in_a_runs_folder_is_refused(tmp_path):
    run, _ = make(tmp_path, IDS[0])
    check_same(run, catalog.load_recipe("a1").recipe)
    check_same(run, catalog.load_recipe("a1", assignments=["description=other", "paper="]).recipe)
    with pytest.raises(StorageError, match=r"recipe\.json is not the recipe that its run id stands for"):
        check_same(run, catalog.load_recipe("a1", assignments=["optimizer.lr=1"]).recipe)


# --- sweeps ---------------------------------------------------------------------------------------------------------


def add_sweep(runs, name, *run_ids):
    members = tuple(Member(run_id=i, recipe=i.split("-")[0], model="resnet50", seed=0) for i in run_ids)
    sweep = Sweep(sweep_id=sweep_id(name, run_ids), file="", created=1.5, members=members)
    write_sweep(str(runs), sweep)
    return sweep


def test_a_sweep_is_named_after_all_that_it_asks_for():
    assert sweep_id("x", IDS) == sweep_id("x", reversed(IDS))
    assert len({sweep_id("x", IDS), sweep_id("y", IDS), sweep_id("x", IDS[:2])}) == 3


def test_a_sweep_is_read_as_it_was_written(anywhere):
    assert list_sweeps(anywhere.url) == []
    one, other = add_sweep(anywhere.url, "one", *IDS), add_sweep(anywhere.url, "other", IDS[0])
    assert list_sweeps(anywhere.url) == [one, other]
    assert read_sweep(anywhere.url, "one") == read_sweep(anywhere.url, one.sweep_id) == one
    write_sweep(anywhere.url, one.model_copy(update={"created": 9.0}))
    assert read_sweep(anywhere.url, "one") == one, "sent again, it began with its first submit"
    for name in ("o", "othe"):
        with pytest.raises(ConfigError, match=f"there is no sweep '{name}'"):
            read_sweep(anywhere.url, name)
    two = [add_sweep(anywhere.url, f"two-{which}", *IDS) for which in ("a", "b")]
    with pytest.raises(ConfigError, match=r"'two' is the beginning of 2 sweeps: two-a-\w+, two-b-\w+\."):
        read_sweep(anywhere.url, "two")
    assert read_sweep(anywhere.url, "two-b") == two[1]
    with pytest.raises(ConfigError, match=r"there is no sweep 'othre' in "):
        read_sweep(anywhere.url, "othre")


def test_a_sweep_stands_for_its_runs_with_those_that_are_missing(runs):
    sweep = add_sweep(runs, "depths", IDS[2], "a9-gone-s0-33333333", IDS[0])
    for name in (sweep.sweep_id, "depths"):
        assert found(runs, name) == [IDS[2], "a9-gone-s0-33333333", IDS[0]]
    assert [run.exists() for run in find_runs(str(runs), ("depths",))] == [True, False, True]
    assert found(runs, IDS[1], "depths", IDS[0]) == [IDS[1], IDS[2], "a9-gone-s0-33333333", IDS[0]]
    assert found(runs) == list(IDS), "a sweep's file is no run"


def test_a_name_that_means_a_sweep_and_other_runs_is_refused(runs):
    """'cancel a1' must not end a2's run because a sweep is called a1."""
    sweep = add_sweep(runs, "a1", IDS[0], IDS[2])
    with pytest.raises(ConfigError) as caught:
        found(runs, "a1")
    assert str(caught.value) == (
        f"'a1' is the beginning of {sweep.sweep_id}, and of the ids of 2 runs ('a1-*' names those). "
        "Say more of the one you mean."
    )
    assert found(runs, "a1*") == found(runs, "a1-resnet50") == list(IDS[:2])
    assert found(runs, sweep.sweep_id) == [IDS[0], IDS[2]]


def test_a_name_that_means_a_sweep_and_the_same_runs_is_the_sweep(runs):
    add_sweep(runs, "a1", *IDS[:2], "a1-gone-s0-33333333")
    assert found(runs, "a1") == [*IDS[:2], "a1-gone-s0-33333333"]
    add_sweep(runs, "a1-more", *IDS)
    with pytest.raises(ConfigError, match=r"'a1' is the beginning of a1-\w+ and a1-more-\w+, and of"):
        found(runs, "a1")


def test_a_run_is_readable_by_its_owner_alone(tmp_path):
    before = os.umask(0o022)
    try:
        run, _ = make(tmp_path / "runs", IDS[0])
    finally:
        os.umask(before)
    assert Path(run.url).stat().st_mode & 0o777 == 0o700
