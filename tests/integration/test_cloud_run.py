"""A cloud run from submit to the table, with a real S3 server: only SkyPilot and its machine are replaced.

In their place a thread runs the shell lines of the task, as SkyPilot would on a node, and restarts them for the same
exit codes as SkyPilot. The real SkyPilot is tested in test_skypilot.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner

from rsb_cluster.backends.skypilot import backend as skypilot
from rsb_cluster.backends.skypilot import engine
from rsb_cluster.backends.skypilot.engine import EngineJob
from rsb_cluster.cli import main
from rsb_cluster.config.catalog import find
from rsb_cluster.runs.metrics import read_rows
from rsb_cluster.runs.run import Run
from tests.command import RsbCluster
from tests.commands_of import as_printed
from tests.servers.daemons import GUARD_S

pytestmark = pytest.mark.s3

# uv, but with this environment instead of packages from an index.
UV = f"""#!/bin/bash
[ "$1" = venv ] || exit 0
mkdir -p "${{@: -1}}/bin"
printf '#!/bin/bash\\nexec "{sys.executable}" "$@"\\n' >"${{@: -1}}/bin/python"
chmod +x "${{@: -1}}/bin/python"
"""


# The smallest machine of a cloud.
JOB = """
name = "cloud-spot"
backend = "cloud"
gpus_per_node = 0
tasks_per_node = 1
cpus_per_task = 1
loader_workers = 0
log_every_steps = 5
notice = ""

[cloud]
spot = true
"""


class OneMachine:
    """The part of SkyPilot that is used, on this machine: one node, no other jobs."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.table: dict[str, EngineJob] = {}
        self.process: subprocess.Popen[bytes] | None = None
        uv = home / ".local" / "bin" / "uv"
        uv.parent.mkdir(parents=True)
        uv.write_text(UV)
        uv.chmod(0o755)

    def launch(self, tasks: list[dict], *, pool: str) -> None:
        for task in tasks:
            self.say(task["name"], "PENDING")
            threading.Thread(target=self._run, args=(task,), daemon=True).start()

    def jobs(self) -> dict[str, EngineJob]:
        return dict(self.table)

    def cancel(self, names: list[str]) -> None:
        for name in names:
            if self.table[name].state in ("PENDING", "RUNNING", "RECOVERING"):
                self.say(name, "CANCELLED")
                if self.process is not None:
                    os.killpg(self.process.pid, signal.SIGKILL)  # the machine is given back

    def say(self, name: str, state: str, recoveries: int = 0) -> None:
        self.table[name] = EngineJob(1, state, recoveries, "")

    def _run(self, task: dict) -> None:
        node = {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_IPS": "127.0.0.1"}
        env = os.environ | {"HOME": str(self.home)} | task["envs"] | node
        again, name = task["resources"]["job_recovery"]["recover_on_exit_codes"], task["name"]
        for recoveries in range(5):
            self.say(name, "RUNNING", recoveries)
            with (self.home / "node.log").open("ab") as log:
                lines = ["bash", "-c", task["setup"] + "\nset +e\n" + task["run"]]
                self.process = subprocess.Popen(lines, env=env, stdout=log, stderr=log, start_new_session=True)
                code = self.process.wait()
            if self.table[name].state == "CANCELLED":
                return
            if code not in again:
                self.say(name, "FAILED" if code else "SUCCEEDED", recoveries)
                return
            self.say(name, "RECOVERING", recoveries + 1)


@pytest.fixture
def machine(tmp_path, s3, monkeypatch):
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    made = OneMachine(tmp_path / "home")
    for name in ("launch", "jobs", "cancel"):
        monkeypatch.setattr(engine, name, getattr(made, name))
    monkeypatch.setattr(engine, "check_installed", lambda: None)
    yield made
    if made.process is not None and made.process.poll() is None:
        os.killpg(made.process.pid, signal.SIGKILL)


def rsb(*arguments: str) -> str:
    done = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def wait_for(what: str, machine: OneMachine, predicate: Callable[[], object], timeout: float = GUARD_S) -> None:
    deadline = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout} s: {what}\n{(machine.home / 'node.log').read_text()[-5000:]}")
        time.sleep(0.5)


