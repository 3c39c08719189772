"""Runs are found by what a user types, and nothing else is."""

import pytest

from rsb_cluster.errors import ConfigError
from rsb_cluster.runs.lookup import find_runs, match_names
from tests.unit.runs.made import IDS, add_sweep, make


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
        ConfigError, match=rf"'a1-resnet50-s1-1'\. {IDS[1]} begins with it, but its last word must be complete\."
    ):
        found(runs, "a1-resnet50-s1-1")
    with pytest.raises(
        ConfigError, match=r"a1-resnet50-s0-00000000 and 4 more begin with it, but its last word must be complete\. "
    ):
        found(runs, "a1-r")
    add_sweep(runs, "depths", *IDS)
    add_sweep(runs, "depths-more", *IDS[:2])
    with pytest.raises(ConfigError, match=r"depths-\w+ and 1 more begin with it"):
        found(runs, "dep")
    with pytest.raises(ConfigError, match=r"'depths' is ambiguous: a prefix of depths-\w+ and depths-more-\w+\. Use a"):
        found(runs, "depths")
    assert found(runs, "depths-more") == list(IDS[:2])


@pytest.mark.parametrize(
    ("name", "is_explicit"),
    [("a1", False), ("a1-resnet50", False), (IDS[0], False), ("a1-*", True), ("*", True), ("a1-resnet50-s[0]*", True)],
)
def test_a_glob_or_a_sweep_says_that_several_are_meant(runs, name, is_explicit):
    (named,) = match_names(str(runs), (name,))
    assert (named.name, named.is_explicit) == (name, is_explicit)
    (by_path,) = match_names(str(runs), (f"{runs}/{IDS[0]}",))
    assert not by_path.is_explicit
    sweep = add_sweep(runs, "depths", *IDS)
    assert [named.is_explicit for named in match_names(str(runs), ("depths", sweep.sweep_id))] == [True, True]


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
    with pytest.raises(ConfigError, match=r"There are no runs in .*nothing"):
        found(tmp_path / "nothing", "x")


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
        f"'a1' is ambiguous: a prefix of {sweep.sweep_id}, and of the ids of 2 runs ('a1-*' matches those). "
        "Use a whole id."
    )
    assert found(runs, "a1*") == found(runs, "a1-resnet50") == list(IDS[:2])
    assert found(runs, sweep.sweep_id) == [IDS[0], IDS[2]]


def test_a_name_that_means_a_sweep_and_the_same_runs_is_the_sweep(runs):
    add_sweep(runs, "a1", *IDS[:2], "a1-gone-s0-33333333")
    assert found(runs, "a1") == [*IDS[:2], "a1-gone-s0-33333333"]
    add_sweep(runs, "a1-more", *IDS)
    with pytest.raises(ConfigError, match=r"'a1' is ambiguous: a prefix of a1-\w+ and a1-more-\w+, and of"):
        found(runs, "a1")
