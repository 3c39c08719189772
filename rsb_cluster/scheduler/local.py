"""This machine: a queue of one, kept by a process of its own."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rsb_cluster.exits import CANCELLED, RUNNING
from rsb_cluster.job import Job
from rsb_cluster.run import Run, Submission
from rsb_cluster.scheduler.backend import Seen, State, read_rank_file, submitted
from rsb_cluster.task import Task


def check_available(job: Job) -> None:
    """Nothing is needed."""


def max_runs() -> int:
    """Return how many runs the queue takes."""
    return sys.maxsize


def script(job: Job, tasks: Sequence[Task], folder: Path, name: str) -> str:
    """There is none."""
    return ""


def launch(job: Job, tasks: Sequence[Task], folder: Path, name: str) -> list[Submission]:
    """Start the process that runs them one after the other, in a new folder for logs."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    folder.mkdir(mode=0o700, parents=True)
    folders = [folder / str(i) for i in range(len(tasks))]
    for where in folders:
        where.mkdir()
    gpus = ",".join(str(i) for i in range(job.gpus_per_node))
    environment = os.environ | {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_NTASKS": str(job.ranks_per_node),
        "SUBMITIT_LOCAL_COMMAND": "",
        "SUBMITIT_LOCAL_TIMEOUT_S": "0",
        "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0",
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_LOCAL_WITH_SHELL": "",
        "SUBMITIT_STDERR_TO_STDOUT": "1",
        "CUDA_VISIBLE_DEVICES": gpus if job.gpus_per_node else "",
    }
    command = [sys.executable, "-m", "rsb_cluster.local_controller", *map(str, folders)]
    if job.setup:
        command = ["bash", "-c", " && ".join([*job.setup, "exec " + shlex.join(command)])]
    with (folder / "controller.log").open("ab") as log:
        # A session of its own: it outlives this terminal, and Ctrl-C reaches it only through us.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    for where, task in zip(folders, tasks, strict=True):
        paths = JobPaths(where, str(process.pid))
        temporary = where / "submitted.tmp"
        DelayedSubmission(task).dump(temporary)
        temporary.replace(paths.submitted_pickle)
    return [submitted(job, str(process.pid), where) for where in folders]


def look(submissions: Sequence[Submission]) -> list[Seen]:
    """Return how jobs are."""
    return [Seen(_state(submission)) for submission in submissions]


def _state(submission: Submission) -> State:
    if not _is_controller(submission):
        return "gone"
    folder = Path(submission.folder)
    if (folder / RUNNING).exists():
        return "running"
    return "gone" if list(folder.glob(f"{submission.job_id}_*_log.out")) or (folder / CANCELLED).exists() else "queued"


def cancel(submissions: Sequence[Submission]) -> None:
    """End jobs: a running one saves and stops, a queued one leaves the queue."""
    for submission in submissions:
        Path(submission.folder, CANCELLED).touch()
    for submission in submissions:
        if _state(submission) == "running":
            os.kill(int(submission.job_id), signal.SIGINT)


def preempt(submissions: Sequence[Submission]) -> None:
    """Tell running jobs to save and go on."""
    for submission in submissions:
        if _state(submission) == "running":
            os.kill(int(submission.job_id), signal.SIGTERM)


def has_ended(run: Run, submission: Submission) -> bool:
    """Whether a job has ended."""
    return look([submission])[0].state == "gone"


def read_log(run: Run, submission: Submission, rank: int, start: int) -> bytes | None:
    """Return a rank's log from a byte on; None where there is none."""
    return read_rank_file(submission, rank, start)


def _is_controller(submission: Submission) -> bool:
    """Whether the process of that number is still the one that was started, and not a later one."""
    try:
        command = Path(f"/proc/{int(submission.job_id)}/cmdline").read_bytes().decode(errors="replace")
    except (OSError, ValueError):
        return False
    return "rsb_cluster.local_controller" in command and submission.folder in command.split("\0")
