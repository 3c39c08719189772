"""Cloud runs seen from the login side. SkyPilot itself is in tests/integration/test_skypilot.py: here stands a table of
what it would say in its one module's place, and everything else is real."""

import contextlib
import json
import signal
import threading
import time

import pytest
import submitit
from rich.console import Console
from submitit.core import plugins

from rsb_cluster import backends
from rsb_cluster.backends import skypilot
from rsb_cluster.backends.skypilot import engine
from rsb_cluster.backends.skypilot.engine import EngineJob
from rsb_cluster.backends.skypilot.plugin import SkyExecutor, SkyJob, SkyJobEnvironment
from rsb_cluster.checks.doctor import examine
from rsb_cluster.config import catalog
from rsb_cluster.errors import ConfigError, SubmitError
from rsb_cluster.monitor import actions, logs
from rsb_cluster.monitor.status import read_status
from rsb_cluster.monitor.watch import follow, table
from rsb_cluster.node.node_spec import SPEC_SHA256, SPEC_URL, decode
from rsb_cluster.node.task import Task
from rsb_cluster.runs import lease
from rsb_cluster.runs.run import Attempt, Run, Spec
from rsb_cluster.storage.store import Store
from tests.unit.backends.skypilot.test_sky_task import load_job
from tests.unit.monitor.test_status import Presser


class Engine:
    """SkyPilot's table of managed jobs."""

    def __init__(self):
        self.table: dict[str, EngineJob] = {}
        self.tasks: list[dict] = []
        self.pools: list[str] = []
        self.calls = 0

    def launch(self, tasks, *, pool):
        for task in tasks:
            self.tasks.append(task)
            self.pools.append(pool)
            self.table[task["name"]] = EngineJob(len(self.tasks), "PENDING", 0, "")

    def jobs(self):
        self.calls += 1
        return dict(self.table)

    def cancel(self, names):
        for name in names:
            self.say(name, "CANCELLED")

    def say(self, name, state, recoveries=0, reason=""):
        self.table[name] = EngineJob(self.table[name].number, state, recoveries, reason)


@pytest.fixture
def sky(monkeypatch):
    made = Engine()
    for name in ("launch", "jobs", "cancel"):
        monkeypatch.setattr(engine, name, getattr(made, name))
    monkeypatch.setattr(engine, "check_installed", lambda: None)
    return made


def make_run(folder, seed=0) -> Run:
    run = Run.at(folder, f"digits-s{seed}")
    spec = Spec(run_id=run.run_id, seed=seed, virtual_ranks=2, data="/data", train_digest="t", val_digest="v")
    run.create(catalog.load_recipe("digits").recipe, spec)
    return run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "runs")


def task_of(run: Run, *assignments: str) -> Task:
    return Task(run.url, run.run_id, load_job("cloud-spot", *assignments).model_dump(mode="json"))


def launch(run: Run, tmp_path, *assignments: str):
    (sent,) = backends.launch(load_job("cloud-spot", *assignments), [task_of(run, *assignments)], tmp_path / "x", "a1")
    return sent


def attempt(run: Run, job_id: str, number: int, cause="", message=""):
    run.write_attempt(
        Attempt(
            number=number, job_id=job_id, world_size=1, hosts=("n1",), started=time.time(), start_step=0,
            ended=time.time() if cause else 0.0, cause=cause, message=message,
        )
    )  # fmt: skip


# --- the plugin -----------------------------------------------------------------------------------------------------


def test_submitit_finds_the_plugin_and_never_takes_it_unasked():
    assert plugins.get_executors()["sky"] is SkyExecutor
    assert isinstance(plugins.get_job_environments()["sky"], SkyJobEnvironment)
    assert SkyExecutor.affinity() == 0
    assert submitit.AutoExecutor("x").cluster != "sky"
    assert submitit.AutoExecutor("x", cluster="sky").cluster == "sky"


def test_a_rank_learns_who_it_is(monkeypatch):
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
    with pytest.raises(ConfigError, match="takes no nodes; it stands in the task's job"):
        SkyExecutor(tmp_path).update_parameters(nodes=3)
    assert not sky.tasks and not list(tmp_path.iterdir())


def test_all_that_is_written_lies_in_the_run_and_nothing_of_it_is_a_pickle(sky, run, tmp_path, monkeypatch):
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


def test_a_job_is_on_record_before_the_engine_knows_of_it(sky, run, tmp_path, monkeypatch):
    def refuse(tasks, *, pool):
        assert [s.job_id for s in run.submissions()] == [tasks[0]["name"]]
        raise SubmitError("SkyPilot: no")

    monkeypatch.setattr(engine, "launch", refuse)
    with pytest.raises(SubmitError, match="SkyPilot: no"):
        launch(run, tmp_path)
    assert read_status([run])[0].state == "never started"


def test_a_job_is_done_when_its_run_is_or_the_engine_gives_it_up(sky, run, tmp_path):
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


# --- status, logs, cancel, preempt ----------------------------------------------------------------------------------


def test_status_asks_once_and_shows_the_engines_own_word(sky, tmp_path):
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


