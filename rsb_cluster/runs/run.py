"""A run: one training from a seed to its end, over any number of attempts, and the files in its folder.

The folder ``<runs>/<run_id>/`` has:

- ``recipe.json``, ``spec.json``: written once, by the first submit
- ``init/``: the initial weights, if the run has any; copied by the first submit
- ``submissions/<time>-<job>.json``: one per submit: back end, scheduler's id, folder of scripts and logs
- ``submissions/<id>/spec.json``, ``task.yaml``: the instructions for a cloud's nodes, and SkyPilot's task
- ``code/``: wheels for these nodes
- ``cancelled.json``: the jobs that the user cancelled last
- ``attempts/0001.json``: one per attempt; ``0001-alive.json``: its heartbeat; ``0001-asked.json``: the user's request
  that it stop; ``0001-rank00003.json``: the report of a failed rank
- ``notices/0001/<host>.json``: a cloud's notice, during attempt 1, that it reclaims a host
- ``checkpoints/step-00001200-a0001/``: files, and ``manifest.json``, which is written last
- ``metrics/0001-000000.jsonl``: rows of attempt 1
- ``samples/0001-rank00000.jsonl``: the samples of each micro-batch, if the job sets ``log_samples``
- ``logs/0001-rank00000.log``: one per attempt and rank
- ``result.json``: written last; it makes the run finished
- ``summary.json``: in an object store, copies of small files for ``status`` (`rsb_cluster.runs.snapshot`)
"""

from __future__ import annotations

import calendar
import itertools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rsb_cluster.config.recipe import METADATA_FIELDS, Recipe
from rsb_cluster.config.schema import Section, Seed, read_record
from rsb_cluster.errors import MissingError, StorageError
from rsb_cluster.runs.provenance import brief_code
from rsb_cluster.storage.store import Store

Cause = Literal[
    "finished", "preempted", "timed out", "stopped", "crashed", "failed", "lost peer", "stuck", "superseded"
]

# Causes of an attempt's end after which nothing starts another attempt of the same job.
FINAL_CAUSES: tuple[Cause | Literal[""], ...] = ("finished", "failed", "stopped", "superseded")

# The folder of evaluations (`rsb_cluster.evaluation.record`), beside the runs.
EVALUATIONS = "evaluations"

# The folder of evaluations that were submitted as jobs (`rsb_cluster.evaluation.jobs`), beside the runs; and the
# beginning of their ids. The folder of one has the files of a run that concern its job: submissions, attempts, logs.
EVALUATION_JOBS = "evaluation-jobs"
EVALUATION_PREFIX = "eval-"

# Values of a result that are numbers where it has them.
_NUMBERS = ("steps", "epochs", "top1", "top5", "loss", "attempts", "images_per_s", "gpu_hours", "goodput", "best_top1")

# Threads that read small files of many runs. An object store takes some ten milliseconds for each, and this process
# two: more threads would only wait for each other.
READERS = 24

# The start of a submission's file name: when, in UTC.
_STAMP = "%Y%m%d-%H%M%S"
_SUBMISSION_NAME = re.compile(r"\d{8}-\d{6}-.*\.json")


class RunGoneError(MissingError):
    """The folder of a run that was there is gone; it must not be made again."""


class InitialWeights(Section):
    """The initial weights of a run: a copy of a file, as the source may change or disappear."""

    source: str = Field(description="where the file was copied from")
    file: str = Field(description="its name in the run's folder init/")
    sha256: str
    architecture: str
    procedure: str = Field("", description="the paper's procedure that trained the weights; empty: unknown")


class Spec(Section):
    """What the first submit fixed, besides the recipe."""

    run_id: str
    seed: Seed
    virtual_ranks: int
    data: str = Field(description="folder that held train/ and val/ at the first submit")
    train_digest: str
    val_digest: str
    init: InitialWeights | None = None
    modified: dict[str, tuple[Any, Any]] = Field({})
    code: dict[str, str] = Field({})
    packages: dict[str, str] = Field({})
    created: float = 0.0
    draws: int = Field(1, description="version of the order of samples and of all draws (data.order.DRAWS)")

    def brief(self) -> Spec:
        """Return the spec with a brief description of the code (`provenance.brief_code`)."""
        return self.model_copy(update={"code": brief_code(self.code)})


