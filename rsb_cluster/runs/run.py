"""A run: one training from seed to end, over any number of attempts. Its folder and what lies in it.

In ``<runs>/<run_id>/`` lie:

- ``recipe.json``, ``spec.json``: written once, at the first submit
- ``init/``: the file of weights that it starts from, where it has one; copied at the first submit
- ``submissions/<time>-<job>.json``: one per submit: back end, scheduler's id, folder of scripts and logs
- ``submissions/<id>/spec.json``, ``task.yaml``: what a cloud's nodes, and the engine, were told
- ``code/``: wheels for these nodes
- ``cancelled.json``: the jobs that the user ended last
- ``attempts/0001.json``: one per start by a scheduler; ``0001-alive.json``: its heartbeat; ``0001-asked.json``:
  the user's wish that it ends; ``0001-rank00003.json``: what is known of a rank that failed
- ``notices/0001/<host>.json``: a cloud's word in attempt 1 that it takes a host back
- ``checkpoints/step-00001200-a0001/``: files, and ``manifest.json`` last
- ``metrics/0001-000000.jsonl``: rows of attempt 1
- ``samples/0001-rank00000.jsonl``: what each micro-batch held, where the job has ``log_samples``
- ``logs/0001-rank00000.log``: per attempt and rank
- ``result.json``: last of all. No result.json, no result
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rsb_cluster.config.recipe import ABOUT, Recipe
from rsb_cluster.config.schema import Section, read_record
from rsb_cluster.errors import MissingError, StorageError
from rsb_cluster.runs.provenance import brief_code
from rsb_cluster.storage.store import Store

Cause = Literal[
    "finished", "preempted", "timed out", "stopped", "crashed", "failed", "lost peer", "stuck", "superseded"
]

# Beside the runs: what `rsb_cluster.evaluation.record` keeps.
EVALUATIONS = "evaluations"

# Small files of many runs are read at once: an object store answers each after some milliseconds.
READERS = 32


class InitialWeights(Section):
    """The file of weights that a run starts from: a copy, as what a source stands for may change or go."""

    source: str = Field(description="where it was copied from")
    file: str = Field(description="its name in the run's folder init/")
    sha256: str
    architecture: str
    procedure: str = Field("", description="the paper's procedure that made them; empty: not known")


class Spec(Section):
    """What was fixed at the first submit, besides the recipe."""

    run_id: str
    seed: int
    virtual_ranks: int
    data: str = Field(description="folder that holds train/ and val/")
    train_digest: str
    val_digest: str
    init: InitialWeights | None = None
    modified: dict[str, tuple[Any, Any]] = Field({})
    code: dict[str, str] = Field({})
    packages: dict[str, str] = Field({})
    created: float = 0.0

    def brief(self) -> Spec:
        """Return it with uncommitted changes of the code named by a digest."""
        return self.model_copy(update={"code": brief_code(self.code)})


class Submission(Section):
    """One submit of a run to a back end."""

    backend: str
    job_id: str = Field(description="the scheduler's")
    folder: str = Field(description="submitit's folder of scripts and logs")
    shape: str
    time: float
    job: dict[str, Any] = Field({}, description="the job's fields, to send the run again as it was")


class Attempt(Section):
    """One start of a run by a scheduler. ``cause`` is empty while it runs, and stays so when it was killed.

    The steps beyond ``start_step`` of a later attempt are that one's.
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