def test_logs_come_from_the_runs_folder_without_the_engine(sky, run, tmp_path):
    sent = launch(run, tmp_path)
    sky.calls = 0
    attempt(run, "rsb-earlier", 1, "failed")
    run.store.write_bytes("logs/0001-rank00000.log", b"another job\n")
    with pytest.raises(ConfigError, match="there is no log of rank 0"):
        list(logs.read_log(run, rank=0, attempt=0, follow=False))
    attempt(run, sent.job_id, 2, "preempted")
    run.store.write_bytes("logs/0002-rank00000.log", b"first\n")
    assert "".join(logs.read_log(run, rank=0, attempt=0, follow=False)) == "first\n"
    attempt(run, sent.job_id, 3, "finished")
    run.store.write_bytes("logs/0003-rank00000.log", b"second\n")
    assert "".join(logs.read_log(run, rank=0, attempt=0, follow=True)) == "first\nsecond\n"
    assert backends.read_log(run, sent, 0, 6) == b"second\n"
    assert sky.calls == 0


def test_a_running_attempt_is_asked_to_save_before_its_machines_go(sky, run, tmp_path, monkeypatch):
    sent = launch(run, tmp_path)
    sky.say(sent.job_id, "RUNNING")
    attempt(run, sent.job_id, 1)
    ended = []

    def rank_0():
        while not run.is_asked_to_end(1):
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
    assert sky.table[sent.job_id].state == "CANCELLED" and not run.is_asked_to_end(1)


def test_both_jobs_of_a_run_are_cancelled(sky, run, tmp_path):
    jobs = tuple(launch(run, tmp_path).job_id for _ in range(2))
    assert actions.cancel([run]) == {run.run_id: jobs}
    assert {sky.table[job].state for job in jobs} == {"CANCELLED"}
    assert all(run.is_cancelled(job) for job in jobs)


def test_an_engine_that_refuses_leaves_no_word_of_an_end(sky, run, tmp_path, monkeypatch):
    def refuse(names):
        assert run.is_cancelled(names[0])
        raise SubmitError("SkyPilot: no")

    sent = launch(run, tmp_path)
    monkeypatch.setattr(engine, "cancel", refuse)
    with pytest.raises(SubmitError, match=rf"not told to end: job {sent.job_id} \({run.run_id}\): SkyPilot: no"):
        actions.cancel([run])
    assert not run.store.exists("cancelled.json")


def test_ctrl_c_ends_the_waiting_and_not_the_run(sky, run, tmp_path):
    sent = launch(run, tmp_path)
    screen = Presser(": queued")
    assert follow([run], Console(file=screen)) is None
    assert "Saving" not in screen.getvalue()
    assert sky.table[sent.job_id].state == "PENDING" and not run.cancelled()


def test_a_preempted_attempt_is_asked_and_its_job_goes_on(sky, run, tmp_path):
    sent = launch(run, tmp_path)
    sky.say(sent.job_id, "RUNNING")
    attempt(run, sent.job_id, 1, "preempted")
    attempt(run, sent.job_id, 2)
    actions.preempt([run])
    assert run.is_asked_to_end(2) and not run.is_asked_to_end(1)
    assert sky.table[sent.job_id].state == "RUNNING" and run.attempt_numbers() == [1, 2]


