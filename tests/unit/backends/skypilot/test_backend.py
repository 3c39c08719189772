"""Cloud runs from the submitting side: status, cancel, preempt, and what is refused.

SkyPilot itself is tested in tests/integration/test_skypilot.py. Here a table of its answers replaces the module that
calls it, and everything else is real.
"""

import contextlib
import threading
import time

import pytest
from rich.console import Console

from rsb_cluster.backends.skypilot import backend as skypilot
from rsb_cluster.backends.skypilot import engine
from rsb_cluster.errors import ConfigError, SubmitError
from rsb_cluster.monitor import actions
from rsb_cluster.monitor.status import read_status
from rsb_cluster.monitor.watch import follow, table
from rsb_cluster.node.task import Task
from tests.unit.bundled import load_job
from tests.unit.new_runs import make_run
from tests.unit.presser import Presser
from tests.unit.sky_jobs import attempt, launch

# --- status, cancel, preempt ------------------------------------------------------------------------------------------


def test_status_queries_once_and_shows_the_engines_own_state(sky, tmp_path):
    runs = [make_run(tmp_path / "runs", seed=seed) for seed in range(4)]
    ids = [launch(run, tmp_path).job_id for run in runs]
    sky.say(ids[1], "RUNNING")
    attempt(runs[1], ids[1], 1)
    sky.say(ids[2], "RECOVERING", 2)
    attempt(runs[2], ids[2], 1, "preempted", "aws takes n1 back")
    sky.say(ids[3], "FAILED_SETUP", reason="the node could not be set up")
    sky.calls = 0
    found = read_status(runs)
    assert sky.calls == 1
    assert [status.state for status in found] == ["queued", "running", "queued", "never started"]
    assert [status.engine for status in found] == [
        "sky 1 PENDING", "sky 2 RUNNING", "sky 3 RECOVERING (2 recovered)", "sky 4 FAILED_SETUP",
    ]  # fmt: skip
    assert found[3].cause == "the node could not be set up"
    assert [column.header for column in table(found, 200).columns][:3] == ["run", "state", "engine"]
    del sky.table[ids[0]]
    assert read_status(runs[:1])[0].state == "never started"
    assert "engine" not in [column.header for column in table(read_status(runs[:1]), 200).columns]


def test_a_running_attempt_saves_before_its_machines_are_released(sky, run, tmp_path, monkeypatch):
    sent = launch(run, tmp_path)
    sky.say(sent.job_id, "RUNNING")
    attempt(run, sent.job_id, 1)
    ended = []

    def rank_0():
        while not run.is_stop_requested(1):
            time.sleep(0.05)
        assert run.is_cancelled(sent.job_id) and sky.table[sent.job_id].state == "RUNNING"
        attempt(run, sent.job_id, 1, "stopped")
        ended.append(True)

    monkeypatch.setattr(skypilot, "_POLL_S", 0.05)
    thread = threading.Thread(target=rank_0)
    thread.start()
    assert actions.cancel([run]) == {run.run_id: (sent.job_id,)}
    thread.join()
    assert ended and sky.table[sent.job_id].state == "CANCELLED"


def test_a_queued_job_is_cancelled_at_once(sky, run, tmp_path, monkeypatch):
    sent = launch(run, tmp_path)
    attempt(run, "rsb-earlier", 1)
    monkeypatch.setattr(skypilot.time, "sleep", lambda seconds: pytest.fail("waits"))
    actions.cancel([run])
    assert sky.table[sent.job_id].state == "CANCELLED" and not run.is_stop_requested(1)


def test_both_jobs_of_a_run_are_cancelled(sky, run, tmp_path):
    jobs = tuple(launch(run, tmp_path).job_id for _ in range(2))
    assert actions.cancel([run]) == {run.run_id: jobs}
    assert {sky.table[job].state for job in jobs} == {"CANCELLED"}
    assert all(run.is_cancelled(job) for job in jobs)


def test_an_engine_that_refuses_leaves_no_cancel_request(sky, run, tmp_path, monkeypatch):
    def refuse(names):
        assert run.is_cancelled(names[0])
        raise SubmitError("SkyPilot: no")

    sent = launch(run, tmp_path)
    monkeypatch.setattr(engine, "cancel", refuse)
    with pytest.raises(SubmitError, match=rf"could not cancel job {sent.job_id} \({run.run_id}\): SkyPilot: no"):
        actions.cancel([run])
    assert not run.store.exists("cancelled.json")


def test_ctrl_c_stops_the_display_and_not_the_run(sky, run, tmp_path):
    sent = launch(run, tmp_path)
    screen = Presser(": queued")
    assert follow([run], Console(file=screen)) is None
    assert "Saving" not in screen.getvalue()
    assert sky.table[sent.job_id].state == "PENDING" and not run.cancelled()


def test_a_preempted_attempt_is_stopped_and_its_job_continues(sky, run, tmp_path):
    sent = launch(run, tmp_path)
    sky.say(sent.job_id, "RUNNING")
    attempt(run, sent.job_id, 1, "preempted")
    attempt(run, sent.job_id, 2)
    actions.preempt([run])
    assert run.is_stop_requested(2) and not run.is_stop_requested(1)
    assert sky.table[sent.job_id].state == "RUNNING" and run.attempt_numbers() == [1, 2]


# --- what is refused ------------------------------------------------------------------------------------------------


def script(url, count=1, *assignments):
    job = load_job("cloud-spot", *assignments)
    return skypilot.SkyPilot().script(
        job, [Task(f"{url}/r{i}", f"r{i}", job.model_dump(mode="json")) for i in range(count)], None, ""
    )


def test_the_machines_must_reach_the_runs_folder():
    with pytest.raises(ConfigError, match="cloud machines cannot reach /runs/r0"):
        script("/runs")


def test_a_limit_of_concurrent_runs_needs_a_pool():
    with pytest.raises(
        ConfigError, match=r"3 runs, at most 2 concurrent .* use --set job.cloud.pool=NAME; .* with --parallel 3"
    ):
        script("s3://b/runs", 3, "array_parallelism=2")
    assert "name: rsb-ID" in script("s3://b/runs", 3, "array_parallelism=2", "cloud.pool=two")


def test_a_secret_must_be_set(monkeypatch):
    monkeypatch.setattr(engine, "check_installed", lambda: None)
    job = load_job("cloud-spot", "cloud.secrets=['WANDB_API_KEY']")
    with pytest.raises(ConfigError, match="WANDB_API_KEY is not set in this shell"):
        skypilot.SkyPilot().check_available(job)
    monkeypatch.setenv("WANDB_API_KEY", "geheim")
    skypilot.SkyPilot().check_available(job)
    assert "geheim" not in script("s3://b/runs", 1, "cloud.secrets=['WANDB_API_KEY']")


def test_without_skypilot_the_error_says_how_to_install_it():
    with contextlib.suppress(ImportError):
        import sky  # noqa: F401

        pytest.skip("SkyPilot is installed here")
    with pytest.raises(SubmitError, match=r"Use pip install 'rsb-cluster\[cloud\]', then 'sky check'"):
        skypilot.SkyPilot().check_available(load_job("cloud"))
