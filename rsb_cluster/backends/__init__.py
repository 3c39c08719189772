"""The back ends, one module each: handing runs to this machine or to an engine, and asking how they are."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rsb_cluster.backends import local, skypilot, slurm
from rsb_cluster.backends.base import Backend, Seen, State
from rsb_cluster.backends.slurm import launch_after
from rsb_cluster.config.job import Job
from rsb_cluster.errors import RsbError
from rsb_cluster.node.task import Task
from rsb_cluster.runs.run import Run, Submission

__all__ = [
    "Seen", "State", "backend", "cancel", "default_backend_job", "ending", "ends_with_terminal", "has_ended", "launch",
    "launch_after", "look", "preempt", "read_log", "states",
]  # fmt: skip

_BACKENDS: dict[str, Backend] = {"local": local, "slurm": slurm, "cloud": skypilot}


def backend(job: Job) -> Backend:
    """Return the back end of a job."""
    return _BACKENDS[job.backend]


def default_backend_job(nodes: int) -> str:
    """Return the name of the job to use when the user names none."""
    return "slurm" if nodes > 1 or shutil.which("sbatch") else "local"


def launch(job: Job, tasks: Sequence[Task], folder: Path, name: str) -> list[Submission]:
    """Hand runs to the job's back end, and return one submission per task.

    Args:
        job: Where.
        tasks: One per run.
        folder: New folder for scripts and logs.
        name: What the engine shows.

    Raises:
        SubmitError: The engine refused, or is not here.
    """
    backend(job).check_available(job)
    return backend(job).launch(job, tasks, folder, name)


def look(submissions: Sequence[Submission]) -> list[Seen]:
    """Return how each submission is; one query for all that an engine has."""
    found: dict[int, Seen] = {}
    for name, mine in _by_backend(submissions).items():
        found |= zip(mine, _BACKENDS[name].look([submissions[i] for i in mine]), strict=True)
    return [found[i] for i in range(len(submissions))]


def states(submissions: Sequence[Submission]) -> list[State]:
    """Return the state of each submission."""
    return [seen.state for seen in look(submissions)]


def cancel(submissions: Sequence[Submission]) -> list[str]:
    """End jobs: a running one saves and stops, a queued one leaves the queue. What fails at one engine is no other's.

    Returns:
        For each why it could not be told; empty where it was told, or had ended by itself.
    """
    found: dict[int, str] = {}
    for name, mine in _by_backend(submissions).items():
        try:
            answers = _BACKENDS[name].cancel([submissions[i] for i in mine])
        except RsbError as error:
            answers = [str(error)] * len(mine)
        found |= zip(mine, answers, strict=True)
    return [found[i] for i in range(len(submissions))]


def preempt(submissions: Sequence[Submission]) -> None:
    """Tell running jobs to save and go back to the queue, as a preemption would."""
    for name, mine in _by_backend(submissions).items():
        _BACKENDS[name].preempt([submissions[i] for i in mine])


def ends_with_terminal(submission: Submission) -> bool:
    """Whether Ctrl-C ends a job that its user waits for in a terminal; else the job has a life of its own."""
    return _BACKENDS[submission.backend].ends_with_terminal(submission)


def ending(submissions: Sequence[Submission]) -> str:
    """Return the command that ends jobs of one back end without us."""
    return _BACKENDS[submissions[0].backend].ending(submissions)


def has_ended(run: Run, submission: Submission) -> bool:
    """Whether the logs of a job will not grow any more."""
    return _BACKENDS[submission.backend].has_ended(run, submission)


def read_log(run: Run, submission: Submission, rank: int, start: int) -> bytes | None:
    """Return a rank's log from a byte on, all attempts of the job in a row; None where there is none."""
    return _BACKENDS[submission.backend].read_log(run, submission, rank, start)


def _by_backend(submissions: Sequence[Submission]) -> dict[str, list[int]]:
    """Return the places of submissions by their back end."""
    found: dict[str, list[int]] = {}
    for place, submission in enumerate(submissions):
        found.setdefault(submission.backend, []).append(place)
    return found
