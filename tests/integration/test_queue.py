"""Jobs on a real Slurm that never train: starts that fail, queued jobs that are cancelled, and refused jobs."""

import json
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from rsb_cluster.node import starts
from rsb_cluster.runs.lookup import list_runs
from rsb_cluster.runs.run import Run
from tests.command import RsbCluster
from tests.integration.jobs import DIGITS
from tests.servers.daemons import GUARD_S
from tests.servers.slurm import SlurmCluster

pytestmark = pytest.mark.slurm


@pytest.fixture
def rsb(tmp_path: Path, slurm: SlurmCluster) -> RsbCluster:
    return RsbCluster(tmp_path, slurm.env)


NO_TORCH = """
import sys
class Broken:
    def find_spec(self, name, *_):
        if name == "torch":
            raise ImportError("libcudart.so.13: cannot open shared object file")
sys.meta_path.insert(0, Broken())
"""


def test_starts_that_fail_before_training_are_delayed_and_then_fail(
    rsb: RsbCluster, slurm: SlurmCluster, digits: Path
) -> None:
    """Torch cannot be imported. To save time, the test records some of the starts itself."""
    (rsb.cwd / "broken").mkdir()
    (rsb.cwd / "broken" / "sitecustomize.py").write_text(NO_TORCH)
    broken = f'export PYTHONPATH="{rsb.cwd}/broken:$PYTHONPATH"'
    run_id = rsb("submit", *DIGITS, "--data", str(digits), "--set", f"job.setup={json.dumps([broken])}").strip()
    run = Run.at(rsb.cwd / "runs", run_id)
    (submission,) = run.submissions()
    job, counted = submission.job_id, Path(submission.folder) / f"{submission.job_id}_starts"
    slurm.wait_for("the first start failed", lambda: (slurm.job_state(job) == "PENDING" and counted.exists()) or None)
    failed = counted.stat().st_mtime  # the delay counts from here or later
    with counted.open("a") as file:
        file.write("0 75\n" * (starts.LIMIT - 2))
    assert slurm.wait_for_state(job, "FAILED") == "FAILED"
    (status,) = rsb.json("status", run_id, "--json")
    assert status["state"] == "never started"
    assert "starts in a row failed before training: ImportError: libcudart.so.13" in status["cause"]
    assert "giving up" in rsb("logs", run_id)
    began = slurm.run("sacct", "-D", "-X", "-n", "-P", "-o", "Start", "-j", job).splitlines()[1]
    assert datetime.fromisoformat(began).timestamp() >= int(failed) + starts.SLURM_DELAY_S, "Slurm's own is some ten"


def test_ctrl_c_leaves_a_queued_job_alone_and_cancel_cancels_all_jobs_of_a_run(
    rsb: RsbCluster, slurm: SlurmCluster, digits: Path
) -> None:
    asked = ("submit", *DIGITS, "--data", str(digits), "--set", "job.slurm.begin=now+1hour")
    command = [sys.executable, "-m", "rsb_cluster", *asked, "--wait"]
    with subprocess.Popen(command, cwd=rsb.cwd, env=rsb.env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if ": queued" in line)
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=GUARD_S)[1]
    assert process.returncode == 130
    run = Run.at(rsb.cwd / "runs", said.partition(":")[0])
    assert rest.splitlines() == [
        "No longer waiting; queued and running jobs continue.",
        f"watch them  rsb-cluster status --watch {run.run_id}",
        f"see a log   rsb-cluster logs -f {run.run_id}",
        f"cancel all  rsb-cluster cancel {run.run_id}",
    ]
    (first,) = run.submissions()
    assert slurm.job_state(first.job_id) == "PENDING" and not run.cancelled()

    # Two concurrent submits leave two jobs: neither knew of the other's.
    record = next((rsb.cwd / "runs" / run.run_id / "submissions").iterdir())
    aside = record.rename(rsb.cwd / record.name)
    rsb(*asked)
    aside.rename(record)
    first, second = run.submissions()
    cancelled = rsb.run("cancel", run.run_id).stderr
    assert cancelled == f"{run.run_id}: cancelled job {first.job_id}, {second.job_id}\n"
    assert [slurm.job_state(job) for job in (first.job_id, second.job_id)] == ["CANCELLED"] * 2
    assert run.is_cancelled(first.job_id) and run.is_cancelled(second.job_id)
    (status,) = rsb.json("status", run.run_id, "--json")
    assert (status["state"], status["cause"]) == ("cancelled", f"cancelled job {second.job_id}")
    assert "nothing to retry" in rsb.run("retry", "--failed", run.run_id).stderr


def test_a_queued_job_is_replaced_alone_and_a_scancel_is_known(
    rsb: RsbCluster, slurm: SlurmCluster, digits: Path
) -> None:
    """Of an array, whose tasks Slurm keeps in one record while they wait."""
    asked = ("submit", *DIGITS, "--data", str(digits), "--set", "job.slurm.begin=now+1hour")
    rsb(*asked, "--seeds", "2")
    runs = list_runs(str(rsb.cwd / "runs"))
    (kept,), (replaced,) = (run.submissions() for run in runs)
    again = rsb.run(*asked, "--seed", "1", "--time", "7")
    assert f"{runs[1].run_id} is queued as job {replaced.job_id}, which keeps time_min = " in again.stderr
    assert "(here 7). --resubmit cancels the queued job" in again.stderr and len(runs[1].submissions()) == 1
    said = rsb.run(*asked, "--seed", "1", "--time", "7", "--resubmit").stderr
    assert f"{runs[1].run_id}: cancelled job {replaced.job_id}; submitted anew\n" in said
    new = runs[1].submissions()[-1]
    waiting = slurm.run("squeue", "-h", "-r", "--states=PENDING", "-o", "%i").split()
    assert kept.job_id in waiting and new.job_id in waiting and replaced.job_id not in waiting
    assert [s["state"] for s in rsb.json("status", "--json")] == ["queued", "queued"]
    slurm.run("scancel", new.job_id)
    slurm.wait_for_state(new.job_id, "CANCELLED")

    def states() -> dict[str, str]:
        return {s["run_id"]: s["state"] for s in rsb.json("status", "--json")}

    expected = {runs[0].run_id: "queued", runs[1].run_id: "cancelled"}
    slurm.wait_for("accounting knows it", lambda: states() == expected or None)
    assert "nothing to retry" in rsb.run("retry", "--failed", runs[1].run_id).stderr
    table = rsb("status", "--state", "cancelled").splitlines()
    assert len(table) == 2 and f"cancelled job {new.job_id}" in table[1]
    pruned = rsb.run("runs", "prune", "--yes")
    assert f"left alone: {runs[0].run_id} is queued" in pruned.stderr
    assert runs[0].exists() and not runs[1].exists(), "it had never started"


def test_a_job_that_slurm_refuses_is_explained(rsb: RsbCluster, digits: Path) -> None:
    message = rsb.error("submit", *DIGITS, "--data", str(digits), "--set", "job.slurm.partition=gpu", code=1)
    assert "sbatch refused the job" in message and "partition" in message
    assert not (rsb.cwd / "runs").exists(), "a refused submit leaves nothing"