def test_rank_0_hears_of_it_with_its_next_sign_of_life_and_once(run, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    held = lease.take(run, Attempt(number=0, job_id="7", world_size=1, hosts=("n",), started=time.time(), start_step=0))
    try:
        held.keep_alive(lambda: 1, lambda: None)
        time.sleep(0.3)
        assert not heard
        run.ask_to_end(1)
        deadline = time.monotonic() + 10
        while not heard and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        assert heard == [signal.SIGTERM]
    finally:
        held.release()
        signal.signal(signal.SIGTERM, before)


def test_retry_sends_it_as_it_was(sky, run, tmp_path):
    sent = launch(run, tmp_path, "nodes=2", "cloud.pool=mine")
    sky.say(sent.job_id, "FAILED")
    done = actions.retry([run], failed_only=True)
    assert not done.refused and done.sent[run.run_id] != sent.job_id
    assert sky.tasks[1]["num_nodes"] == 2 and sky.pools == ["mine", "mine"]


# --- what is refused ------------------------------------------------------------------------------------------------


def script(url, count=1, *assignments):
    job = load_job("cloud-spot", *assignments)
    return skypilot.script(
        job, [Task(f"{url}/r{i}", f"r{i}", job.model_dump(mode="json")) for i in range(count)], None, ""
    )


def test_runs_must_be_where_the_machines_reach_them():
    with pytest.raises(ConfigError, match="machines of a cloud cannot reach /runs/r0"):
        script("/runs")


def test_so_many_at_once_need_a_pool():
    with pytest.raises(
        ConfigError, match=r"3 runs, of which 2 at once .* use --set job.cloud.pool=NAME; .* with --parallel 3"
    ):
        script("s3://b/runs", 3, "array_parallelism=2")
    assert "name: rsb-ID" in script("s3://b/runs", 3, "array_parallelism=2", "cloud.pool=two")


def test_a_variable_to_hand_over_must_be_set(monkeypatch):
    monkeypatch.setattr(engine, "check_installed", lambda: None)
    job = load_job("cloud-spot", "cloud.secrets=['WANDB_API_KEY']")
    with pytest.raises(ConfigError, match="WANDB_API_KEY is not set in this shell"):
        skypilot.check_available(job)
    monkeypatch.setenv("WANDB_API_KEY", "geheim")
    skypilot.check_available(job)
    assert "geheim" not in script("s3://b/runs", 1, "cloud.secrets=['WANDB_API_KEY']")


def test_without_skypilot_it_is_said_how_to_get_it():
    with contextlib.suppress(ImportError):
        import sky  # noqa: F401

        pytest.skip("SkyPilot is installed here")
    with pytest.raises(SubmitError, match=r"Use pip install 'rsb-cluster\[cloud\]', then 'sky check'"):
        skypilot.check_available(load_job("cloud"))


# --- a dry run, and doctor ------------------------------------------------------------------------------------------


def test_a_dry_run_needs_no_network(rsb, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim")
    monkeypatch.setenv("HOME", str(tmp_path))
    done = rsb.run(
        "submit", "--recipe=digits", "--job=cloud-spot", "--nodes=2", "--gpus-per-node=1", "--dry-run",
        "--set=job.cloud.accelerators=H100", "--set=job.cloud.price=10", "--images-per-s=100",
        "--runs=s3://bucket/runs", "--data=s3://bucket/digits",
    )  # fmt: skip
    assert "2 nodes × 1 GPUs = 2 ranks, back end cloud" in done.stdout
    assert "in each run's folder: submissions/ (spec and task), code/ (this package as a wheel), logs/" in done.stdout
    assert "$10.00 a node and hour (job.cloud.price)" in done.stdout
    assert "--- SkyPilot task ---\nname: rsb-ID\nnum_nodes: 2\n" in done.stdout
    assert "note: the data could not be looked for" in done.stdout
    assert "geheim" not in done.stdout + done.stderr


def findings(job, **options):
    return {finding.what: finding for finding in examine(job, **options)}


def test_doctor_finds_nothing_amiss_with_this_machine(tmp_path, digits):
    found = findings("local", runs=str(tmp_path / "runs"), data=str(digits))
    assert all(finding.is_ok for finding in found.values()), found
    assert "1,438 training images" in found["data"].found
    assert not list((tmp_path / "runs").iterdir())


def test_doctor_says_what_a_cloud_run_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr("rsb_cluster.checks.doctor._answers", lambda url: False)
    monkeypatch.setattr(
        engine, "check_installed", lambda: (_ for _ in ()).throw(SubmitError("it is not here. Get it."))
    )
    found = findings("cloud-spot", runs=str(tmp_path), assignments=("cloud.secrets=['NOT_SET']",))
    wrong = {what for what, finding in found.items() if not finding.is_ok}
    assert wrong == {f"runs in {tmp_path}", "secrets", "SkyPilot", "API server", "clouds", "network"}
    assert found["SkyPilot"].advice == "Get it."
    assert "packages pinned" in found["code"].found


@pytest.mark.s3
def test_doctor_looks_into_a_bucket(s3, s3_bucket, monkeypatch):
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{s3_bucket}/runs"
    found = findings("local", runs=url)[f"runs in {url}"]
    assert found.is_ok and "one wins" in found.found
    assert Store(url).names() == []
    for_cloud = findings("cloud", runs=url)[f"runs in {url}"]
    assert "writable, but only here" in for_cloud.found, "nodes cannot reach an address of this machine's own"


def test_doctor_answers_scripts(rsb, tmp_path):
    done = rsb.run("doctor", "--job", "local", "--runs", str(tmp_path / "runs"), "--json")
    assert all(finding["ok"] for finding in json.loads(done.stdout))
    assert not list((tmp_path / "runs").iterdir())


def test_a_log_can_be_followed_while_it_grows(run, monkeypatch):
    """Where nodes share no file system, the run's folder is the only place to look."""
    import logging

    from rsb_cluster.node.ranks import Ranks
    from rsb_cluster.train import logfile

    monkeypatch.setattr(logfile, "COPY_S", 0.05)
    name = "logs/0001-rank00000.log"

    def until(text: bytes) -> bool:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if run.store.exists(name) and text in run.store.read_bytes(name):
                return True
            time.sleep(0.05)
        return False

    ranks = Ranks(rank=0, local_rank=0, world_size=1, job_id="7", restart=0, held=1)
    with logfile.logging_to(run.store, ranks) as log_file:
        log_file.keep_copying()
        logging.getLogger("rsb_cluster").info("step 1, AWS_SECRET_ACCESS_KEY=geheim")
        time.sleep(0.2)
        assert not run.store.exists(name), "the attempt has no number yet"
        log_file.name = name
        assert until(b"step 1")
        logging.getLogger("rsb_cluster").info("step 2")
        assert until(b"step 2")
        logging.getLogger("rsb_cluster").info("step 3")
    content = run.store.read_bytes(name)
    assert content.count(b"step 3") == content.count(b"step 1") == 1 and b"geheim" not in content
