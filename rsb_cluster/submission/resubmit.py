"""A run that is submitted again while it is queued or running: what its job keeps, and replacing a queued job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rsb_cluster import backends
from rsb_cluster.backends import State
from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import flatten, read_record
from rsb_cluster.errors import ConfigError, NewerVersionError, SubmitError
from rsb_cluster.runs.run import Submission
from rsb_cluster.submission.planned_run import PlannedRun

# Fields that change nothing of a job that is queued; the folder of a run is shared at once.
_NO_MATTER = ("name", "description", "share", "array_parallelism")
MAX_FIELDS = 6  # shown


def active_run(
    planned: PlannedRun, jobs: Sequence[tuple[Submission, State]], *, resubmit: bool
) -> tuple[PlannedRun, list[str]]:
    """Return a run with its queued and running jobs, and a note on what differs from what is asked for.

    Args:
        planned: The run.
        jobs: Its queued or running jobs, the newest last.
        resubmit: Whether queued jobs are to be replaced.
    """
    submissions = tuple(submission for submission, _ in jobs)
    is_running = any(state == "running" for _, state in jobs)
    job_ids = ", ".join(submission.job_id for submission in submissions)
    is_as = f"{planned.run.run_id} is {'running' if is_running else 'queued'} as job {job_ids}"
    if resubmit and not is_running:
        return replace(planned, state="queued anew", replaces=submissions), []
    found = replace(planned, state="already submitted")
    if resubmit:
        return found, [f"{is_as}; --resubmit replaces only queued jobs. {_advice(planned, is_running)}"]
    kept = differences(submissions[-1], planned)
    if not kept:
        return found, []
    shown = [f"{name} = {_show(there)} (here {_show(here)})" for name, (there, here) in list(kept.items())[:MAX_FIELDS]]
    more = f" and {len(kept) - MAX_FIELDS} more" if len(kept) > MAX_FIELDS else ""
    taken = " Taken at once: share = 'group'." if planned.point.job.share == "group" else ""
    return found, [f"{is_as}, which keeps {', '.join(shown)}{more}.{taken} {_advice(planned, is_running)}"]


def _show(value: Any) -> str:
    return "unset" if value is None else repr(value)


def _fields(job: Job) -> dict[str, Any]:
    """Return the fields of a job by path, each option of the scheduler by itself."""
    found: dict[str, Any] = {}
    for name, value in flatten(job).items():
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _advice(planned: PlannedRun, is_running: bool) -> str:
    if is_running:
        return f"'rsb-cluster cancel {planned.run.run_id}' saves and stops it; then submit it again."
    return "--resubmit cancels the queued job and submits it anew."


def differences(submission: Submission, planned: PlannedRun) -> dict[str, tuple[Any, Any]]:
    """Return the fields of a job that differ from those now asked for: ``{"time_min": (60, 120)}``."""
    try:
        there = _fields(read_record(Job, submission.job, "the queued job")) if submission.job else {}
    except (ConfigError, NewerVersionError):
        there = {}
    here = _fields(planned.point.job)
    found = {
        name: (there.get(name), here.get(name))
        for name in {**here, **there}
        if there and there.get(name) != here.get(name) and name.split(".")[0] not in _NO_MATTER
    }
    if submission.data and submission.data != planned.data.url:
        found["data"] = (submission.data, planned.data.url)
    return found


def check_replaced(runs: Sequence[PlannedRun], notes: Sequence[str]) -> None:
    """Refuse a resubmit that would do nothing, or whose new jobs the engine would refuse after the old ones are gone.

    Raises:
        ConfigError: All runs are running.
        SubmitError: The engine would refuse a job.
    """
    running = [note for note in notes if "--resubmit replaces only" in note]
    if running and not any(planned.should_submit for planned in runs):
        raise ConfigError("\n".join(running))
    for job in {id(p.point.job): p.point.job for p in runs if p.replaces}.values():
        if refusal := backends.backend_of(job).why_refused(job):
            raise SubmitError(f"{refusal} The queued jobs were left alone.")


def cancel_replaced(runs: Sequence[PlannedRun]) -> None:
    """Cancel the queued jobs that new ones replace.

    Raises:
        SubmitError: One of them could not be cancelled, or has started meanwhile. Others may have been cancelled.
    """
    replaced = [(planned, submission) for planned in runs for submission in planned.replaces]
    problems = backends.cancel_queued([submission for _, submission in replaced])
    for planned in {id(planned): planned for planned, _ in replaced}.values():
        gone = [s.job_id for (p, s), why in zip(replaced, problems, strict=True) if p is planned and not why]
        planned.run.request_cancel(gone or planned.run.cancelled())
    failed = [f"job {s.job_id} ({p.run.run_id}): {why}" for (p, s), why in zip(replaced, problems, strict=True) if why]
    if failed:
        gone_jobs = len(replaced) - len(failed)
        raise SubmitError(
            "\n".join(failed)
            + "\nNothing was submitted."
            + (f" {gone_jobs} queued jobs are cancelled: submit again for these." if gone_jobs else "")
        )
