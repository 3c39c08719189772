"""Jobs on a real Slurm, with runs in a folder: arrays, preemption by command, the time limit, cancelling."""

import itertools
import os
import pwd
import time
from pathlib import Path

import pytest

from rsb_cluster.runs.metrics import read_rows
from rsb_cluster.runs.run import Run
from tests.command import RsbCluster
from tests.faults.victim import on_slurm
from tests.integration.jobs import DIGITS
from tests.integration.site import SHELL, Site
from tests.servers.daemons import GUARD_S
from tests.servers.slurm import SlurmCluster

pytestmark = pytest.mark.slurm


@pytest.fixture
def rsb(tmp_path: Path, slurm: SlurmCluster) -> RsbCluster:
    return RsbCluster(tmp_path, slurm.env)


def wait(rsb: RsbCluster, run: Run, *states: str, timeout: float = GUARD_S) -> dict[str, object]:
    """Wait until a run is in one of the states."""
    deadline = time.monotonic() + timeout
    while True:
        (status,) = rsb.json("status", run.run_id, "--json")
        if status["state"] in states:
            return status  # type: ignore[no-any-return]
        assert time.monotonic() < deadline, f"{status}{rsb.logs()}"
        time.sleep(1)


def test_array_tasks_share_a_node_and_do_not_rendezvous(rsb: RsbCluster, slurm: SlurmCluster, digits: Path) -> None:
    """Two concurrent runs of two ranks on one node of four CPUs; each has its own samples and its own result.

    Then both are evaluated on their own data, by another array.
    """
    rsb.hold()
    ids = rsb("submit", *DIGITS, "--seeds", "2", "--data", str(digits), "--set", "job.slurm.nodelist=n2").split()
    runs = [Run.at(rsb.cwd / "runs", run_id) for run_id in ids]
    assert len(runs) == 2
    for run in runs:
        on_slurm(rsb, run, slurm).wait_for_steps(1, 5)
    assert not any(run.attempts()[0].cause for run in runs), "both run now"
    rsb.allow()
    for run in runs:
        wait(rsb, run, "finished")
    one, other = (run.attempts()[0] for run in runs)
    assert one.job_id.split("_")[0] == other.job_id.split("_")[0]  # one array
    assert one.world_size == other.world_size == 2
    losses = [[row["loss"] for row in read_rows(run) if row["kind"] == "train"] for run in runs]
    assert len(losses[0]) == len(losses[1]) and losses[0] != losses[1]
    options = ("--job", "slurm-cpu", "--procs", "2", "--partition", "main", "--time", "10")
    evaluations = [Run.at(rsb.cwd / "runs" / "evaluation-jobs", one) for one in rsb("evaluate", *ids, *options).split()]
    for one in evaluations:
        assert wait(rsb, one, "finished", "failed")["state"] == "finished"
    first, second = (one.submissions()[-1] for one in evaluations)
    assert first.job_id.split("_")[0] == second.job_id.split("_")[0] and first.job["slurm"] == {"partition": "main"}
    assert all(one.attempts()[0].world_size == 2 for one in evaluations)
    collected = rsb.json("collect", "--json")["evaluations"]
    values = {e["run_id"]: e["values"]["top1"] for line in collected for e in line["evaluations"]}
    assert values == pytest.approx({run.run_id: run.result()["top1"] for run in runs})  # type: ignore[index]


def test_a_run_resumes_after_a_preemption_and_the_time_limit_but_not_after_cancel(
    rsb: RsbCluster, slurm: SlurmCluster, digits: Path
) -> None:
    """At a site that is not ours: submitted from inside an allocation whose variables, and those of profiles, would
    change the job; through an sbatch that prints more than a job id; with ranks in a wrapper that forks; and with a
    controller that is restarted when the time limit is reached."""
    site = Site(rsb, slurm)
    rsb.hold()
    options = [*DIGITS, "--data", str(digits), "--time", "2", "--set", "job.signal_delay_s=40"]
    run = Run.at(rsb.cwd / "runs", site.submit_inside_an_allocation(*options, "--set", f"job.python={site.python}"))
    rsb.env |= {name: value for name, value in SHELL.items() if name.startswith("SQUEUE_")}
    assert "note: ignored in this shell, as the job file decides: SBATCH_ARRAY_INX=0-3" in site.said
    (submission,) = run.submissions()
    job = submission.job_id
    assert submission.user == pwd.getpwuid(os.getuid()).pw_name and submission.name == run.run_id
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # so that its end comes when it is asked for
    victim = on_slurm(rsb, run, slurm)
    victim.wait_for_steps(1, 5)
    wait(rsb, run, "running")
    rsb("preempt", run.run_id)
    victim.wait_for_steps(2, 5)
    site.hold_squeue()
    slurm.run("scontrol", "update", f"JobId={job}", "EndTime=now+70")  # the signal ahead of it is due
    assert victim.wait_for_end(2).cause == "timed out"
    site.restart_controller()
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    victim.wait_for_steps(3, 5)
    rsb("cancel", run.run_id)
    wait(rsb, run, "stopped")
    slurm.wait_for_state(job, "CANCELLED", "FAILED")  # neither PENDING nor running again
    attempts = run.attempts()
    assert [a.cause for a in attempts] == ["preempted", "timed out", "stopped"]
    for before, after in itertools.pairwise(attempts):
        assert after.start_step == before.end_step
    steps = [row["step"] for row in read_rows(run) if row["kind"] == "train"]
    assert steps == list(range(1, attempts[-1].end_step + 1))
    assert "saved step" in rsb("logs", run.run_id)
    assert "attempt 1" in rsb("logs", run.run_id, "--attempt", "1", "--rank", "1")


def test_scancel_by_hand_stops_a_run(rsb: RsbCluster, slurm: SlurmCluster, digits: Path) -> None:
    """Its ranks save as for a preemption, and the script must not requeue the job."""
    rsb.hold()
    one_rank = ("--set", "job.tasks_per_node=1")
    run = Run.at(rsb.cwd / "runs", rsb("submit", *DIGITS, *one_rank, "--data", str(digits)).strip())
    on_slurm(rsb, run, slurm).wait_for_steps(1, 5)
    job = run.submissions()[-1].job_id
    slurm.run("scancel", job)
    slurm.wait_for_state(job, "CANCELLED")  # it is COMPLETING for as long as its script runs
    (attempt,) = run.attempts()
    assert attempt.cause == "preempted" and attempt.end_step >= 5


# Ranks as under NCCL. The last one fails permanently; its peers do not notice, and are killed or abort.
NCCL = """
def train(self):
    import os, signal
    if (rank := self.group.rank) == 3:
        raise DataError("a shard was replaced")
    time.sleep(2)
    if rank < 2:
        os.kill(os.getpid(), (signal.SIGKILL, signal.SIGABRT)[rank])
    os._exit(75)
Trainer.train = train
"""


def test_a_permanently_failed_run_does_not_train_again_whatever_exit_codes_its_ranks_have(
    rsb: RsbCluster, slurm: SlurmCluster, digits: Path
) -> None:
    """The highest exit code is that of the killed ranks, which alone would mean a restart."""
    rsb.change_trainer(NCCL)
    run_id = rsb("submit", *DIGITS[:-1], "job.tasks_per_node=4", "--data", str(digits)).strip()
    run = Run.at(rsb.cwd / "runs", run_id)
    status = wait(rsb, run, "failed")
    assert "a shard was replaced" in str(status["cause"])
    job = run.submissions()[-1].job_id
    assert slurm.wait_for_state(job, "FAILED") == "FAILED"
    (attempt,) = run.attempts()
    assert attempt.cause == "failed"
