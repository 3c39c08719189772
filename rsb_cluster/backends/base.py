"""The base class of the back ends, and the types of what they return."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError, MissingError, SubmitError
from rsb_cluster.node.task import Task
from rsb_cluster.runs.run import Run, Submission
from rsb_cluster.storage.store import Store

State = Literal["queued", "running", "unknown", "gone"]

# Why a job of a state is not cancelled as a queued one.
_STARTED: dict[State, str] = {
    "running": "it has started meanwhile", "unknown": "whether it has started is unknown", "gone": "", "queued": "",
}  # fmt: skip
STARTED = _STARTED["running"]


@dataclass(frozen=True)
class JobStatus:
    """The status of a submission's job, as its back end reports it.

    Attributes:
        state: Queued, running or gone; unknown if that cannot be found out from this machine, or not now.
        engine: The engine's own id and state, if they say more: ``sky 12 RECOVERING``.
        reason: What the job waits for, where to ask, or why the engine gave it up, if that is known.
        problem: What keeps the job from starting, again and again, and the command that shows more.
        is_temporary: Whether the engine may answer when it is asked again.
        is_cancelled: Whether somebody cancelled a job that is gone; None if the engine no longer knows how it ended.
    """

    state: State
    engine: str = ""
    reason: str = ""
    problem: str = ""
    is_temporary: bool = False
    is_cancelled: bool | None = False


@dataclass(frozen=True)
class Price:
    """The lowest price of a node that fits a job.

    Attributes:
        usd_per_h: Price of one node, dollars per hour.
        source: Where the price comes from and its date, for display.
    """

    usd_per_h: float
    source: str


@dataclass(frozen=True)
class Finding:
    """The result of a check of ``doctor``.

    Attributes:
        what: What was checked.
        found: What was found.
        advice: What to do about a problem; empty if there is none.
    """

    what: str
    found: str
    advice: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether there is no problem."""
        return not self.advice


Check = Callable[[Job], Finding | str]


