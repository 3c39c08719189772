"""Jobs on a real Slurm that never train: starts that fail, queued jobs that are cancelled, and refused jobs."""

import json
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from rsb_cluster.node import starts
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
    slurm.wait_for("the first start is counted", lambda: counted.exists() or None)
    with counted.open("a") as file:
        file.write("0 75\n" * (starts.LIMIT - 2))
    assert slurm.wait_for_state(job, "FAILED") == "FAILED"
    (status,) = rsb.json("status", run_id, "--json")
    assert status["state"] == "never started"
    assert "starts in a row failed before training: ImportError: libcudart.so.13" in status["cause"]
    assert "giving up" in rsb("logs", run_id)
    times = slurm.run("sacct", "-D", "-X", "-n", "-P", "-o", "Start,End", "-j", job).splitlines()
    (_, ended), (began, _) = ([datetime.fromisoformat(text) for text in row.split("|")] for row in times[:2])
    assert (began - ended).total_seconds() >= starts.SLURM_DELAY_S - 2, "by itself, Slurm waits for some ten here"


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


def test_a_job_that_slurm_refuses_is_explained(rsb: RsbCluster, digits: Path) -> None:
    message = rsb.error("submit", *DIGITS, "--data", str(digits), "--set", "job.slurm.partition=gpu", code=1)
    assert "sbatch refused the job" in message and "partition" in message
