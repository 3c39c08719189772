"""What a back end is: the class that each of them extends, and the few words that they share."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError
from rsb_cluster.node.task import Task
from rsb_cluster.runs.run import Run, Submission

State = Literal["queued", "running", "gone"]


@dataclass(frozen=True)
class JobStatus:
    """How a back end sees a submission.

    Attributes:
        state: In our words.
        engine: In its own, with its own id, where that is worth a column: ``sky 12 RECOVERING``.
        reason: Why it gave the job up, where it says so.
    """

    state: State
    engine: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Price:
    """The lowest price of a node that fits a job.

    Attributes:
        usd_per_h: Of one node.
        source: Where and when, for people.
    """

    usd_per_h: float
    source: str


@dataclass(frozen=True)
class Finding:
    """What a check of ``doctor`` found.

    Attributes:
        what: What was checked.
        found: What is so, or what is amiss.
        advice: What to do; empty where all is well.
    """

    what: str
    found: str
    advice: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether nothing is to be done."""
        return not self.advice


Check = Callable[[Job], Finding | str]


class Backend(ABC):
    """Where runs are submitted to.

    Attributes:
        name: What a job file calls it.
        script_title: What a dry run writes over the text of ``script``.
        needs_object_store: Whether its nodes share no folder with this machine.
        can_exclude_hosts: Whether a job can keep off hosts.
        can_run_after: Whether it runs a command when jobs have ended.
        has_prices: Whether its nodes are paid for by the hour.
        price_hint: What to do where the price of a node is not known.
    """

    name: ClassVar[str]
    script_title: ClassVar[str] = "script"
    needs_object_store: ClassVar[bool] = False
    can_exclude_hosts: ClassVar[bool] = False
    can_run_after: ClassVar[bool] = False
    has_prices: ClassVar[bool] = False
    price_hint: ClassVar[str] = ""

    # --- before a submit --------------------------------------------------------------------------------------------

    @abstractmethod
    def check_job(self, job: Job) -> None:
        """Refuse a job that this back end can never run. Raises ConfigError."""

    @abstractmethod
    def check_available(self, job: Job) -> None:
        """Refuse a job that cannot be sent from this machine now. Raises SubmitError."""

    def doctor_checks(self) -> Mapping[str, Check]:
        """Return what ``doctor`` checks besides, by what it is called."""
        return {}

    def shares_files(self, job: Job) -> bool:
        """Whether the nodes of a job may see a folder of this machine."""
        return not self.needs_object_store

    def exclude_hosts(self, job: Job, hosts: Sequence[str]) -> Job:
        """Return the job that keeps off hosts.

        Raises:
            ConfigError: It cannot.
        """
        raise ConfigError(f"job '{job.name}': back end {self.name} has no hosts to choose from.")

    def price(self, job: Job, *, spot: bool) -> Price | None:
        """Return what a node of a job costs, preemptible or on demand; None where that is not known."""
        return None

    @abstractmethod
    def max_array_size(self) -> int:
        """Return how many runs one call of ``submit`` takes."""

    def concurrent_runs(self, job: Job, runs: int) -> int:
        """Return how many of the runs of one submit are at work at once, at most."""
        return min(runs, job.array_parallelism)

    @abstractmethod
    def script(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> str:
        """Return what ``submit`` would give to the engine, of the first task where they differ; may be empty.

        Raises:
            ConfigError: The job has options that cannot be.
        """

    # --- submitting, and after --------------------------------------------------------------------------------------

    @abstractmethod
    def submit(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> list[Submission]:
        """Hand runs over.

        Args:
            job: Where.
            tasks: One per run.
            folder: New folder for scripts and logs.
            name: What the engine shows.

        Returns:
            A submission per task.

        Raises:
            SubmitError: The engine refused.
        """

    @abstractmethod
    def query(self, submissions: Sequence[Submission]) -> list[JobStatus]:
        """Return how each is; one query for all. Raises SubmitError where the engine does not answer."""

    @abstractmethod
    def cancel(self, submissions: Sequence[Submission]) -> list[str]:
        """End jobs: a running one saves and stops, a queued one leaves the queue.

        Returns:
            For each why it could not be told; empty where it was told, or had ended by itself.

        Raises:
            SubmitError: None was told, as the engine does not answer.
        """

    @abstractmethod
    def preempt(self, submissions: Sequence[Submission]) -> None:
        """Tell running jobs to save and go back to the queue. Raises SubmitError where one could not be told."""

    @abstractmethod
    def cancel_command(self, submissions: Sequence[Submission]) -> str:
        """Return the command that ends jobs without us, for a user whose jobs we could not record."""

    def ends_with_terminal(self, submission: Submission) -> bool:
        """Whether Ctrl-C ends a job that its user waits for in a terminal; else the job has a life of its own."""
        return False

    def has_ended(self, run: Run, submission: Submission) -> bool:
        """Whether the logs of a job will not grow any more, as far as is known without effort."""
        return self.query([submission])[0].state == "gone"

    def read_log(self, run: Run, submission: Submission, rank: int, start: int) -> bytes | None:
        """Return a rank's log from a byte on, all attempts of the job in a row; None where there is none."""
        path = Path(submission.folder) / f"{submission.job_id}_{rank}_log.out"  # as submitit names it
        try:
            with path.open("rb") as file:
                file.seek(start)
                return file.read()
        except FileNotFoundError:
            return None

    def log_hint(self, submission: Submission) -> str:
        """Return where else to look for what a job's nodes said, as a sentence; may be empty."""
        return ""

    def run_after(
        self, job: Job, submissions: Sequence[Submission], command: Sequence[str], folder: Path, name: str
    ) -> str:
        """Run a command once when all these jobs have ended, however they did; return the id of its job.

        Args:
            job: Whose resources and site it takes.
            submissions: What it waits for.
            command: Program and arguments.
            folder: For its log.
            name: What the engine shows.

        Raises:
            SubmitError: The engine refused.
        """
        raise NotImplementedError(f"back end {self.name} cannot")


def new_submission(job: Job, job_id: str, folder: str | Path) -> Submission:
    """Return the record of a job that was handed over now."""
    fields = job.model_dump(mode="json")
    return Submission(
        backend=job.backend, job_id=job_id, folder=str(folder), shape=job.shape, time=time.time(), job=fields
    )