class Backend(ABC):
    """A system that runs jobs: this machine, Slurm, a cloud.

    Attributes:
        name: The value of ``backend`` in a job file.
        script_title: Heading of ``script`` in a dry run.
        needs_object_store: Whether its nodes share no folder with this machine.
        can_run_after: Whether ``run_after`` is implemented.
        has_partitions: Whether its jobs have a partition, an account and a QOS.
        has_prices: Whether its nodes are paid for by the hour.
        price_hint: What to do if the price of a node is unknown.
    """

    name: ClassVar[str]
    script_title: ClassVar[str] = "script"
    needs_object_store: ClassVar[bool] = False
    can_run_after: ClassVar[bool] = False
    has_partitions: ClassVar[bool] = False
    has_prices: ClassVar[bool] = False
    price_hint: ClassVar[str] = ""

    # --- before a submit --------------------------------------------------------------------------------------------

    @abstractmethod
    def check_job(self, job: Job) -> None:
        """Refuse a job that this back end can never run. Raises ConfigError."""

    @abstractmethod
    def check_available(self, job: Job) -> None:
        """Refuse a job that cannot be submitted from this machine now. Raises SubmitError."""

    def doctor_checks(self) -> Mapping[str, Check]:
        """Return the back end's own checks of ``doctor``, by name."""
        return {}

    def shares_files(self, job: Job) -> bool:
        """Whether the nodes of a job may see a folder of this machine."""
        return not self.needs_object_store

    def notes(self, job: Job) -> list[str]:
        """Return what a user should know about a job before it is submitted."""
        return []

    def memory_bytes(self, job: Job) -> int:
        """Return the memory that a job has on each node, as far as that is known before; 0 if it is not."""
        return int(job.mem_gb * 2**30)

    def why_refused(self, job: Job) -> str:
        """Return why the engine would refuse a job, for a dry run; empty if it would not, or cannot be asked."""
        return ""

    def why_unreachable(self) -> str:
        """Return why the engine does not answer at present; empty if it does, or cannot be asked so."""
        return ""

    def exclude_hosts(self, job: Job, hosts: Sequence[str]) -> Job:
        """Return a copy of the job that excludes hosts.

        Raises:
            ConfigError: The back end cannot exclude hosts.
        """
        raise ConfigError(f"job '{job.name}': back end {self.name} cannot exclude nodes.")

    def price(self, job: Job, *, spot: bool) -> Price | None:
        """Return the price of a node of a job, preemptible or on demand; None if it is unknown."""
        return None

    @abstractmethod
    def max_array_size(self) -> int:
        """Return the maximum number of runs in one call of ``submit``."""

    def concurrent_runs(self, job: Job, runs: int) -> int:
        """Return the maximum number of concurrent runs of one call of ``submit``."""
        return min(runs, job.array_parallelism)

    @abstractmethod
    def script(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> str:
        """Return what ``submit`` would pass to the engine, for the first task if they differ; may be empty.

        Raises:
            ConfigError: The job has invalid options.
        """

    # --- submitting, and after --------------------------------------------------------------------------------------

    @abstractmethod
    def submit(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> list[Submission]:
        """Submit runs.

        Args:
            job: Where to train.
            tasks: One per run.
            folder: New folder for scripts and logs.
            name: Name of the job in the engine.

        Returns:
            A submission per task.

        Raises:
            SubmitError: The engine refused the job.
        """

    @abstractmethod
    def query(self, submissions: Sequence[Submission], *, fresh: bool = True) -> list[JobStatus]:
        """Return the job status of each; one query for all.

        Args:
            submissions: The submissions.
            fresh: Ask the engine now, as something will be decided; else a recent answer may be used again.

        Raises:
            SubmitError: The engine does not answer.
        """

    @abstractmethod
    def cancel(self, submissions: Sequence[Submission]) -> list[str]:
        """Cancel jobs: a running one saves and stops, a queued one leaves the queue.

        Returns:
            For each submission why it could not be cancelled; empty if it was, or had already ended.

        Raises:
            SubmitError: No job was cancelled, as the engine does not answer.
        """

    def cancel_queued(self, submissions: Sequence[Submission]) -> list[str]:
        """Cancel jobs that are queued, and leave alone those that have started meanwhile, as far as that is seen.

        Returns:
            For each submission why it could not be cancelled; empty if it was, or had already ended.

        Raises:
            SubmitError: No job was cancelled, as the engine does not answer.
        """
        states = [status.state for status in self.query(submissions)]
        queued = [submission for submission, state in zip(submissions, states, strict=True) if state == "queued"]
        problems = iter(self.cancel(queued) if queued else ())
        return [next(problems) if state == "queued" else _STARTED[state] for state in states]

    @abstractmethod
    def preempt(self, submissions: Sequence[Submission]) -> None:
        """Preempt running jobs: they save and return to the queue. Raises SubmitError if a job cannot be signalled."""

    @abstractmethod
    def cancel_command(self, submissions: Sequence[Submission]) -> str:
        """Return a shell command that cancels jobs, for jobs that could not be recorded."""

    def ends_with_terminal(self, submission: Submission) -> bool:
        """Whether Ctrl-C in a terminal that waits for a job stops it; else the job continues."""
        return False

    def has_ended(self, run: Run, submission: Submission) -> bool:
        """Whether a job's logs are complete, or will not be seen from here, as far as that can be known quickly."""
        try:
            return self.query([submission], fresh=False)[0].state in ("gone", "unknown")
        except SubmitError:  # the engine does not answer; somebody who follows a log waits for it
            return False

    def read_log(self, run: Run, submission: Submission, rank: int, start: int) -> bytes | None:
        """Return a rank's log from a byte offset, all attempts of the job in a row; None if there is none."""
        try:
            with Store(submission.folder).open(f"{submission.job_id}_{rank}_log.out") as file:  # as submitit names it
                file.seek(start)
                return file.read()
        except MissingError:
            return None

    def describe_wait(self, submission: Submission) -> str:
        """Return what a job without a log waits for, as its engine says; may be empty, and takes seconds."""
        return ""

    def log_hint(self, submission: Submission) -> str:
        """Return a sentence on where else the output of a job's nodes may be found; may be empty."""
        return ""

    def run_after(
        self, job: Job, submissions: Sequence[Submission], command: Sequence[str], folder: Path, name: str
    ) -> str:
        """Submit a job that runs a command when all these jobs have ended, successfully or not; return its id.

        Args:
            job: The job whose account, partition and setup to use.
            submissions: The jobs to wait for.
            command: Program and arguments.
            folder: Folder for the log.
            name: Name of the job in the engine.

        Raises:
            SubmitError: The engine refused the job.
        """
        raise NotImplementedError(f"back end {self.name} cannot run a command after jobs")


def refuse_fields(job: Job, *fields: str) -> None:
    """Refuse a job that sets fields which its back end does not have. Raises ConfigError."""
    for field in fields:
        if value := getattr(job, field):
            raise ConfigError(f"job '{job.name}': {field} = {value!r}: back end {job.backend} has no such field.")


def new_submission(job: Job, job_id: str, folder: str | Path, data: str) -> Submission:
    """Return the record of a job that was submitted now, for a run whose data are in a folder."""
    fields = job.model_dump(mode="json")
    return Submission(
        backend=job.backend,
        job_id=job_id,
        folder=str(folder),
        shape=job.shape,
        time=time.time(),
        job=fields,
        data=data,
    )