class Submission(Section):
    """One submit of a run to a back end."""

    backend: str
    job_id: str = Field(description="the scheduler's id of the job")
    folder: str = Field(description="submitit's folder of scripts and logs")
    shape: str
    time: float
    job: dict[str, Any] = Field({}, description="the job's fields, to resubmit the run unchanged")
    data: str = Field("", description="where the data were at this submit; empty: as in the spec")
    cluster: str = Field("", description="Slurm's cluster, where sbatch named it")
    user: str = Field("", description="who submitted it, by Slurm's name; empty: unknown")
    name: str = Field("", description="the job's name in Slurm; empty: unknown")


class Attempt(Section):
    """One attempt of a run. ``cause`` is empty while it runs, and stays empty if it was killed.

    Steps beyond the ``start_step`` of a later attempt belong to the later attempt.
    """

    number: int
    job_id: str
    restart: int = 0
    world_size: int
    hosts: tuple[str, ...]
    gpus: int = 0
    started: float
    start_step: int
    ended: float = 0.0
    end_step: int = 0
    cause: Cause | Literal[""] = ""
    message: str = ""
    environment: dict[str, str] = Field({}, description="versions and hardware, by name; empty: not recorded")


class Heartbeat(Section):
    """The last heartbeat of an attempt.

    Attributes:
        beats: Heartbeats so far; while the number grows the attempt is alive, whatever the clocks say.
        step: Optimizer steps done.
        time: Unix time.
    """

    beats: int
    step: int
    time: float


