"""Jobs on a real Slurm, with runs in a folder: arrays, preemption by command, the time limit, cancelling."""

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rsb_cluster.metrics import read_rows
from rsb_cluster.run import Run
from tests.command import RsbCluster
from tests.servers.slurm import SlurmCluster

pytestmark = pytest.mark.slurm

DIGITS = ("--recipe", "digits", "--job", "slurm-cpu", "--set", "job.tasks_per_node=2")


@pytest.fixture
def rsb(tmp_path: Path, slurm: SlurmCluster) -> RsbCluster:
    return RsbCluster(tmp_path, slurm.env)


def wait(rsb: RsbCluster, run: Run, *states: str, timeout: float = 240) -> dict[str, object]:
    """Wait until a run is in one of some states."""
    deadline = time.monotonic() + timeout
    while True:
        (status,) = rsb.json("status", run.run_id, "--json")
        if status["state"] in states:
            return status  # type: ignore[no-any-return]
        assert time.monotonic() < deadline, f"{status}{rsb.logs()}"
        time.sleep(1)


def wait_for_step(rsb: RsbCluster, run: Run, step: int) -> None:
    deadline = time.monotonic() + 240
    while max((row["step"] for row in read_rows(run)), default=0) < step:
        assert time.monotonic() < deadline, f"no step {step} yet{rsb.logs()}"
        time.sleep(0.5)


@pytest.mark.timeout(900)
def test_elements_of_an_array_share_a_node_and_do_not_meet(rsb: RsbCluster, slurm: SlurmCluster, digits: Path) -> None:
    """Two runs of two ranks on one node of four CPUs, at once; each has its own samples and its own result."""
    ids = rsb(
        "submit", *DIGITS, "--seeds", "2", "--data", str(digits), "--set", "schedule.epochs=3",
        "--set", "job.slurm.nodelist=n2",
    ).split()  # fmt: skip
    runs = [Run.at(rsb.cwd / "runs", run_id) for run_id in ids]
    assert len(runs) == 2
    for run in runs:
        wait(rsb, run, "finished")
    one, other = (run.attempts()[0] for run in runs)
    assert one.job_id.split("_")[0] == other.job_id.split("_")[0]  # one array
    assert one.world_size == other.world_size == 2
    assert one.started < other.ended and other.started < one.ended  # they did run at the same time
    losses = [[row["loss"] for row in read_rows(run) if row["kind"] == "train"] for run in runs]
    assert len(losses[0]) == len(losses[1]) and losses[0] != losses[1]
    csv = rsb("collect", "--format", "csv")
    assert all(run_id in csv for run_id in ids)


@pytest.mark.timeout(900)
def test_a_run_comes_back_from_a_preemption_and_the_time_limit_and_not_from_cancel(
    rsb: RsbCluster, slurm: SlurmCluster, digits: Path
) -> None:
    run_id = rsb(
        "submit", *DIGITS, "--data", str(digits), "--set", "schedule.epochs=500", "--set", "job.time_min=3",
        "--set", "job.signal_delay_s=75", "--set", "job.log_every_steps=5",
    ).strip()  # fmt: skip
    run = Run.at(rsb.cwd / "runs", run_id)
    wait_for_step(rsb, run, 5)
    rsb("preempt", run_id)
    deadline = time.monotonic() + 400
    while len(run.attempts()) < 3 or read_rows(run)[-1]["attempt"] < 3:
        assert time.monotonic() < deadline, f"{run.attempts()}{rsb.logs()}"
        time.sleep(1)
    rsb("cancel", run_id)
    wait(rsb, run, "stopped")
    job = run.submissions()[-1].job_id
    slurm.wait_for("Slurm is done with the job", lambda: slurm.job_state(job) not in ("RUNNING", "COMPLETING") or None)
    assert slurm.job_state(job) in ("CANCELLED", "FAILED")  # neither PENDING nor running again
    attempts = run.attempts()
    first, *between, last = (a.cause for a in attempts)
    assert (first, last) == ("preempted", "stopped")
    assert between and set(between) == {"timed out"}  # two, where the third was told of the limit ahead of us
    for before, after in itertools.pairwise(attempts):
        assert after.start_step == before.end_step
    steps = [row["step"] for row in read_rows(run) if row["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert "saved step" in rsb("logs", run_id)
    assert "attempt 1" in rsb("logs", run_id, "--attempt", "1", "--rank", "1")


@pytest.mark.timeout(600)
def test_scancel_by_hand_ends_a_run_for_good(rsb: RsbCluster, slurm: SlurmCluster, digits: Path) -> None:
    """Its ranks save as for a preemption, and the script must not put the job back into the queue."""
    run_id = rsb("submit", *DIGITS, "--data", str(digits), "--set", "schedule.epochs=300").strip()
    run = Run.at(rsb.cwd / "runs", run_id)
    wait_for_step(rsb, run, 20)
    job = run.submissions()[-1].job_id
    slurm.run("scancel", job)
    slurm.wait_for_state(job, "CANCELLED", timeout=60)
    time.sleep(15)
    assert slurm.job_state(job) == "CANCELLED"
    (attempt,) = run.attempts()
    assert attempt.cause == "preempted" and attempt.end_step >= 20


def test_ctrl_c_leaves_a_queued_job_alone_and_cancel_ends_all_jobs_of_a_run(
    rsb: RsbCluster, slurm: SlurmCluster, digits: Path
) -> None:
    asked = ("submit", *DIGITS, "--data", str(digits), "--set", "job.slurm.begin=now+1hour")
    command = [sys.executable, "-m", "rsb_cluster", *asked, "--wait"]
    with subprocess.Popen(command, cwd=rsb.cwd, env=rsb.env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if ": queued" in line)
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    run = Run.at(rsb.cwd / "runs", said.partition(":")[0])
    assert rest.splitlines() == [
        "No longer waiting; what is queued or runs goes on.",
        f"to look again  rsb-cluster status --watch {run.run_id}",
        f"for a log      rsb-cluster logs -f {run.run_id}",
        f"to end all     rsb-cluster cancel {run.run_id}",
    ]
    (first,) = run.submissions()
    assert slurm.job_state(first.job_id) == "PENDING" and not run.cancelled()

    # Two submits in one moment leave two jobs: neither knew of the other's.
    record = next((rsb.cwd / "runs" / run.run_id / "submissions").iterdir())
    aside = record.rename(rsb.cwd / record.name)
    rsb(*asked)
    aside.rename(record)
    first, second = run.submissions()
    told = rsb.run("cancel", run.run_id).stderr
    assert told == f"{run.run_id}: told job {first.job_id}, {second.job_id} to end\n"
    assert [slurm.job_state(job) for job in (first.job_id, second.job_id)] == ["CANCELLED"] * 2
    assert run.is_cancelled(first.job_id) and run.is_cancelled(second.job_id)


def test_a_job_that_slurm_refuses_is_explained(rsb: RsbCluster, digits: Path) -> None:
    message = rsb.error("submit", *DIGITS, "--data", str(digits), "--set", "job.slurm.partition=gpu", code=1)
    assert "sbatch refused the job" in message and "partition" in message
