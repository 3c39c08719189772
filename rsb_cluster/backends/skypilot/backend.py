"""Machines of any cloud: each run is a managed job of SkyPilot's, which gets machines, and new ones when they go."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rsb_cluster.backends.base import Backend, Check, JobStatus, Price, State
from rsb_cluster.backends.skypilot import engine, rank_logs, wheel
from rsb_cluster.backends.skypilot.prices import price
from rsb_cluster.backends.skypilot.sky_task import as_yaml, sky_task
from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError
from rsb_cluster.node.task import Task
from rsb_cluster.runs.run import Run, Submission

# How long a cancelled run may take to save, s: its ranks hear of it with a heartbeat, and stop after a step.
SAVE_S = 120.0
_POLL_S = 2.0

_STATES: dict[str, State] = {
    "PENDING": "queued", "SUBMITTED": "queued", "STARTING": "queued", "RECOVERING": "queued",
    "RUNNING": "running", "WINDING_DOWN": "running", "CANCELLING": "running",
}  # fmt: skip

# Ends of an attempt after which the engine is not to start another.
_LAST = ("finished", "failed", "stopped", "superseded")


class SkyPilot(Backend):
    """The back end ``cloud``."""

    name = "cloud"
    script_title = "SkyPilot task"
    needs_object_store = True
    has_prices = True
    price_hint = (
        "unknown (no catalog of SkyPilot's on this machine has such a node): say --set job.cloud.price=USD, of a node "
        "and hour, or run 'sky gpus list' once where there is a network"
    )

    def check_job(self, job: Job) -> None:
        """Refuse what SkyPilot cannot have, and spot machines without checkpoints."""
        cloud, where = job.cloud, f"job '{job.name}'"
        if cloud.gpus != job.gpus_per_node and not (cloud.instance_type and not cloud.accelerators):
            wanted = f"accelerators = '{cloud.accelerators}'" if cloud.accelerators else "no cloud.accelerators"
            raise ConfigError(
                f"{where}: gpus_per_node = {job.gpus_per_node} with {wanted}: they must agree. "
                f"Use --gpus-per-node {cloud.gpus}, or --set job.cloud.accelerators=NAME:{job.gpus_per_node or 1}."
            )
        if job.is_elastic:
            raise ConfigError(
                f"{where}: min_nodes = {job.min_nodes}: SkyPilot starts all nodes or none. Leave min_nodes out."
            )
        if cloud.spot and not (job.checkpoint.every_min or job.checkpoint.every_steps):
            raise ConfigError(
                f"{where}: cloud.spot without checkpoints: a machine may go without a word. "
                "Use checkpoint.every_min = 10."
            )

    def doctor_checks(self) -> Mapping[str, Check]:
        """Check SkyPilot, what travels to the nodes, and the network."""
        from rsb_cluster.backends.skypilot.checks import CHECKS

        return CHECKS

    def shares_files(self, job: Job) -> bool:
        """Whether all that it may run on is a Slurm, whose nodes may see our folders."""
        return bool(job.cloud.infra) and all(where.startswith("slurm") for where in job.cloud.infra)

    def price(self, job: Job, *, spot: bool) -> Price | None:
        """Return the lowest price in SkyPilot's catalogs."""
        return price(job, spot=spot)

    def log_hint(self, submission: Submission) -> str:
        """Name the command that shows what the engine keeps."""
        return f"What its nodes say besides: sky jobs logs --name {submission.job_id}."

    def check_available(self, job: Job) -> None:
        """Refuse where SkyPilot is missing, or a variable that it is to hand over."""
        engine.check_installed()
        engine.secret_values(job.cloud.secrets)

    def max_array_size(self) -> int:
        """Return how many runs one call takes."""
        return sys.maxsize

    def script(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> str:
        """Return the first run's task, but for the submission's id; no network is used.

        Raises:
            ConfigError: The runs' folder is out of the nodes' reach, or their number at once cannot be limited.
        """
        from rsb_cluster.backends.skypilot.plugin import make_spec

        url = tasks[0].run_url
        if not url.startswith(("s3://", "s3a://")):
            raise ConfigError(f"job '{job.name}': machines of a cloud cannot reach {url}. Use --runs s3://bucket/runs.")
        if job.array_parallelism < len(tasks) and not job.cloud.pool:
            raise ConfigError(
                f"job '{job.name}': {len(tasks)} runs, of which {job.array_parallelism} at once (--parallel): SkyPilot "
                "starts each as soon as it finds machines. Make a pool of so many workers ('sky jobs pool apply'), and "
                f"use --set job.cloud.pool=NAME; or let all run at once, with --parallel {len(tasks)}."
            )
        return as_yaml(
            sky_task(make_spec(tasks[0], f"{engine.NAME_PREFIX}ID", wheel.build(), wheel.pins()), os.environ)
        )

    def submit(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> list[Submission]:
        """Make each run a managed job; all that is written lies in the runs' own folders."""
        from rsb_cluster.backends.skypilot.plugin import SkyExecutor, SkyJob

        jobs = SkyExecutor(folder).submit_array(list(tasks))
        return [sent.record for sent in jobs if isinstance(sent, SkyJob)]

    def query(self, submissions: Sequence[Submission]) -> list[JobStatus]:
        """Return how managed jobs are; one query for all."""
        found = engine.jobs()
        return [_status(found.get(submission.job_id)) for submission in submissions]

    def cancel(self, submissions: Sequence[Submission]) -> list[str]:
        """End managed jobs and give their machines back. Running ranks are asked to save first, and waited for.

        Returns:
            Nothing of each: SkyPilot was told of all.
        """
        attempts = [attempt for attempt in map(_ask_to_end, submissions) if attempt]
        deadline = time.monotonic() + SAVE_S
        while time.monotonic() < deadline and not all(run.attempt(number).cause for run, number in attempts):
            time.sleep(_POLL_S)
        engine.cancel([submission.job_id for submission in submissions])
        return [""] * len(submissions)

    def preempt(self, submissions: Sequence[Submission]) -> None:
        """Ask running ranks to save and have the engine start them again."""
        for submission in submissions:
            _ask_to_end(submission)

    def cancel_command(self, submissions: Sequence[Submission]) -> str:
        """Return the commands that end managed jobs without us."""
        return "; ".join(f"sky jobs cancel --name {submission.job_id}" for submission in submissions)

    def has_ended(self, run: Run, submission: Submission) -> bool:
        """Whether the run's folder says that a job has ended; SkyPilot takes seconds to answer, and is not asked."""
        last = run.attempts()[-1:]
        return bool(last) and last[0].job_id == submission.job_id and last[0].cause in _LAST

    def read_log(self, run: Run, submission: Submission, rank: int, start: int) -> bytes | None:
        """Return a rank's log from a byte on; None where there is none."""
        return rank_logs.read_log(run, submission.job_id, rank, start)


def _status(job: engine.EngineJob | None) -> JobStatus:
    if job is None:
        return JobStatus("gone")
    text = f"sky {job.number} {job.state}" + (f" ({job.recoveries} recovered)" if job.recoveries else "")
    return JobStatus(_STATES.get(job.state, "gone"), text, job.reason)


def _ask_to_end(submission: Submission) -> tuple[Run, int] | None:
    """Ask the attempt of a submission that runs, if one does, to end; return it."""
    run = _run(submission)
    last = run.attempts()[-1:]
    if not last or last[0].cause or last[0].job_id != submission.job_id:
        return None
    run.request_stop(last[0].number)
    return run, last[0].number


def _run(submission: Submission) -> Run:
    run_url = submission.folder.rpartition("/submissions/")[0]
    runs_url, _, run_id = run_url.rpartition("/")
    return Run.at(runs_url, run_id)