class Heartbeat(Section):
    """The last sign of life of an attempt.

    Attributes:
        beats: Signs so far; while it grows the attempt is alive, whatever the clocks say.
        step: Optimizer steps done.
        time: Seconds since 1970.
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
        """Return the run of that id below a folder of runs, whether it exists or not."""
        return Run(Store(runs_url).child(run_id), run_id)

    @property
    def url(self) -> str:
        """Where the run lies."""
        return self.store.url

    @property
    def runs_url(self) -> str:
        """The folder of runs that it is in."""
        return self.url.rpartition("/")[0]

    @property
    def init(self) -> Store:
        """Folder of the weights that it starts from."""
        return self.store.child("init")

    def exists(self) -> bool:
        """Whether it was ever submitted."""
        return self.store.exists("spec.json")

    def create(self, recipe: Recipe, spec: Spec) -> bool:
        """Write the two files that never change where they are not; the spec last, as it makes the run exist.

        A folder that a killed submit has left without a spec becomes a run.

        Returns:
            Whether the run has this spec; if not, another submit was faster, and the run has that one's.

        Raises:
            StorageError: The folder cannot be written, or holds another recipe.
        """
        self.store.make_private()
        if not self.store.create_json("recipe.json", recipe.model_dump(mode="json")):
            check_same(self, recipe)
        return self.store.create_json("spec.json", spec.model_dump(mode="json"))

    def recipe(self) -> Recipe:
        """Read the resolved recipe."""
        return read_record(Recipe, self.store.read_json("recipe.json"), self.store.locate("recipe.json"))

    def spec(self) -> Spec:
        """Read what was fixed at the first submit."""
        return read_record(Spec, self.store.read_json("spec.json"), self.store.locate("spec.json"))

    def add_submission(self, submission: Submission) -> None:
        """Note that the run was handed to a back end."""
        name = f"submissions/{time.strftime('%Y%m%d-%H%M%S', time.gmtime(submission.time))}-{submission.job_id}.json"
        self.store.write_json(name, submission.model_dump(mode="json"))

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

    def request_cancel(self, job_ids: Sequence[str]) -> None:
        """Say that jobs are ended by the user and not to be started again; of none, that no job is.

        Args:
            job_ids: All of them, the newest last.
        """
        if job_ids:
            # 'job_id' alone is what jobs look for that were queued by a version that ended one job.
            self.store.write_json("cancelled.json", {"job_id": job_ids[-1], "job_ids": list(job_ids)})
        else:
            self.store.delete("cancelled.json")

    def cancelled(self) -> tuple[str, ...]:
        """Return the jobs that the user asked to end last, the newest last."""
        try:
            said = self.store.read_json("cancelled.json")
        except MissingError:
            return ()
        return tuple(said.get("job_ids") or [said["job_id"]])

    def is_cancelled(self, job_id: str) -> bool:
        """Whether the user asked to end this job."""
        return job_id in self.cancelled()

    def attempts(self) -> list[Attempt]:
        """Return all attempts, oldest first."""
        return [self.attempt(number) for number in self.attempt_numbers()]

    def attempt_numbers(self) -> list[int]:
        """Return the numbers of all attempts, oldest first."""
        names = (name.removeprefix("attempts/").removesuffix(".json") for name in self.store.files("attempts"))
        return sorted(int(name) for name in names if name.isdigit())

    def claim_attempt(self, attempt: Attempt) -> bool:
        """Write the record of a new attempt; return False where its number is taken."""
        return self.store.create_json(_attempt_name(attempt.number), attempt.model_dump(mode="json"))

    def write_attempt(self, attempt: Attempt) -> None:
        """Write or replace the record of an attempt."""
        self.store.write_json(_attempt_name(attempt.number), attempt.model_dump(mode="json"))

    def attempt(self, number: int) -> Attempt:
        """Read the record of an attempt."""
        name = _attempt_name(number)
        return read_record(Attempt, self.store.read_json(name), self.store.locate(name))

    def write_heartbeat(self, number: int, heartbeat: Heartbeat) -> None:
        """Write an attempt's sign of life."""
        self.store.write_json(f"attempts/{number:04d}-alive.json", heartbeat.model_dump(mode="json"))

    def heartbeat(self, number: int) -> Heartbeat | None:
        """Read an attempt's last sign of life; None where it gave none."""
        name = f"attempts/{number:04d}-alive.json"
        try:
            return read_record(Heartbeat, self.store.read_json(name), self.store.locate(name))
        except MissingError:
            return None

    def request_stop(self, number: int) -> None:
        """Ask an attempt to save and end, where no signal reaches its ranks; they look with each sign of life."""
        self.store.write_json(f"attempts/{number:04d}-asked.json", {"time": time.time()})

    def is_stop_requested(self, number: int) -> bool:
        """Whether an attempt was asked to end."""
        return self.store.exists(f"attempts/{number:04d}-asked.json")

    def write_rank_failure(self, number: int, rank: int, failure: dict[str, Any]) -> None:
        """Note what is known of a rank that failed: cause, message, host, traceback."""
        self.store.write_json(f"attempts/{number:04d}-rank{rank:05d}.json", failure)

    def rank_failures(self, attempt: int) -> dict[int, dict[str, Any]]:
        """Return what ranks reported of their failure in an attempt, by rank."""
        prefix = f"attempts/{attempt:04d}-rank"
        names = [name for name in self.store.files("attempts") if name.startswith(prefix)]
        return {int(name[len(prefix) : -len(".json")]): self.store.read_json(name) for name in names}

    def write_notice(self, number: int, host: str, notice: dict[str, Any]) -> None:
        """Note in an attempt that a cloud takes a host back: source, deadline, text."""
        self.store.write_json(f"notices/{number:04d}/{host}.json", notice)

    def notices(self, number: int) -> dict[str, dict[str, Any]]:
        """Return what clouds announced during an attempt, by host."""
        names = self.store.files(f"notices/{number:04d}")
        return {name.rpartition("/")[2].removesuffix(".json"): self.store.read_json(name) for name in names}

    def failed_hosts(self, attempts: int = 3) -> list[str]:
        """Return the hosts on which ranks of the last attempts failed, stood still or were lost."""
        reports = [failure for n in self.attempt_numbers()[-attempts:] for failure in self.rank_failures(n).values()]
        return list(dict.fromkeys(report["host"] for report in reports if report["cause"] != "failed"))

    def result(self) -> dict[str, Any] | None:
        """Return the result, or None where the run has not finished."""
        try:
            value: dict[str, Any] = self.store.read_json("result.json")
        except MissingError:
            return None
        return value


def _attempt_name(number: int) -> str:
    return f"attempts/{number:04d}.json"


def check_same(existing: Run, recipe: Recipe) -> None:
    """Refuse to mix two sciences in one folder (possible only if files were edited by hand)."""
    # The run id does not stand for what a recipe says of itself.
    if existing.recipe().model_dump(exclude=ABOUT) != recipe.model_dump(exclude=ABOUT):
        raise StorageError(
            f"{existing.url}/recipe.json is not the recipe that its run id stands for; it was edited. "
            "Move the folder away, or choose another --runs."
        )