@dataclass(frozen=True)
class Run:
    """A run's folder, and typed access to its small files."""

    store: Store
    run_id: str

    @staticmethod
    def at(runs_url: str | Path, run_id: str) -> Run:
        """Return the run with an id in a folder of runs, whether it exists or not.

        Raises:
            ConfigError: The folder's URL is only read, or none at all.
        """
        folder = Store(runs_url)
        folder.check_not_read_only("runs")
        return Run(folder.child(run_id), run_id)

    @property
    def url(self) -> str:
        """URL of the run's folder."""
        return self.store.url

    @property
    def runs_url(self) -> str:
        """URL of the folder of runs."""
        return self.url.rpartition("/")[0]

    @property
    def is_evaluation(self) -> bool:
        """Whether this is the folder of an evaluation that was submitted as a job, and not of a training."""
        return self.run_id.startswith(EVALUATION_PREFIX) and self.runs_url.endswith(f"/{EVALUATION_JOBS}")

    @property
    def init(self) -> Store:
        """Folder of the initial weights."""
        return self.store.child("init")

    def exists(self) -> bool:
        """Whether the run was ever submitted."""
        return self.store.exists("spec.json")

    def check_exists(self) -> None:
        """Refuse to write into a run whose folder is gone, as that would make the folder again; ranks check this.

        Raises:
            RunGoneError: It has.
        """
        if not self.exists():
            raise RunGoneError(
                f"the run's folder {self.url} no longer exists, so nothing can be saved: it was deleted or moved. "
                "Submit the run again to train it from the start, or put the folder back to resume it."
            )

    def create(self, recipe: Recipe, spec: Spec) -> bool:
        """Write the two files that never change, unless they exist; the spec last, as it makes the run exist.

        A folder without a spec, which a killed submit has left, becomes a run. One that is made here is private.

        Returns:
            Whether the run has this spec; if not, another submit was faster, and the run has the other spec.

        Raises:
            StorageError: The folder cannot be written, or has another recipe.
        """
        if not self.store.exists():
            self.store.make_folder(0o700)
        if not self.store.create_json("recipe.json", recipe.model_dump(mode="json")):
            check_same_recipe(self, recipe)
        return self.store.create_json("spec.json", spec.model_dump(mode="json"))

    def recipe(self) -> Recipe:
        """Read the resolved recipe."""
        return read_record(Recipe, self.store.read_json("recipe.json"), self.store.locate("recipe.json"))

    def spec(self) -> Spec:
        """Read the spec."""
        return read_record(Spec, self.store.read_json("spec.json"), self.store.locate("spec.json"))

    def add_submission(self, submission: Submission) -> None:
        """Record that the run was submitted to a back end.

        It becomes the newest submission, also if an earlier one was made on a machine whose clock is ahead.
        """
        stamp = time.strftime(_STAMP, time.gmtime(submission.time))
        earlier = [name for name in self.store.names("submissions") if _SUBMISSION_NAME.fullmatch(name)]
        if earlier and (last := max(earlier)[: len(stamp)]) > stamp:
            later = calendar.timegm(time.strptime(last, _STAMP)) + 1
            submission = submission.model_copy(update={"time": float(later)})
            stamp = time.strftime(_STAMP, time.gmtime(later))
        self.store.write_json(f"submissions/{stamp}-{submission.job_id}.json", submission.model_dump(mode="json"))

    def submissions(self) -> list[Submission]:
        """Return all submissions, oldest first."""
        found = [
            read_record(
                Submission, self.store.read_json(f"submissions/{name}"), self.store.locate(f"submissions/{name}")
            )
            for name in self.store.names("submissions")
            if name.endswith(".json")
        ]
        return sorted(found, key=lambda submission: submission.time)

    def data_url(self) -> str:
        """Return where the run's data were at its last submit: they may have moved since the first one."""
        return next((s.data for s in reversed(self.submissions()) if s.data), "") or self.spec().data

    def request_cancel(self, job_ids: Sequence[str]) -> None:
        """Record that the user cancelled jobs, so they must not be restarted.

        Args:
            job_ids: All cancelled jobs, the newest last; empty: removes the record.
        """
        if job_ids:
            # Jobs that an earlier version queued read only 'job_id'.
            self.store.write_json("cancelled.json", {"job_id": job_ids[-1], "job_ids": list(job_ids)})
        else:
            self.store.delete("cancelled.json")

    def cancelled(self) -> tuple[str, ...]:
        """Return the jobs that the user cancelled last, the newest last."""
        try:
            record = self.store.read_json("cancelled.json")
        except MissingError:
            return ()
        return tuple(record.get("job_ids") or [record["job_id"]])

    def is_cancelled(self, job_id: str) -> bool:
        """Whether the user cancelled a job."""
        return job_id in self.cancelled()

    def attempts(self) -> list[Attempt]:
        """Return all attempts, oldest first."""
        return [self.attempt(number) for number in self.attempt_numbers()]

    def attempt_numbers(self) -> list[int]:
        """Return the numbers of all attempts, oldest first."""
        names = (name.removeprefix("attempts/").removesuffix(".json") for name in self.store.files("attempts"))
        found = sorted(int(name) for name in names if name.isdigit())
        # Each attempt has the number after the last; an object store's listings are complete.
        while self.store.is_local and self.store.can_open(_attempt_name(following := max(found, default=0) + 1)):
            found.append(following)
        return found

    def claim_attempt(self, attempt: Attempt) -> bool:
        """Write the record of a new attempt; return False if its number is taken."""
        return self.store.create_json(_attempt_name(attempt.number), attempt.model_dump(mode="json"))

    def write_attempt(self, attempt: Attempt) -> None:
        """Write or replace the record of an attempt."""
        self.store.write_json(_attempt_name(attempt.number), attempt.model_dump(mode="json"))

    def attempt(self, number: int) -> Attempt:
        """Read the record of an attempt."""
        name = _attempt_name(number)
        return read_record(Attempt, self.store.read_json(name), self.store.locate(name))

    def write_heartbeat(self, number: int, heartbeat: Heartbeat) -> None:
        """Write an attempt's heartbeat."""
        self.store.write_json(f"attempts/{number:04d}-alive.json", heartbeat.model_dump(mode="json"))

    def heartbeat(self, number: int) -> Heartbeat | None:
        """Read an attempt's last heartbeat; None if it sent none."""
        name = f"attempts/{number:04d}-alive.json"
        try:
            return read_record(Heartbeat, self.store.read_json(name), self.store.locate(name))
        except MissingError:
            return None

    def request_stop(self, number: int) -> None:
        """Request that an attempt save and exit, if no signal reaches its ranks; rank 0 checks at each heartbeat."""
        self.store.write_json(f"attempts/{number:04d}-asked.json", {"time": time.time()})

    def is_stop_requested(self, number: int) -> bool:
        """Whether an attempt was requested to stop."""
        return self.store.exists(f"attempts/{number:04d}-asked.json")

    def write_rank_failure(self, number: int, rank: int, failure: dict[str, Any]) -> None:
        """Record the failure of a rank: cause, message, host, traceback."""
        self.store.write_json(f"attempts/{number:04d}-rank{rank:05d}.json", failure)

    def rank_failures(self, attempt: int) -> dict[int, dict[str, Any]]:
        """Return the failures of ranks in an attempt, by rank."""
        prefix = f"attempts/{attempt:04d}-rank"
        names = [name for name in self.store.files("attempts") if name.startswith(prefix)]
        return {int(name[len(prefix) : -len(".json")]): self.store.read_json(name) for name in names}

    def write_notice(self, number: int, host: str, notice: dict[str, Any]) -> None:
        """Record a cloud's notice that it reclaims a host: source, deadline, text."""
        self.store.write_json(f"notices/{number:04d}/{host}.json", notice)

    def notices(self, number: int) -> dict[str, dict[str, Any]]:
        """Return the interruption notices of an attempt, by host."""
        names = self.store.files(f"notices/{number:04d}")
        return {name.rpartition("/")[2].removesuffix(".json"): self.store.read_json(name) for name in names}

    def failed_hosts(self, attempts: int = 3) -> list[str]:
        """Return the hosts on which ranks of the last attempts crashed, stalled or were lost, or that are faulty."""
        failures = [failure for n in self.attempt_numbers()[-attempts:] for failure in self.rank_failures(n).values()]
        hosts = [failure["host"] for failure in failures if failure["cause"] != "failed"]
        starts = [name for name in self.store.files("attempts") if name.startswith("attempts/start-")]
        reports = [self.store.read_json(name) for name in starts]
        hosts += [report["host"] for report in reports if report.get("host_fault")]
        return list(dict.fromkeys(hosts))

    def result(self) -> dict[str, Any] | None:
        """Return the result, or None if the run has not finished. Raises StorageError if the file is damaged."""
        try:
            found: dict[str, Any] = self.store.read_json("result.json")
        except MissingError:
            return None
        if isinstance(found, dict) and all(isinstance(found.get(name, 0), int | float) for name in _NUMBERS):
            return found
        raise StorageError(f"{self.url}/result.json is no result. Was it edited by hand? Restore it from a copy.")