def test_a_cloud_run_is_preempted_resumes_is_cancelled_and_finishes(machine, s3, s3_bucket, digits, monkeypatch):
    monkeypatch.setattr(skypilot, "_POLL_S", 0.5)
    monkeypatch.chdir(machine.home)
    held = RsbCluster(machine.home, {})
    held.hold(6)
    for name in ("PYTHONPATH", "RSB_TEST_TRAINER"):
        monkeypatch.setenv(name, held.env[name])
    data, runs = f"s3://{s3_bucket}/digits", f"s3://{s3_bucket}/runs"
    s3.upload(digits, data)
    assert as_printed("export RSB_RUNS=s3://bucket/runs") == ["RSB_RUNS=s3://bucket/runs"]
    monkeypatch.setenv("RSB_RUNS", runs)
    Path("jobs").mkdir()
    Path("jobs/cloud-spot.toml").write_text(JOB)
    Path("recipes").mkdir()
    digits_recipe = find("recipes", "digits").read_text().replace('name = "digits"', 'name = "a1"', 1)
    Path("recipes/a1.toml").write_text(digits_recipe.replace("epochs = 25 ", "epochs = 4 ", 1))
    submit = ("submit", "--recipe", "a1", "--model", "test_resnet", "--job", "cloud-spot", "--data", data)
    run = Run.at(runs, rsb(*submit).strip())
    assert run.run_id.startswith("a1-test_resnet-s0-")

    def steps(attempt: int) -> int:
        heartbeat = run.heartbeat(attempt)
        return heartbeat.step if heartbeat is not None else 0

    wait_for("steps", machine, lambda: steps(1) == 6)
    rsb(*as_printed("rsb-cluster preempt a1"))
    wait_for("a second attempt", machine, lambda: run.attempt_numbers() == [1, 2])
    first = run.attempt(1)
    assert first.cause == "preempted" and first.end_step > 5
    held.allow(first.end_step + 5)
    wait_for("it resumes", machine, lambda: steps(2) == first.end_step + 5)
    assert "sky 1 RUNNING (1 recovered)" in rsb(*as_printed("rsb-cluster status"))

    rsb(*as_printed("rsb-cluster cancel a1"))
    second = run.attempt(2)
    assert (second.cause, second.start_step) == ("stopped", first.end_step)
    wait_for("the machine is given back", machine, lambda: machine.process.poll() is not None)

    held.allow()
    rsb(*submit)
    assert "attempt 3" in rsb(*as_printed("rsb-cluster logs -f a1")), "it ends with the run"
    wait_for("the end", machine, lambda: run.result())
    wait_for("the engine knows", machine, lambda: list(machine.table.values())[-1].state == "SUCCEEDED")
    assert [a.cause for a in run.attempts()] == ["preempted", "stopped", "finished"]
    rows = [row["step"] for row in read_rows(run) if row["kind"] == "train"]
    assert rows == sorted(set(rows)), "no step twice"

    evaluation = Run.at(f"{runs}/evaluation-jobs", rsb("evaluate", "a1", "--job", "cloud-spot").strip())
    wait_for("the evaluation", machine, lambda: evaluation.result())
    collected = json.loads(rsb("collect", "--json"))
    ((evaluated,),) = ([e["values"]["top1"] for e in line["evaluations"]] for line in collected["evaluations"])
    assert evaluated == pytest.approx(run.result()["top1"]), "on the run's own data"
    assert "test_resnet" in rsb(*as_printed("rsb-cluster collect"))

    store = fsspec.filesystem("s3", endpoint_url=s3.endpoint)
    left = store.find(runs)
    assert not [name for name in left if name.endswith(".pkl")]
    assert len([name for name in left if name.endswith(".whl")]) == 2, "of the run, and of its evaluation"
    ours = (run.run_id, f"evaluations/{run.run_id}", f"evaluation-jobs/{evaluation.run_id}")
    assert all(name.startswith(tuple(f"{s3_bucket}/runs/{one}/" for one in ours)) for name in left)
    secret = s3.env["AWS_SECRET_ACCESS_KEY"].encode()
    assert not [name for name in left if secret in store.cat_file(name)]
