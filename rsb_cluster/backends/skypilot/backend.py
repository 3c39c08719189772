"""The back end ``cloud``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rsb_cluster.backends.base import Backend, Check, JobStatus, Price, State, refuse_fields
from rsb_cluster.backends.skypilot import engine, rank_logs, wheel
from rsb_cluster.backends.skypilot.launches import LAUNCHING, FailedLaunches, failed_launches
from rsb_cluster.backends.skypilot.prices import price
from rsb_cluster.backends.skypilot.sky_task import as_yaml, sky_task
from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError, SubmitError
from rsb_cluster.node.task import Task
from rsb_cluster.runs.run import FINAL_CAUSES, Run, Submission
from rsb_cluster.storage.location import is_s3

# Time limit for a cancelled run to save, s: its ranks see the request at a heartbeat, and stop after a step.
SAVE_S = 120.0
_POLL_S = 2.0

# Jobs that do not start whose log one query reads: each takes SkyPilot about a second.
LOGS_READ = 4

_STATES: dict[str, State] = {
    "PENDING": "queued", "SUBMITTED": "queued", "STARTING": "queued", "RECOVERING": "queued",
    "RUNNING": "running", "WINDING_DOWN": "running", "CANCELLING": "running",
}  # fmt: skip


class SkyPilot(Backend):
    """Runs as managed jobs of SkyPilot."""

    name = "cloud"
    script_title = "SkyPilot task"
    needs_object_store = True
    has_prices = True
    price_hint = (
        "unknown (no SkyPilot catalog on this machine has such a node): use --set job.cloud.price=USD (per node and "
        "hour), or run 'sky gpus list' once with a network"
    )

    def check_job(self, job: Job) -> None:
        """Refuse a job that SkyPilot cannot run, and spot machines without checkpoints."""
        cloud, where = job.cloud, f"job '{job.name}'"
        refuse_fields(job, "gpu_type", "python")
        if cloud.gpus != job.gpus_per_node and not (cloud.instance_type and not cloud.accelerators):
            accelerators = f"accelerators = '{cloud.accelerators}'" if cloud.accelerators else "no cloud.accelerators"
            raise ConfigError(
                f"{where}: gpus_per_node = {job.gpus_per_node} with {accelerators}: they must agree. "
                f"Use --gpus-per-node {cloud.gpus}, or --set job.cloud.accelerators=NAME:{job.gpus_per_node or 1}."
            )
        if job.is_elastic:
            raise ConfigError(
                f"{where}: min_nodes = {job.min_nodes}: SkyPilot starts all nodes or none. Leave min_nodes out."
            )
        if cloud.spot and not (job.checkpoint.every_min or job.checkpoint.every_steps):
            raise ConfigError(
                f"{where}: cloud.spot without checkpoints: a machine may be taken back without notice. "
                "Use checkpoint.every_min = 10."
            )

    def doctor_checks(self) -> Mapping[str, Check]:
        """Check SkyPilot, what the nodes will get, and the network."""
        from rsb_cluster.backends.skypilot.doctor_checks import CHECKS

        return CHECKS

    def shares_files(self, job: Job) -> bool:
        """Whether the job may only run on Slurm clusters, whose nodes may share a file system with this machine."""
        return bool(job.cloud.infra) and all(where.startswith("slurm") for where in job.cloud.infra)

    def price(self, job: Job, *, spot: bool) -> Price | None:
        """Return the lowest price in SkyPilot's catalogs."""
        return price(job, spot=spot)

    def describe_wait(self, submission: Submission) -> str:
        """Return SkyPilot's state of a job, and why its launches fail."""
        try:
            (status,) = self.query([submission])
        except SubmitError as error:
            return str(error)
        return ": ".join(filter(None, (status.engine, status.problem or status.reason)))

    def log_hint(self, submission: Submission) -> str:
        """Name the command that shows SkyPilot's own log."""
        return f"For the nodes' other output: sky jobs logs --name {submission.job_id}."

    def check_available(self, job: Job) -> None:
        """Refuse if SkyPilot is not installed, or a secret is not set in this shell."""
        engine.check_installed()
        engine.secret_values(job.cloud.secrets)

    def max_array_size(self) -> int:
        """Return no limit."""
        return sys.maxsize

    def script(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> str:
        """Return the first run's SkyPilot task, with a placeholder for the submission's id; no network is used.

        Raises:
            ConfigError: The nodes cannot reach the runs' folder, or the number of concurrent runs cannot be limited.
        """
        from rsb_cluster.backends.skypilot.plugin import make_spec

        url = tasks[0].run_url
        if not is_s3(url):
            raise ConfigError(f"job '{job.name}': cloud machines cannot reach {url}. Use --runs s3://bucket/runs.")
        if job.array_parallelism < len(tasks) and not job.cloud.pool:
            raise ConfigError(
                f"job '{job.name}': {len(tasks)} runs, at most {job.array_parallelism} concurrent (--parallel): "
                "SkyPilot starts each run as soon as it finds machines. Create a pool of that many workers ('sky jobs "
                f"pool apply') and use --set job.cloud.pool=NAME; or allow all at once with --parallel {len(tasks)}."
            )
        return as_yaml(
            sky_task(make_spec(tasks[0], f"{engine.NAME_PREFIX}ID", wheel.build(), wheel.pins()), os.environ)
        )

    def submit(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> list[Submission]:
        """Submit each run as a managed job; files are written only into the runs' own folders."""
        from rsb_cluster.backends.skypilot.plugin import SkyExecutor, SkyJob

        jobs = SkyExecutor(folder).submit_array(list(tasks))
        return [job.record for job in jobs if isinstance(job, SkyJob)]

    def query(self, submissions: Sequence[Submission], *, fresh: bool = True) -> list[JobStatus]:
        """Return the status of managed jobs; one query for all, and one for each of the first that do not start."""
        jobs = engine.jobs()
        named = [(submission.job_id, jobs.get(submission.job_id)) for submission in submissions]
        launching = [job for _, job in named if job is not None and job.state in LAUNCHING]
        problems = {job.number: _failed_launches(job) for job in launching[:LOGS_READ]}
        return [_status(name, job, problems) for name, job in named]

    def cancel(self, submissions: Sequence[Submission]) -> list[str]:
        """Cancel managed jobs and release their machines, after running attempts have saved or ``SAVE_S`` have passed.

        Returns:
            An empty string for each submission: either all are cancelled, or SubmitError is raised.
        """
        attempts = [attempt for attempt in map(_request_stop, submissions) if attempt]
        deadline = time.monotonic() + SAVE_S
        while time.monotonic() < deadline and not all(run.attempt(number).cause for run, number in attempts):
            time.sleep(_POLL_S)
        engine.cancel([submission.job_id for submission in submissions])
        return [""] * len(submissions)

    def preempt(self, submissions: Sequence[Submission]) -> None:
        """Request running attempts to save and exit; SkyPilot starts them again."""
        for submission in submissions:
            _request_stop(submission)

    def cancel_command(self, submissions: Sequence[Submission]) -> str:
        """Return the shell commands that cancel managed jobs."""
        return "; ".join(f"sky jobs cancel --name {submission.job_id}" for submission in submissions)

    def has_ended(self, run: Run, submission: Submission) -> bool:
        """Whether a job has ended according to the run's folder; a query to SkyPilot would take seconds."""
        last = run.attempts()[-1:]
        return bool(last) and last[0].job_id == submission.job_id and last[0].cause in FINAL_CAUSES

    def read_log(self, run: Run, submission: Submission, rank: int, start: int) -> bytes | None:
        """Return a rank's log from a byte offset; None if there is none."""
        return rank_logs.read_log(run, submission.job_id, rank, start)


def _failed_launches(job: engine.EngineJob) -> FailedLaunches:
    try:
        return failed_launches(engine.controller_log(job.number))
    except SubmitError:  # its state is known all the same
        return FailedLaunches()


def _status(name: str, job: engine.EngineJob | None, problems: Mapping[int, FailedLaunches]) -> JobStatus:
    if job is None:
        return JobStatus("gone")
    failed = problems.get(job.number, FailedLaunches())
    restarts = f"{job.recoveries} recovered" if job.recoveries else ""
    launches = f"{failed.count} failed launch{'es' if failed.count > 1 else ''}" if failed.count else ""
    notes = ", ".join(filter(None, (restarts, launches)))
    problem = str(failed) or (job.details if job.state in LAUNCHING else restarts)
    if problem:
        problem += f". SkyPilot's log: sky jobs logs --controller --name {name}"
    text = f"sky {job.number} {job.state}{f' ({notes})' if notes else ''}"
    is_cancelled = job.state == "CANCELLED"
    return JobStatus(_STATES.get(job.state, "gone"), text, job.reason, problem, is_cancelled=is_cancelled)


def _request_stop(submission: Submission) -> tuple[Run, int] | None:
    """Request the running attempt of a submission, if there is one, to stop; return its run and number."""
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
