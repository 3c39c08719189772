"""The back ends: submitting runs to this machine, to Slurm or to a cloud, and asking how they are.

A back end is a class in a module of its own, and a line in ``BACKENDS``. Nobody outside asks for its name: what it can
do stands in its class (`rsb_cluster.backends.base.Backend`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import TypeVar

from rsb_cluster.backends.base import Backend, Check, Finding, JobStatus, Price, State
from rsb_cluster.backends.local import Local
from rsb_cluster.backends.skypilot.backend import SkyPilot
from rsb_cluster.backends.slurm import Slurm
from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError, RsbError, did_you_mean
from rsb_cluster.runs.run import Submission

__all__ = [
    "BACKENDS", "Backend", "Check", "Finding", "JobStatus", "Price", "State", "backend_of", "cancel",
    "default_job", "preempt", "query", "states",
]  # fmt: skip

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Local(), Slurm(), SkyPilot())}

T = TypeVar("T")


def backend_of(one: Job | Submission) -> Backend:
    """Return the back end of a job, or the one that took a submission.

    Raises:
        ConfigError: There is none of that name.
    """
    if one.backend not in BACKENDS:
        where = f"job '{one.name}'" if isinstance(one, Job) else f"job {one.job_id}"
        raise ConfigError(
            f"{where}: there is no back end '{one.backend}'.{did_you_mean(one.backend, BACKENDS)} "
            f"Known: {', '.join(BACKENDS)}."
        )
    return BACKENDS[one.backend]


def default_job(nodes: int) -> str:
    """Return the name of the job to use when the user names none."""
    return "slurm" if nodes > 1 or shutil.which("sbatch") else "local"


def query(submissions: Sequence[Submission]) -> list[JobStatus]:
    """Return how each submission is; one query for all that an engine has."""
    return _each(submissions, lambda backend, mine: backend.query(mine))


def states(submissions: Sequence[Submission]) -> list[State]:
    """Return the state of each submission."""
    return [status.state for status in query(submissions)]


def cancel(submissions: Sequence[Submission]) -> list[str]:
    """End jobs: a running one saves and stops, a queued one leaves the queue. What fails at one engine is no other's.

    Returns:
        For each why it could not be told; empty where it was told, or had ended by itself.
    """

    def told(backend: Backend, mine: Sequence[Submission]) -> list[str]:
        try:
            return backend.cancel(mine)
        except RsbError as error:
            return [str(error)] * len(mine)

    return _each(submissions, told)


def preempt(submissions: Sequence[Submission]) -> None:
    """Tell running jobs to save and go back to the queue, as a preemption would."""

    def told(backend: Backend, mine: Sequence[Submission]) -> list[None]:
        backend.preempt(mine)
        return [None] * len(mine)

    _each(submissions, told)


def _each(submissions: Sequence[Submission], ask: Callable[[Backend, Sequence[Submission]], Sequence[T]]) -> list[T]:
    """Ask each back end once for all of its submissions; return the answers in the order of the submissions."""
    places: dict[str, list[int]] = {}
    for place, submission in enumerate(submissions):
        places.setdefault(submission.backend, []).append(place)
    found: dict[int, T] = {}
    for mine in places.values():
        backend = backend_of(submissions[mine[0]])
        found |= zip(mine, ask(backend, [submissions[i] for i in mine]), strict=True)
    return [found[i] for i in range(len(submissions))]
