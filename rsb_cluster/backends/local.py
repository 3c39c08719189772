"""This machine: a queue of one, kept by a process of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rsb_cluster.backends.base import Seen, State, read_rank_file, submitted
from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError, SubmitError
from rsb_cluster.node.exit_codes import CANCELLED, RUNNING
from rsb_cluster.node.processes import Process
from rsb_cluster.node.task import Task
from rsb_cluster.runs.run import Run, Submission


def check_available(job: Job) -> None:
    """Nothing is needed."""


def max_runs() -> int:
    """Return how many runs the queue takes."""
    return sys.maxsize


def script(job: Job, tasks: Sequence[Task], folder: Path, name: str) -> str:
    """Return nothing, as there is no script. Raises ConfigError where the job has more GPUs than this shell may use."""
    _gpus(job)
    return ""


def launch(job: Job, tasks: Sequence[Task], folder: Path, name: str) -> list[Submission]:
    """Start the process that runs them one after the other, in a new folder for logs.

    The job's id is the process's name, which the process itself gives to the ranks (``local_controller``).
    """
    from submitit.core.utils import DelayedSubmission, JobPaths

    gpus = _gpus(job)
    folder.mkdir(mode=0o700, parents=True)
    folders = [folder / str(i) for i in range(len(tasks))]
    for where in folders:
        where.mkdir()
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
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
    }
    command = [sys.executable, "-m", "rsb_cluster.node.local_controller", *map(str, folders)]
    if job.setup:
        command = ["bash", "-c", " && ".join([*job.setup, "exec " + shlex.join(command)])]
    with (folder / "controller.log").open("ab") as log:
        # A session of its own: it outlives this terminal, and Ctrl-C reaches it only through us.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    job_id = str(Process.of(process.pid))
    for where, task in zip(folders, tasks, strict=True):
        temporary = where / "submitted.tmp"
        DelayedSubmission(task).dump(temporary)
        temporary.replace(JobPaths(where, job_id).submitted_pickle)
    return [submitted(job, job_id, where) for where in folders]


def _gpus(job: Job) -> list[str]:
    """Return the GPUs of a job, as CUDA names them: the first of those that this shell may use."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is None:
        return [str(i) for i in range(job.gpus_per_node)]
    # CUDA reads numbers, "GPU-..." and "MIG-..." up to the first word that is none of these, such as -1.
    words = (word.strip() for word in said.split(","))
    visible = list(itertools.takewhile(lambda word: re.fullmatch(r"\d+|(GPU|MIG)-.+", word), words))
    if len(visible) < job.gpus_per_node:
        raise ConfigError(
            f"job '{job.name}': gpus_per_node = {job.gpus_per_node}, but CUDA_VISIBLE_DEVICES='{said}' lets this shell "
            f"use {len(visible) or 'none'}. Use --gpus-per-node {len(visible)}, or set the variable otherwise."
        )
    return visible[: job.gpus_per_node]


def ends_with_terminal(submission: Submission) -> bool:
    """Whether a job runs on this machine: who waits for it takes it for a program in the foreground."""
    return not _is_elsewhere(submission)


def look(submissions: Sequence[Submission]) -> list[Seen]:
    """Return how jobs are. Of those of another machine the files are believed; a dead one's may say 'running'."""
    return [_seen(submission) for submission in submissions]


def _seen(submission: Submission) -> Seen:
    if not _is_elsewhere(submission):
        return Seen(_noted(submission) if _is_alive(submission) else "gone")
    state = _noted(submission)
    return Seen(state, engine="" if state == "gone" else f"on {_host(submission)}")


def _noted(submission: Submission) -> State:
    """Return how a job of a living queue is; without its files, which another machine may not share, nobody knows."""
    folder = Path(submission.folder)
    if (folder / RUNNING).exists():
        return "running"
    had_its_turn = list(folder.glob(f"{submission.job_id}_*_log.out")) or (folder / CANCELLED).exists()
    return "gone" if had_its_turn or not folder.is_dir() else "queued"


def cancel(submissions: Sequence[Submission]) -> list[str]:
    """End jobs: a running one saves and stops, a queued one leaves the queue. Return why not, for each."""
    untold = [_out_of_reach(submission) for submission in submissions]
    told = [submission for submission, why in zip(submissions, untold, strict=True) if not why]
    for submission in told:
        Path(submission.folder, CANCELLED).touch()
    for submission in told:
        _signal(submission, signal.SIGINT)
    return untold


def preempt(submissions: Sequence[Submission]) -> None:
    """Tell running jobs to save and go on.

    Raises:
        SubmitError: One runs on another machine; the others were told.
    """
    untold = [_out_of_reach(submission) for submission in submissions]
    for submission, why in zip(submissions, untold, strict=True):
        if not why:
            _signal(submission, signal.SIGTERM)
    if any(untold):
        raise SubmitError("\n".join(filter(None, untold)))


def _out_of_reach(submission: Submission) -> str:
    """Say why a running job can be told nothing; a queued one is told by a file, wherever it is."""
    if not _is_elsewhere(submission) or _noted(submission) != "running":
        return ""
    host = _host(submission)
    return (
        f"job {submission.job_id} runs on {host}, and can be told nothing from here. Do it on {host}; "
        f"if that machine is gone for good, remove {Path(submission.folder, RUNNING)} first."
    )


def _signal(submission: Submission, number: signal.Signals) -> None:
    """Send a signal to a job if it is its turn."""
    if _is_alive(submission) and _noted(submission) == "running":
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(_pid(submission), number)


def ending(submissions: Sequence[Submission]) -> str:
    """Return the command that ends jobs without us: what waits leaves the queue, what runs saves and stops."""
    files = shlex.join(str(Path(submission.folder, CANCELLED)) for submission in submissions)
    return f"touch {files}; kill -INT {' '.join(str(pid) for pid in dict.fromkeys(map(_pid, submissions)))}"


def has_ended(run: Run, submission: Submission) -> bool:
    """Whether a job has ended."""
    return look([submission])[0].state == "gone"


def read_log(run: Run, submission: Submission, rank: int, start: int) -> bytes | None:
    """Return a rank's log from a byte on; None where there is none."""
    return read_rank_file(submission, rank, start)


def _host(submission: Submission) -> str:
    process = Process.parse(submission.job_id)
    return process.host if process is not None else ""


def _pid(submission: Submission) -> int:
    process = Process.parse(submission.job_id)
    return process.pid if process is not None else int(submission.job_id)


def _is_elsewhere(submission: Submission) -> bool:
    process = Process.parse(submission.job_id)
    return process is not None and process.is_elsewhere


def _is_alive(submission: Submission) -> bool:
    """Whether the queue's process runs on this machine."""
    process = Process.parse(submission.job_id)
    if process is not None:
        return process.is_alive
    try:  # earlier versions noted the PID alone, which a later process may have by now
        command = Path(f"/proc/{int(submission.job_id)}/cmdline").read_bytes().decode(errors="replace")
    except (OSError, ValueError):
        return False
    return "rsb_cluster.local_controller" in command and submission.folder in command.split("\0")
