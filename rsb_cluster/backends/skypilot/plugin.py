"""submitit's plugin ``sky``: a job is a managed job of SkyPilot; the run's folder replaces a shared file system.

submitit finds it by its entry points. Nothing is pickled: a node reads what to do from a spec. So the executor takes
only this package's ``Task``, and all options are in its job.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from submitit.core import core
from submitit.core.job_environment import JobEnvironment
from submitit.core.utils import DelayedSubmission, FailedJobError, UncompletedJobError

from rsb_cluster.backends.base import new_submission
from rsb_cluster.backends.skypilot import engine, wheel
from rsb_cluster.backends.skypilot.rank_logs import read_log
from rsb_cluster.backends.skypilot.sky_task import as_yaml, sky_task
from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import read_record
from rsb_cluster.errors import ConfigError
from rsb_cluster.node.node_spec import NodeSpec, Wheel, submission_folder
from rsb_cluster.node.task import Task
from rsb_cluster.runs.run import Run, Submission
from rsb_cluster.storage.store import Store

# SkyPilot's states that submitit's base class would take for final ones.
_SUBMITIT_STATES = {
    "SUBMITTED": "PENDING", "STARTING": "PENDING", "RECOVERING": "REQUEUED",
    "WINDING_DOWN": "COMPLETING", "CANCELLING": "COMPLETING",
}  # fmt: skip


class SkyWatcher(core.InfoWatcher):
    """Queries SkyPilot for all jobs together."""

    def update(self) -> None:
        """Query now."""
        self._num_calls += 1
        found = engine.jobs()
        for job_id in self._registered:
            job = found.get(job_id)
            self._info_dict[job_id] = {"State": job.state, "Reason": job.reason} if job else {"State": "GONE"}
        self._last_status_check = time.time()
        self._finished = {job_id for job_id in self._registered if self.is_done(job_id, mode="cache")}

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        """Return the state of a job as submitit names it."""
        state = self.get_info(job_id, mode).get("State", "UNKNOWN")
        return _SUBMITIT_STATES.get(state, state)


class SkyJob(core.Job[None]):
    """A submitted job. Its result is the run's and not a rank's: a rank that lost a peer has failed, but not the run.

    Args:
        folder: Required by submitit.
        run: The run that it trains.
        record: The submission as recorded in the run's folder.
    """

    watcher = SkyWatcher(delay_s=15)

    def __init__(self, folder: Path, run: Run, record: Submission) -> None:
        super().__init__(folder, record.job_id)
        self.run, self.record = run, record

    def done(self, force_check: bool = False) -> bool:
        """Whether the run has a result, or the engine gave up the job."""
        if self.run.result() is not None:
            return True
        return bool(self.watcher.is_done(self.job_id, mode="force" if force_check else "standard"))

    def results(self) -> list[None]:
        """Wait until the job has ended; training returns nothing.

        Raises:
            FailedJobError: The run ended without a result.
        """
        self.wait()
        if (error := self.exception()) is not None:
            raise error
        return [None]

    def exception(self) -> UncompletedJobError | FailedJobError | None:
        """Wait until the job has ended; return an error if the run has no result."""
        self.wait()
        if self.run.result() is not None:
            return None
        attempts = self.run.attempts()
        why = f"{attempts[-1].cause or 'killed'} {attempts[-1].message}" if attempts else self.get_info().get("Reason")
        return FailedJobError(f"{self.run.run_id} ended without a result: {why}")

    def stdout(self) -> str | None:
        """Return the log of rank 0 from the run's folder, as far as it was uploaded."""
        content = read_log(self.run, self.job_id, 0, 0)
        return None if content is None else content.decode(errors="replace")

    def stderr(self) -> str | None:
        """Return None: a rank has only one log."""
        return None

    def cancel(self, check: bool = True) -> None:
        """Cancel the managed job at once; ``rsb-cluster cancel`` lets it save first."""
        engine.cancel([self.job_id])


class SkyExecutor(core.Executor):
    """Submits tasks to SkyPilot, one managed job each.

    Args:
        folder: Required by submitit; nothing is written there.
    """

    job_class = SkyJob

    @classmethod
    def affinity(cls) -> int:
        """Return the lowest priority: it costs money, so submitit must not choose it automatically."""
        return 0

    def _internal_update_parameters(self, **kwargs: Any) -> None:
        if kwargs:
            raise ConfigError(f"the executor 'sky' has no parameter {', '.join(kwargs)}; set it in the task's job.")

    def _internal_process_submissions(self, delayed_submissions: Sequence[DelayedSubmission]) -> list[core.Job[Any]]:
        tasks = []
        for delayed in delayed_submissions:
            if not isinstance(delayed.function, Task) or delayed.args or delayed.kwargs:
                raise ConfigError(f"the executor 'sky' takes an rsb_cluster Task, not {delayed.function!r}.")
            tasks.append(delayed.function)
        code, pins = wheel.build(), wheel.pins()
        jobs: list[core.Job[Any]] = []
        sky_tasks = []
        for task in tasks:
            spec = make_spec(task, new_id(), code, pins)
            sky_tasks.append(sky_task(spec, os.environ))
            jobs.append(SkyJob(self.folder, *_write(spec, code, sky_tasks[-1])))
        engine.launch(sky_tasks, pool=read_record(Job, tasks[0].job, "the submitted job").cloud.pool)
        return jobs


class SkyJobEnvironment(JobEnvironment):
    """The rank and world size of a process, from the environment variables that its node sets."""

    _env: ClassVar[dict[str, str]] = {
        "job_id": "RSB_JOB_ID",
        "num_tasks": "RSB_WORLD_SIZE",
        "num_nodes": "SKYPILOT_NUM_NODES",
        "node": "SKYPILOT_NODE_RANK",
        "global_rank": "RSB_RANK",
        "local_rank": "RSB_LOCAL_RANK",
    }

    @property
    def hostnames(self) -> list[str]:
        """The addresses of all nodes, in the order of their ranks."""
        return os.environ["SKYPILOT_NODE_IPS"].split()


def new_id() -> str:
    """Return a new id for a submission, which is also the name of its managed job."""
    return f"{engine.NAME_PREFIX}{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"


def make_spec(task: Task, submission_id: str, code: wheel.BuiltWheel, pins: Sequence[str]) -> NodeSpec:
    """Return the spec that the nodes of a submission read."""
    return NodeSpec(
        submission_id=submission_id,
        run_url=task.run_url,
        run_id=task.run_id,
        job=task.job,
        data=task.data,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        code=Wheel(url=f"{task.run_url}/{_code_path(code)}", sha256=code.sha256),
        pins=tuple(pins),
    )


def _code_path(code: wheel.BuiltWheel) -> str:
    return f"code/{code.sha256}/{code.filename}"


def _write(spec: NodeSpec, code: wheel.BuiltWheel, task: dict[str, Any]) -> tuple[Run, Submission]:
    """Write to the run's folder what its nodes read, and the submission's record, without which no job may start."""
    run = Run(Store(spec.run_url), spec.run_id)
    if not run.store.exists(_code_path(code)):
        run.store.write_bytes(_code_path(code), code.content)
    run.store.write_bytes(spec.path, spec.encode())
    folder = submission_folder(spec.submission_id)
    run.store.write_bytes(f"{folder}/task.yaml", as_yaml(task).encode())
    job = read_record(Job, spec.job, "the submitted job")
    submission = new_submission(job, spec.submission_id, run.store.locate(folder), spec.data)
    run.add_submission(submission)
    return run, submission
