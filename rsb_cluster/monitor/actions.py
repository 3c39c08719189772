"""The actions on submitted runs: cancel, preempt and retry."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rsb_cluster import backends
from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import read_record
from rsb_cluster.errors import AccessError, RsbError, StorageError, SubmitError, plural
from rsb_cluster.monitor.status import Status, has_ended, read_status
from rsb_cluster.runs.gpu_hours import check_budget
from rsb_cluster.runs.run import READERS, Run, Submission
from rsb_cluster.runs.sharing import other_owner, why_unreadable
from rsb_cluster.submission.job_arrays import ToSubmit, make_arrays
from rsb_cluster.submission.submit import submit_arrays


@dataclass(frozen=True)
class _ActiveRun:
    """A run that is queued or running, with its active submissions, the newest last."""

    run: Run
    submissions: tuple[Submission, ...]

    @property
    def job_ids(self) -> tuple[str, ...]:
        return tuple(submission.job_id for submission in self.submissions)


def cancel(runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    """Cancel all jobs of runs: running ones save a checkpoint and exit, queued ones leave the queue.

    Returns:
        The job ids by run id, of the runs that were queued or running.

    Raises:
        SubmitError: None of the runs is queued or running, or some jobs could not be cancelled; all others were.
    """
    active, problems = _active_runs(runs, ("queued", "running"), "neither queued nor running")
    asked: list[tuple[_ActiveRun, tuple[str, ...]]] = []
    with ThreadPoolExecutor(READERS) as pool:
        earlier_requests = list(pool.map(_earlier_request, active))
        try:
            # Recorded in the runs' folders first: ranks cannot tell scancel's SIGTERM from a preemption's.
            for a, earlier, problem in zip(active, earlier_requests, pool.map(_request_cancel, active), strict=True):
                if problem:
                    problems.append(f"could not cancel {a.run.run_id}: {problem}")
                else:
                    asked.append((a, earlier))
            answers = iter(backends.cancel([submission for a, _ in asked for submission in a.submissions]))
        except BaseException:  # Ctrl-C as well: a request left behind would stop the run at its next preemption
            list(pool.map(_reset_cancel_request, active, earlier_requests))
            raise
    failures: dict[str, list[str]] = {}
    for a, earlier in asked:
        reasons = {job_id: next(answers) for job_id in a.job_ids}
        if any(reasons.values()):
            cancelled_now = tuple(job_id for job_id in reasons if not reasons[job_id])
            _reset_cancel_request(a, cancelled_now or earlier)
        for job_id in filter(reasons.get, reasons):
            failures.setdefault(reasons[job_id], []).append(f"{job_id} ({a.run.run_id})")
    problems += [f"could not cancel job {', '.join(jobs)}: {reason}" for reason, jobs in failures.items()]
    if problems:
        cancelled = sum(len(a.job_ids) for a, _ in asked) - sum(map(len, failures.values()))
        others = [f"{plural(cancelled, 'other job was', 'other jobs were')} cancelled."] if cancelled else []
        raise SubmitError("\n".join([*problems, *others]))
    return {a.run.run_id: a.job_ids for a, _ in asked}


def _earlier_request(active: _ActiveRun) -> tuple[str, ...]:
    """Return the jobs that were cancelled before; none where their record is damaged."""
    try:
        return active.run.cancelled()
    except RsbError:
        return ()


def _request_cancel(active: _ActiveRun) -> str:
    """Record that a run is to be cancelled; return why that was not possible, or an empty string."""
    try:
        active.run.request_cancel(active.job_ids)
    except StorageError as error:
        return f"it belongs to {owner}, who must do it." if (owner := other_owner(active.run)) else str(error)
    return ""


def _reset_cancel_request(active: _ActiveRun, job_ids: tuple[str, ...]) -> None:
    """Write the cancel request of a run again, with only the jobs that were cancelled."""
    with contextlib.suppress(StorageError):  # the error that is being handled says more
        active.run.request_cancel(job_ids)


def preempt(runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    """Preempt running runs: they save a checkpoint and return to the queue.

    Returns:
        The job ids by run id, of the runs that were running.

    Raises:
        SubmitError: None of the runs is running, the scheduler does not answer, or some runs could not be read; all
            others were preempted.
    """
    active, problems = _active_runs(runs, ("running",), "not running")
    backends.preempt([submission for a in active for submission in a.submissions])
    if problems:
        others = [f"{plural(len(active), 'other run was', 'other runs were')} preempted."]
        raise SubmitError("\n".join([*problems, *others]))
    return {a.run.run_id: a.job_ids for a in active}


@dataclass(frozen=True)
class RetryResult:
    """What a retry did.

    Attributes:
        submitted: The job ids by run id.
        refused: Why an unfinished run was not submitted, by run id.
        perhaps_cancelled: Why a run was left alone that did not fail for sure, by run id.
    """

    submitted: dict[str, str]
    refused: dict[str, str]
    perhaps_cancelled: dict[str, str]


def retry(runs: Sequence[Run], *, failed_only: bool) -> RetryResult:
    """Resubmit runs that ended without a result, with the jobs they had last.

    Args:
        runs: Finished, queued and running ones are left alone.
        failed_only: Also leave alone the runs that the user stopped or cancelled, and those of which that is unknown.

    Raises:
        SubmitError: The scheduler refused a job.
    """
    to_submit: list[ToSubmit] = []
    refused: dict[str, str] = {}
    perhaps_cancelled: dict[str, str] = {}
    for run, status in zip(runs, read_status(runs), strict=True):
        if status.is_temporary:
            refused[run.run_id] = f"whether it is queued is unknown: {status.cause}"
            continue
        if not has_ended(status) or status.state == "finished":
            continue
        if failed_only and status.state in ("stopped", "cancelled", "gone"):
            if status.state == "gone":
                perhaps_cancelled[run.run_id] = status.cause
            continue
        try:
            job = _last_job(run, status)
            check_budget(run, job)
            to_submit.append(ToSubmit(run, job, run.data_url()))
        except RsbError as error:
            refused[run.run_id] = str(error)
    arrays = make_arrays(to_submit[0].run.runs_url, to_submit, name="retry") if to_submit else ()
    submissions = submit_arrays(arrays)
    run_ids = [run.run_id for array in arrays for run in array.runs]
    submitted = dict(zip(run_ids, (s.job_id for s in submissions), strict=True))
    return RetryResult(submitted, refused, perhaps_cancelled)


def _last_job(run: Run, status: Status) -> Job:
    if status.state == "missing":
        raise SubmitError("its folder does not exist; submit the sweep again.")
    if status.state in ("broken", "unreadable"):
        raise SubmitError(status.cause)
    if not run.store.is_writable():
        raise SubmitError(f"it belongs to {other_owner(run) or 'another user'}, who must do it.")
    submissions = run.submissions()
    if not submissions or not submissions[-1].job:
        raise SubmitError("its last job is not recorded; resubmit it with 'submit' or 'sweep'.")
    return read_record(Job, submissions[-1].job, f"the last job of {run.run_id}")


def active_submissions(runs: Sequence[Run]) -> list[Submission]:
    """Return the submissions of runs whose jobs are queued or running."""
    with ThreadPoolExecutor(READERS) as pool:
        submitted = [s for submissions in pool.map(Run.submissions, runs) for s in submissions]
    states = backends.states(submitted)
    return [s for s, state in zip(submitted, states, strict=True) if state in ("queued", "running")]


def outlives_terminal(runs: Sequence[Run]) -> bool:
    """Whether the last job of any of these runs continues when the terminal that waits for it is closed."""
    with ThreadPoolExecutor(READERS) as pool:
        last = [submissions[-1] for submissions in pool.map(Run.submissions, runs) if submissions]
    return not all(backends.backend_of(submission).ends_with_terminal(submission) for submission in last)


def _active_runs(runs: Sequence[Run], wanted: tuple[str, ...], otherwise: str) -> tuple[list[_ActiveRun], list[str]]:
    """Return the runs with submissions in the wanted states, and why others could not be read; one query per scheduler.

    Raises:
        SubmitError: There are none.
        RsbError: The only run cannot be read.
    """
    with ThreadPoolExecutor(READERS) as pool:
        read = list(pool.map(_submissions_or_error, runs))
    if len(read) == 1 and isinstance(read[0], RsbError):
        raise read[0]
    problems = [
        f"{run.run_id} was left alone: {why_unreadable(run, found) if isinstance(found, AccessError) else found}"
        for run, found in zip(runs, read, strict=True)
        if isinstance(found, RsbError)
    ]
    submitted = [[] if isinstance(found, RsbError) else found for found in read]
    states = iter(backends.states([s for submissions in submitted for s in submissions]))
    active = []
    for run, submissions in zip(runs, submitted, strict=True):
        found = [(submission, next(states)) for submission in submissions]
        chosen = tuple(submission for submission, state in found if state in wanted)
        if not chosen and found and found[-1][1] == "unknown":
            chosen = (found[-1][0],)  # its back end says where to ask
        if chosen:
            active.append(_ActiveRun(run, chosen))
    if not active:
        what = f"{runs[0].run_id} is" if len(runs) == 1 else f"all {len(runs) - len(problems)} runs are"
        nothing = f"{what} {otherwise}; 'rsb-cluster status' shows the state."
        raise SubmitError("\n".join([*problems, nothing]))
    return active, problems


def _submissions_or_error(run: Run) -> list[Submission] | RsbError:
    try:
        return run.submissions()
    except RsbError as error:
        return error
