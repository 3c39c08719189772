"""Which runs are submitted together, as job arrays, and where the scripts and logs of these jobs are."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rsb_cluster import __version__, backends
from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError, expand_home
from rsb_cluster.node.task import Task
from rsb_cluster.runs import sharing
from rsb_cluster.runs.run import EVALUATION_JOBS, Run
from rsb_cluster.storage.store import Store


@dataclass(frozen=True)
class ToSubmit:
    """A run to submit with a job.

    Attributes:
        data: Where the run's data are now.
    """

    run: Run
    job: Job
    data: str


@dataclass(frozen=True)
class Array:
    """Runs with the same resources, submitted together: a job array, or a single job for one run.

    Attributes:
        data: Where the data of each run are now.
    """

    job: Job
    name: str
    folder: Path
    runs: tuple[Run, ...]
    data: tuple[str, ...]

    @property
    def tasks(self) -> list[Task]:
        """The tasks of the array, one per run."""
        job = self.job.model_dump(mode="json")
        return [
            Task(run.url, run.run_id, job, data, __version__) for run, data in zip(self.runs, self.data, strict=True)
        ]

    @property
    def script(self) -> str:
        """The exact script that the engine will get; empty on this machine."""
        return backends.backend_of(self.job).script(self.job, self.tasks, self.folder, self.name)


def make_arrays(runs_url: str, runs: Sequence[ToSubmit], *, name: str) -> tuple[Array, ...]:
    """Group runs into as few job arrays as their resources and the site's limit allow."""
    by_job: dict[str, list[ToSubmit]] = {}
    for member in runs:
        by_job.setdefault(member.job.model_dump_json(), []).append(member)
    parts: list[list[ToSubmit]] = []
    for members in by_job.values():
        size = backends.backend_of(members[0].job).max_array_size() if len(members) > 1 else 1
        parts += [members[i : i + size] for i in range(0, len(members), size)]
    stamp = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{name}-{os.getpid()}"
    arrays = []
    for number, members in enumerate(parts):
        job = members[0].job
        job_name = members[0].run.run_id if len(runs) == 1 else name
        folder = submissions_folder(job, runs_url) / (stamp if len(parts) == 1 else f"{stamp}-{number}")
        if "%" in str(folder):
            raise ConfigError(
                f"the scripts and logs of jobs cannot be written to {folder}: to Slurm and submitit a '%' in a path "
                "stands for the job's number (%j) and the like. Use other --runs, or --set job.submissions=FOLDER."
            )
        arrays.append(Array(job, job_name, folder, tuple(m.run for m in members), tuple(m.data for m in members)))
    return tuple(arrays)


def submissions_folder(job: Job, runs_url: str) -> Path:
    """Return this user's folder for scripts and logs: nodes unpickle what lies there, so it is nobody else's."""
    # Those of evaluations, whose folders are below that of the runs, are with the others.
    store, user = Store(runs_url.removesuffix(f"/{EVALUATION_JOBS}")), sharing.user_folder()
    if job.submissions:
        return expand_home(job.submissions).absolute() / user
    return (Path(store.url) if store.is_local else Path.cwd()) / "submissions" / user
