"""What a back end can do. Each is a module of this package with these functions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from rsb_cluster.config.job import Job
from rsb_cluster.node.task import Task
from rsb_cluster.runs.run import Run, Submission

State = Literal["queued", "running", "gone"]


@dataclass(frozen=True)
class Seen:
    """How a back end sees a submission.

    Attributes:
        state: In our words.
        engine: In its own, with its own id, where that is worth a column: ``sky 12 RECOVERING``.
        reason: Why it gave the job up, where it says so.
    """

    state: State
    engine: str = ""
    reason: str = ""


class Backend(Protocol):
    """The functions of a back end's module."""

    def check_available(self, job: Job) -> None:
        """Refuse a job that cannot be sent from this machine. Raises SubmitError."""

    def max_runs(self) -> int:
        """Return how many runs one call of ``launch`` takes."""

    def ends_with_terminal(self, submission: Submission) -> bool:
        """Whether Ctrl-C ends a job that its user waits for in a terminal; else the job has a life of its own."""

    def script(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> str:
        """Return what ``launch`` would give to the engine, of the first task where they differ; may be empty.

        Raises:
            ConfigError: The job has options that cannot be.
        """

    def launch(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> list[Submission]:
        """Hand runs over, one submission each. Raises SubmitError."""

    def look(self, submissions: Sequence[Submission]) -> list[Seen]:
        """Return how each is; one query for all. Raises SubmitError where the engine does not answer."""

    def cancel(self, submissions: Sequence[Submission]) -> list[str]:
        """End jobs: a running one saves and stops, a queued one leaves the queue.

        Returns:
            For each why it could not be told; empty where it was told, or had ended by itself.

        Raises:
            SubmitError: None was told, as the engine does not answer.
        """

    def preempt(self, submissions: Sequence[Submission]) -> None:
        """Tell running jobs to save and go back to the queue. Raises SubmitError where one could not be told."""

    def ending(self, submissions: Sequence[Submission]) -> str:
        """Return the command that ends jobs without us, for a user whose jobs we could not note down."""

    def has_ended(self, run: Run, submission: Submission) -> bool:
        """Whether the logs of a job will not grow any more, as far as is known without effort."""

    def read_log(self, run: Run, submission: Submission, rank: int, start: int) -> bytes | None:
        """Return a rank's log from a byte on, all attempts of the job in a row; None where there is none."""


def submitted(job: Job, job_id: str, folder: str | Path) -> Submission:
    """Return the record of a job that was handed over now."""
    fields = job.model_dump(mode="json")
    return Submission(
        backend=job.backend, job_id=job_id, folder=str(folder), shape=job.shape, time=time.time(), job=fields
    )


def read_rank_file(submission: Submission, rank: int, start: int) -> bytes | None:
    """Return from a byte on what a rank has written into submitit's folder; None where there is no such file."""
    path = Path(submission.folder) / f"{submission.job_id}_{rank}_log.out"
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read()
    except FileNotFoundError:
        return None
