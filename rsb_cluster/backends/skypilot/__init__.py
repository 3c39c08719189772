"""Machines of any cloud: each run is a managed job of SkyPilot's, which gets machines, and new ones when they go."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rsb_cluster.backends.base import Seen, State
from rsb_cluster.backends.skypilot import engine, rank_logs, wheel
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


def check_available(job: Job) -> None:
    """Refuse where SkyPilot is missing, or a variable that it is to hand over."""
    engine.check_installed()
    engine.secret_values(job.cloud.secrets)


def max_runs() -> int:
    """Return how many runs one call takes."""
    return sys.maxsize


def ends_with_terminal(submission: Submission) -> bool:
    """Say no: the engine keeps the job, whoever looks on."""
    return False


def script(job: Job, tasks: Sequence[Task], folder: Path, name: str) -> str:
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
    return as_yaml(sky_task(make_spec(tasks[0], f"{engine.NAME_PREFIX}ID", wheel.build(), wheel.pins()), os.environ))


def launch(job: Job, tasks: Sequence[Task], folder: Path, name: str) -> list[Submission]:
    """Make each run a managed job; all that is written lies in the runs' own folders."""
    from rsb_cluster.backends.skypilot.plugin import SkyExecutor, SkyJob

    jobs = SkyExecutor(folder).submit_array(list(tasks))
    return [sent.record for sent in jobs if isinstance(sent, SkyJob)]


def look(submissions: Sequence[Submission]) -> list[Seen]:
    """Return how managed jobs are; one query for all."""
    found = engine.jobs()
    return [_seen(found.get(submission.job_id)) for submission in submissions]


def _seen(job: engine.EngineJob | None) -> Seen:
    if job is None:
        return Seen("gone")
    text = f"sky {job.number} {job.state}" + (f" ({job.recoveries} recovered)" if job.recoveries else "")
    return Seen(_STATES.get(job.state, "gone"), text, job.reason)


def cancel(submissions: Sequence[Submission]) -> list[str]:
    """End managed jobs and give their machines back. Running ranks are asked to save first, and waited for.

    Returns:
        Nothing of each: SkyPilot was told of all.
    """
    attempts = [attempt for attempt in map(_ask, submissions) if attempt]
    deadline = time.monotonic() + SAVE_S
    while time.monotonic() < deadline and not all(run.attempt(number).cause for run, number in attempts):
        time.sleep(_POLL_S)
    engine.cancel([submission.job_id for submission in submissions])
    return [""] * len(submissions)


def preempt(submissions: Sequence[Submission]) -> None:
    """Ask running ranks to save and have the engine start them again."""
    for submission in submissions:
        _ask(submission)


def ending(submissions: Sequence[Submission]) -> str:
    """Return the commands that end managed jobs without us."""
    return "; ".join(f"sky jobs cancel --name {submission.job_id}" for submission in submissions)


def _ask(submission: Submission) -> tuple[Run, int] | None:
    """Ask the attempt of a submission that runs, if one does, to end; return it."""
    run = _run(submission)
    last = run.attempts()[-1:]
    if not last or last[0].cause or last[0].job_id != submission.job_id:
        return None
    run.ask_to_end(last[0].number)
    return run, last[0].number


def _run(submission: Submission) -> Run:
    run_url = submission.folder.rpartition("/submissions/")[0]
    runs_url, _, run_id = run_url.rpartition("/")
    return Run.at(runs_url, run_id)


def has_ended(run: Run, submission: Submission) -> bool:
    """Whether the run's folder says that a job has ended; SkyPilot takes seconds to answer, and is not asked."""
    last = run.attempts()[-1:]
    return bool(last) and last[0].job_id == submission.job_id and last[0].cause in _LAST


def read_log(run: Run, submission: Submission, rank: int, start: int) -> bytes | None:
    """Return a rank's log from a byte on; None where there is none."""
    return rank_logs.read_log(run, submission.job_id, rank, start)
