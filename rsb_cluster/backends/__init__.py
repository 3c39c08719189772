"""The back ends: submit runs to this machine, to Slurm or to a cloud; query, cancel and preempt their jobs.

A back end is a class in a module of its own, and a line in ``BACKENDS``. No code outside compares its name: its
capabilities are attributes of the class (`rsb_cluster.backends.base.Backend`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import TypeVar

from rsb_cluster.backends.base import Backend, Check, Finding, JobStatus, Price, State
from rsb_cluster.backends.local import Local, has_gpu
from rsb_cluster.backends.skypilot.backend import SkyPilot
from rsb_cluster.backends.slurm.backend import Slurm
from rsb_cluster.config.job import Job
from rsb_cluster.config.settings import setting
from rsb_cluster.errors import ConfigError, RsbError, did_you_mean
from rsb_cluster.runs.run import Submission

__all__ = [
    "BACKENDS", "Backend", "Check", "Finding", "JobStatus", "Price", "State", "at_site", "backend_of", "cancel",
    "cancel_queued", "default_job", "look", "preempt", "states",
]  # fmt: skip

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Local(), Slurm(), SkyPilot())}

T = TypeVar("T")


def backend_of(job: Job | Submission) -> Backend:
    """Return the back end of a job or of a submission.

    Raises:
        ConfigError: There is no back end of that name.
    """
    if job.backend not in BACKENDS:
        where = f"job '{job.name}'" if isinstance(job, Job) else f"job {job.job_id}"
        raise ConfigError(
            f"{where}: there is no back end '{job.backend}'.{did_you_mean(job.backend, BACKENDS)} "
            f"Known: {', '.join(BACKENDS)}."
        )
    return BACKENDS[job.backend]


def default_job(nodes: int) -> str:
    """Return the name of the default job.

    It is the user's setting; ``slurm`` where Slurm is needed or installed; else this machine, on its GPU if it has one.
    """
    if chosen := setting("job"):
        return chosen
    if nodes > 1 or shutil.which("sbatch"):
        return "slurm"
    return "local-gpu" if has_gpu() else "local"


def at_site(job: Job) -> Job:
    """Return a job with the user's account and partition, where it takes such and names none."""
    if not backend_of(job).has_partitions:
        return job
    chosen = {name: value for name in ("account", "partition") if name not in job.slurm and (value := setting(name))}
    return job.model_copy(update={"slurm": {**chosen, **job.slurm}}) if chosen else job


def look(submissions: Sequence[Submission]) -> list[JobStatus]:
    """Return the job status of each submission, for display: what cannot be asked is unknown.

    It may be half a minute old, and a back end that is not installed here, or does not answer, hides no other's.
    """

    def look_at(backend: Backend, group: Sequence[Submission]) -> list[JobStatus]:
        try:
            return backend.query(group, fresh=False)
        except RsbError as error:
            is_temporary = bool(backend.why_unreachable())
            return [JobStatus("unknown", reason=str(error), is_temporary=is_temporary)] * len(group)

    return _per_backend(submissions, look_at)


def states(submissions: Sequence[Submission]) -> list[State]:
    """Return the state of each submission as it is now, for a decision.

    Raises:
        SubmitError: A back end does not answer.
    """
    return [status.state for status in _per_backend(submissions, lambda backend, group: backend.query(group))]


def cancel_queued(submissions: Sequence[Submission]) -> list[str]:
    """Cancel jobs that are queued, and leave alone those that have started meanwhile.

    Returns:
        For each submission why it could not be cancelled; empty if it was, or had already ended.
    """
    return _per_backend(submissions, lambda backend, group: backend.cancel_queued(group))


def cancel(submissions: Sequence[Submission]) -> list[str]:
    """Cancel jobs: a running one saves and stops, a queued one leaves the queue. A failing back end affects no other.

    Returns:
        For each submission why it could not be cancelled; empty if it was, or had already ended.
    """

    def cancel_group(backend: Backend, group: Sequence[Submission]) -> list[str]:
        try:
            return backend.cancel(group)
        except RsbError as error:
            return [str(error)] * len(group)

    return _per_backend(submissions, cancel_group)


def preempt(submissions: Sequence[Submission]) -> None:
    """Preempt running jobs: they save and return to the queue."""

    def preempt_group(backend: Backend, group: Sequence[Submission]) -> list[None]:
        backend.preempt(group)
        return [None] * len(group)

    _per_backend(submissions, preempt_group)


def _per_backend(
    submissions: Sequence[Submission], call: Callable[[Backend, Sequence[Submission]], Sequence[T]]
) -> list[T]:
    """Call a function per back end with all its submissions; return the results in the order of the submissions."""
    groups: dict[str, list[int]] = {}
    for i, submission in enumerate(submissions):
        groups.setdefault(submission.backend, []).append(i)
    results: dict[int, T] = {}
    for group in groups.values():
        backend = backend_of(submissions[group[0]])
        results |= zip(group, call(backend, [submissions[i] for i in group]), strict=True)
    return [results[i] for i in range(len(submissions))]