def _attempt_name(number: int) -> str:
    return f"attempts/{number:04d}.json"


def environment_changes(attempts: Sequence[Attempt]) -> list[str]:
    """Return what changed between consecutive attempts: ``torch: 2.6.0 in attempt 3, 2.7.0 in attempt 4``.

    Attempts of earlier versions, which recorded no environment, are left out.
    """
    recorded = [attempt for attempt in attempts if attempt.environment]
    return [
        f"{name}: {one.environment.get(name, 'none')} in attempt {one.number}, "
        f"{other.environment.get(name, 'none')} in attempt {other.number}"
        for one, other in itertools.pairwise(recorded)
        for name in {**one.environment, **other.environment}
        if one.environment.get(name) != other.environment.get(name)
    ]


def check_same_recipe(existing: Run, recipe: Recipe) -> None:
    """Refuse to mix two recipes in one folder (possible only if files were edited by hand).

    Raises:
        StorageError: The recipe in the run's folder is another one.
    """
    # The run id does not depend on the fields that only describe the recipe.
    if existing.recipe().model_dump(exclude=METADATA_FIELDS) != recipe.model_dump(exclude=METADATA_FIELDS):
        raise StorageError(
            f"{existing.url}/recipe.json is not the recipe of its run id; it was edited. "
            "Move the folder away, or choose another --runs."
        )
