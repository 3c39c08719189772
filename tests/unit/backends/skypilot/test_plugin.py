"""submitit's plugin for SkyPilot: the environment of a rank, and what is written before a job is submitted."""

import pytest
import submitit
from submitit.core import plugins

from rsb_cluster.backends.skypilot import engine
from rsb_cluster.backends.skypilot.plugin import SkyExecutor, SkyJob, SkyJobEnvironment
from rsb_cluster.errors import ConfigError, SubmitError
from rsb_cluster.monitor.status import read_status
from rsb_cluster.node.node_spec import SPEC_SHA256, SPEC_URL, decode
from tests.unit.sky_jobs import attempt, launch, task_of


def test_submitit_finds_the_plugin_and_never_chooses_it_automatically():
    assert plugins.get_executors()["sky"] is SkyExecutor
    assert isinstance(plugins.get_job_environments()["sky"], SkyJobEnvironment)
    assert SkyExecutor.affinity() == 0
    assert submitit.AutoExecutor("x").cluster != "sky"
    assert submitit.AutoExecutor("x", cluster="sky").cluster == "sky"


def test_a_rank_reads_its_environment(monkeypatch):
    said = {
        "SUBMITIT_EXECUTOR": "sky", "RSB_JOB_ID": "rsb-1", "RSB_RANK": "5", "RSB_LOCAL_RANK": "1",
        "RSB_WORLD_SIZE": "8", "SKYPILOT_NODE_RANK": "2", "SKYPILOT_NUM_NODES": "4",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3\n10.0.0.4",
    }  # fmt: skip
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    env = submitit.JobEnvironment()
    assert (env.cluster, env.job_id, env.global_rank, env.local_rank) == ("sky", "rsb-1", 5, 1)
    assert (env.num_tasks, env.node, env.num_nodes, env.hostnames[2]) == (8, 2, 4, "10.0.0.3")


@pytest.mark.parametrize("wrong", [print, lambda: None, "text"])
def test_the_executor_takes_nothing_but_our_task(sky, tmp_path, wrong):
    with pytest.raises(ConfigError, match="takes an rsb_cluster Task, not"):
        SkyExecutor(tmp_path).submit(wrong)
    with pytest.raises(ConfigError, match="has no parameter nodes; set it in the task's job"):
        SkyExecutor(tmp_path).update_parameters(nodes=3)
    assert not sky.tasks and not list(tmp_path.iterdir())


def test_all_files_are_in_the_runs_folder_and_none_is_a_pickle(sky, run, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    sent = launch(run, tmp_path)
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    names = sorted(str(path.relative_to(run.url)) for path in written)
    (wheel,) = [name for name in names if name.startswith("code/")]
    assert names == [
        wheel,
        *sorted(
            [f"submissions/{sent.job_id}/spec.json", f"submissions/{sent.job_id}/task.yaml",
             next(name for name in names if name.endswith(f"-{sent.job_id}.json"))]
        ),
    ]  # fmt: skip
    envs = sky.tasks[0]["envs"]
    content = run.store.read_bytes(f"submissions/{sent.job_id}/spec.json")
    spec = decode(content, envs[SPEC_URL], envs[SPEC_SHA256])
    assert spec.submission_id == sent.job_id == sky.tasks[0]["name"]
    assert spec.job == task_of(run).job and spec.code.url == f"{run.url}/{wheel}"
    assert not any(b"geheim" in path.read_bytes() for path in written)
    launch(run, tmp_path)
    assert len(list((tmp_path / "runs").rglob("*.whl"))) == 1
    assert [submission.job_id for submission in run.submissions()] == [task["name"] for task in sky.tasks]


def test_a_submission_is_recorded_before_the_engine_gets_the_job(sky, run, tmp_path, monkeypatch):
    def refuse(tasks, *, pool):
        assert [s.job_id for s in run.submissions()] == [tasks[0]["name"]]
        raise SubmitError("SkyPilot: no")

    monkeypatch.setattr(engine, "launch", refuse)
    with pytest.raises(SubmitError, match="SkyPilot: no"):
        launch(run, tmp_path)
    assert read_status([run])[0].state == "never started"


def test_a_job_is_done_when_its_run_is_or_the_engine_gives_up(sky, run, tmp_path):
    job = SkyExecutor(tmp_path).submit(task_of(run))
    assert isinstance(job, SkyJob) and not job.done(force_check=True)
    attempt(run, job.job_id, 1, "lost peer", "another rank is gone")
    run.write_rank_failure(1, 0, {"cause": "lost peer", "message": "rank 0: gone", "host": "n1", "traceback": ""})
    for state in ("STARTING", "RUNNING", "RECOVERING", "CANCELLING"):
        sky.say(job.job_id, state)
        job.watcher.clear()  # it does not ask twice within a millisecond
        assert not job.done(), state
    sky.say(job.job_id, "FAILED")
    job.watcher.clear()
    assert job.done()
    with pytest.raises(submitit.core.utils.FailedJobError, match="without a result: lost peer another rank is gone"):
        job.results()
    run.store.write_json("result.json", {})
    assert job.results() == [None] and job.exception() is None
