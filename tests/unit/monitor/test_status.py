"""The status of each run, from its folder and its jobs."""

import pytest

from rsb_cluster.monitor.status import STATES, Status, attention_order, read_status, summary
from rsb_cluster.runs.metrics import MetricsWriter
from rsb_cluster.runs.run import Attempt, Run
from tests.unit.bundled import load_job
from tests.unit.new_runs import make_run
from tests.unit.sweeps import finish, make, planned


@pytest.mark.usefixtures("here")
def test_a_broken_run_does_not_affect_the_others(tmp_path, digits):
    runs = planned(tmp_path, digits)
    finish(make(runs[0], load_job("local")))
    make(runs[1]).store.write_bytes("recipe.json", b"{")
    make(runs[2]).store.write_json("result.json", {"top1": "high"})
    found = read_status([p.run for p in runs])
    assert [status.state for status in found] == ["finished", "broken", "broken", "missing"]
    assert "recipe.json is not JSON" in found[1].cause
    assert "its metrics or result.json" in found[2].cause
    assert (found[0].top1, found[0].step, found[0].total_steps, found[0].images_per_s) == (90, 550, 550, 9.5)


def attempt(number: int, start: int, cause: str = "", message: str = "") -> Attempt:
    return Attempt(
        number=number, job_id="1", world_size=1, hosts=("h",), started=1, start_step=start, cause=cause, message=message
    )  # type: ignore[arg-type]


def row(kind: str, step: int) -> dict[str, object]:
    return {"kind": kind, "step": step, "epoch": step / 22, "loss": 0.5, "images_per_s": 100.0, "top1": step / 10}


@pytest.fixture
def run(tmp_path) -> Run:
    return make_run(tmp_path)


def log(run: Run, number: int, *rows: dict[str, object]) -> None:
    writer = MetricsWriter(run.store, number)
    for one in rows:
        writer.add(one)
    writer.flush()


def test_a_run_that_was_killed_has_the_state_killed(run):
    run.write_attempt(attempt(1, 0, "preempted"))
    run.write_attempt(attempt(2, 30))
    log(run, 1, row("train", 30), row("eval", 30), row("train", 40))
    (status,) = read_status([run])
    assert (status.state, status.cause, status.attempt) == ("killed", "killed", 2)
    assert (status.step, status.total_steps, status.top1, status.eta_s) == (30, 550, 3.0, None)


def test_the_exit_reason_has_cause_and_message(run):
    run.write_attempt(attempt(1, 0, "preempted"))
    run.write_attempt(attempt(2, 30, "failed", "out of [memory]"))
    (status,) = read_status([run])
    assert (status.state, status.cause) == ("failed", "failed (out of [memory])")


def test_a_run_that_was_never_started(run):
    (status,) = read_status([run])
    assert (status.state, status.cause, status.step, status.total_steps) == ("never started", "", 0, 550)


def test_no_runs_have_no_status():
    assert read_status([]) == []


def test_the_summary_begins_with_what_needs_attention():
    found = [Status("r", "/r", state) for state in ("finished", "running", "finished", "failed", "some new cause")]
    assert summary(found) == "5 runs: 1 some new cause, 1 failed, 1 running, 2 finished"
    assert summary(found[:1]) == "1 run: 1 finished"
    assert attention_order("missing") < attention_order("running") < attention_order("finished")
    assert len(set(STATES)) == len(STATES)
