"""What a run folder says: a result that counts, one that does not, or why there is none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from rsb_cluster.results.collect import collect, render
from rsb_cluster.results.collect.rows import describe
from rsb_cluster.runs.run import Run, Submission
from tests.unit.results.collect.made import A3_STEPS, a_recipe, attempt, finish, finished, make_run, only


@pytest.mark.parametrize(
    ("result", "flag"),
    [
        ({"samples": 49984}, "evaluated 49984 images, not 50000"),
        ({"samples": 50016}, "evaluated 50016 images, not 50000"),
        ({"steps": 62000}, "trained 62000 steps, not 62500"),
        ({"seed": 5}, "its result.json is of a3-resnet50-s1 (seed 5, resnet50)"),
        ({"run_id": "other"}, "its result.json is of other (seed 1, resnet50)"),
    ],
)
def test_a_result_that_is_not_of_its_run_is_flagged_and_in_no_mean(
    tmp_path: Path, result: dict[str, Any], flag: str
) -> None:
    runs = [finished(tmp_path, 78.0), finish(make_run(tmp_path, seed=1), 90.0, **result)]
    group = only(collect(runs))
    assert (group.n, group.mean, group.max, group.verdict) == (1, 78.0, 78.0, "reproduced")
    assert [row.flags for row in group.rows] == [(), (flag,)]
    assert flag in render(collect(runs), "table")
    assert flag in render(collect(runs), "md")


def unfinished(run: Run) -> tuple[str, str]:
    collection = collect([run])
    assert all(group.verdict == "no result" and group.n == 0 and not group.rows for group in collection.groups)
    (one,) = collection.unfinished
    assert (one.run_id, one.url) == (run.run_id, run.url)
    return one.state, one.reason


def test_a_run_that_was_never_submitted_is_missing(tmp_path: Path) -> None:
    state, reason = unfinished(Run.at(tmp_path, "a3-resnet50-s9"))
    assert state == "missing"
    assert str(tmp_path / "a3-resnet50-s9") in reason


def test_a_run_that_was_not_sent_says_so(tmp_path: Path) -> None:
    assert unfinished(make_run(tmp_path)) == ("not sent", "no submission is recorded")


def test_a_run_that_has_not_started_names_its_job(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.add_submission(Submission(backend="slurm", job_id="4711", folder="f", shape="1x4", time=1e9))
    assert unfinished(run) == ("queued", "sent to slurm as job 4711; it has not started, or left no trace")


@pytest.mark.parametrize(
    ("last", "state", "reason"),
    [
        ({"cause": ""}, "running", "attempt 2 on node-a; or killed without a last word"),
        ({"cause": "failed", "message": "no space left"}, "failed", "no space left (attempt 2, step 40)"),
        ({"cause": "crashed", "message": "CUDA error"}, "crashed", "CUDA error (attempt 2, step 40)"),
        ({"cause": "stopped"}, "stopped", "stopped (attempt 2, step 40)"),
        ({"cause": "preempted"}, "waiting", "preempted (attempt 2, step 40)"),
        ({"cause": "timed out"}, "waiting", "timed out (attempt 2, step 40)"),
        ({"cause": "lost peer"}, "waiting", "lost peer (attempt 2, step 40)"),
        (
            {"cause": "finished"},
            "no result",
            "its last step is done, but result.json is missing: submit it again (attempt 2, step 40)",
        ),
    ],
)
def test_the_last_attempt_says_why_there_is_no_result(
    tmp_path: Path, last: dict[str, Any], state: str, reason: str
) -> None:
    run = make_run(tmp_path)
    attempt(run, 1, cause="failed", message="an older failure", end_step=10)
    attempt(run, 2, end_step=40, **last)
    assert unfinished(run) == (state, reason)


def test_a_run_without_a_result_never_counts_whatever_its_metrics_say(tmp_path: Path) -> None:
    run = make_run(tmp_path, seed=1)
    attempt(run, cause="failed", message="died in the last step", end_step=A3_STEPS)
    run.store.write_json("metrics/0001-000000.jsonl", {"step": A3_STEPS, "top1": 99.0})
    group = only(collect([finished(tmp_path, 78.0), run]))
    assert (group.n, group.mean) == (1, 78.0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"top1": 78.0', "is not JSON"),
        (b"{}", "'top1' is missing"),
        (b"[]", "result.json"),
    ],
)
def test_a_result_that_cannot_be_read_is_named_and_does_not_count(tmp_path: Path, content: bytes, reason: str) -> None:
    run = make_run(tmp_path)
    run.store.write_bytes("result.json", content)
    state, said = unfinished(run)
    assert state == "broken"
    assert reason in said


@pytest.mark.parametrize("top1", [100.5, -0.1, math.nan, None])
def test_an_accuracy_that_is_no_percentage_does_not_count(tmp_path: Path, top1: Any) -> None:
    state, reason = unfinished(finished(tmp_path, top1))
    assert state == "broken"
    assert "top1" in reason


def test_a_result_of_a_later_version_can_be_read(tmp_path: Path) -> None:
    assert only(collect([finished(tmp_path, 78.0, energy_kwh=3.5)])).n == 1


def test_what_a_result_says_was_trained_is_not_believed_of_another_run(tmp_path: Path) -> None:
    """A result.json that was copied into another run's folder brings its own recipe with it."""
    here, there = make_run(tmp_path), finished(tmp_path, 79.0, a_recipe("name=mine", "paper="))
    here.store.write_bytes("result.json", there.store.read_bytes("result.json"))
    group = only(collect([here]))
    assert (group.recipe, group.n) == ("a3", 0)
    assert group.rows[0].flags == ("its result.json is of mine-resnet50-s0 (seed 0, resnet50)",)


@pytest.mark.parametrize(
    ("now", "state", "tolerance"),
    [
        (1e9 + 3700, "running", ""),
        (1e9 + 7200, "killed", ", more than 5 min ago by the clock of this machine"),
    ],
)
def test_an_attempt_without_an_end_is_taken_for_dead_when_it_is_silent(
    tmp_path: Path, now: float, state: str, tolerance: str
) -> None:
    run = make_run(tmp_path)
    attempt(run)
    run.store.write_json("attempts/0001-alive.json", {"step": 700, "time": 1e9 + 3600, "beats": 360})
    (one,) = collect([run], now=now).unfinished
    heard = "attempt 1 on node-a; last heard of at step 700, 2001-09-09 02:46:40 UTC"
    assert (one.state, one.reason, one.step) == (state, heard + tolerance, 700)


def test_changes_are_spelled_out_without_the_rounding_errors_of_binary() -> None:
    changes = {
        "model.kwargs": ({}, {"drop_rate": 0.1 + 0.2, "k": [1, 2]}),
        "optimizer.lr": (8e-3, 1e-10),
        "x": ("", 2.0),
    }
    assert describe(changes) == (
        "model.kwargs {} → {drop_rate = 0.3, k = [1, 2]}, optimizer.lr 0.008 → 1e-10, x '' → 2.0"
    )
