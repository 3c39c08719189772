"""Ending runs, making them save and come back, and sending again those that ended too early."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rsb_cluster import backends
from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import read_record
from rsb_cluster.errors import RsbError, StorageError, SubmitError
from rsb_cluster.monitor.status import Status, is_over, read_status
from rsb_cluster.runs.gpu_hours import check_budget
from rsb_cluster.runs.run import READERS, Run, Submission
from rsb_cluster.submission.plan import make_arrays
from rsb_cluster.submission.submit import submit_arrays


@dataclass(frozen=True)
class _Live:
    """A run that somebody works on, with those of its submissions that are meant, the newest last."""

    run: Run
    submissions: tuple[Submission, ...]

    @property
    def job_ids(self) -> tuple[str, ...]:
        return tuple(submission.job_id for submission in self.submissions)


def cancel(runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    """End runs with all the jobs that they have: running ones save first, queued ones leave the queue.

    Returns:
        The jobs' ids by run id, of the runs that were queued or running.

    Raises:
        SubmitError: Nobody works on any of them, or a job could not be told; the others were.
    """
    live = _live(runs, ("queued", "running"), "neither queued nor running")
    with ThreadPoolExecutor(READERS) as pool:
        before = list(pool.map(lambda one: one.run.cancelled(), live))
        try:
            # Said in the runs' folders first: the ranks see no difference between scancel's SIGTERM and a preemption's.
            list(pool.map(lambda one: one.run.request_cancel(one.job_ids), live))
            answers = iter(backends.cancel([submission for one in live for submission in one.submissions]))
        except BaseException:  # Ctrl-C as well: what is left behind would end a run at its next preemption
            list(pool.map(_say_again, live, before))
            raise
    untold: dict[str, list[str]] = {}
    for one, earlier in zip(live, before, strict=True):
        why = {job_id: next(answers) for job_id in one.job_ids}
        if any(why.values()):
            _say_again(one, tuple(job_id for job_id in why if not why[job_id]) or earlier)
        for job_id in filter(why.get, why):
            untold.setdefault(why[job_id], []).append(f"{job_id} ({one.run.run_id})")
    if untold:
        told = sum(len(one.job_ids) for one in live) - sum(map(len, untold.values()))
        problems = [f"not told to end: job {', '.join(jobs)}: {why}" for why, jobs in untold.items()]
        raise SubmitError("\n".join([*problems, *([f"{told} other jobs were told to end."] if told else [])]))
    return {one.run.run_id: one.job_ids for one in live}


def _say_again(one: _Live, job_ids: tuple[str, ...]) -> None:
    """Have a run's folder say of its cancelled jobs what is so."""
    with contextlib.suppress(StorageError):  # it could not be written either, or the scheduler's error says more
        one.run.request_cancel(job_ids)


def preempt(runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    """Make running runs save and go back to the queue.

    Returns:
        The jobs' ids by run id, of the runs that were running.

    Raises:
        SubmitError: None of them is running, or the scheduler cannot be asked.
    """
    live = _live(runs, ("running",), "not running")
    backends.preempt([submission for one in live for submission in one.submissions])
    return {one.run.run_id: one.job_ids for one in live}


@dataclass(frozen=True)
class Retried:
    """What a retry did.

    Attributes:
        sent: The jobs' ids by run id.
        refused: Why a run that should have been sent was not, by run id.
    """

    sent: dict[str, str]
    refused: dict[str, str]


def retry(runs: Sequence[Run], *, failed_only: bool) -> Retried:
    """Submit again what has ended without a result, with the shape it had.

    Args:
        runs: Those that are finished, queued or running are left alone.
        failed_only: Leave alone, too, what the user stopped.

    Raises:
        SubmitError: The scheduler refused.
    """
    again: list[tuple[Run, Job]] = []
    refused: dict[str, str] = {}
    for run, status in zip(runs, read_status(runs), strict=True):
        if not is_over(status) or status.state == "finished" or (failed_only and status.state == "stopped"):
            continue
        try:
            job = _last_job(run, status)
            check_budget(run, job)
            again.append((run, job))
        except RsbError as error:
            refused[run.run_id] = str(error)
    arrays = make_arrays(again[0][0].runs_url, again, name="retry") if again else ()
    sent = submit_arrays(arrays)
    ids = [run.run_id for array in arrays for run in array.runs]
    return Retried(dict(zip(ids, (s.job_id for s in sent), strict=True)), refused)


def _last_job(run: Run, status: Status) -> Job:
    if status.state == "missing":
        raise SubmitError("its folder is gone; send the sweep again.")
    if status.state == "broken":
        raise SubmitError(status.cause)
    submissions = run.submissions()
    if not submissions or not submissions[-1].job:
        raise SubmitError("how it was sent is not noted; send it again with 'submit' or 'sweep'.")
    return read_record(Job, submissions[-1].job, f"the last job of {run.run_id}")


def outlives_terminal(runs: Sequence[Run]) -> bool:
    """Whether jobs of one of these runs have a life of their own, by the back end that each was sent to last."""
    with ThreadPoolExecutor(READERS) as pool:
        last = [submissions[-1] for submissions in pool.map(Run.submissions, runs) if submissions]
    return not all(backends.backend_of(one).ends_with_terminal(one) for one in last)


def _live(runs: Sequence[Run], wanted: tuple[str, ...], otherwise: str) -> list[_Live]:
    """Return the runs that somebody works on, with all that does; one query to the scheduler for all."""
    with ThreadPoolExecutor(READERS) as pool:
        submitted = list(pool.map(Run.submissions, runs))
    states = iter(backends.states([s for submissions in submitted for s in submissions]))
    live = []
    for run, submissions in zip(runs, submitted, strict=True):
        if found := tuple(s for s in submissions if next(states) in wanted):
            live.append(_Live(run, found))
    if not live:
        what = f"{runs[0].run_id} is" if len(runs) == 1 else f"all {len(runs)} runs are"
        raise SubmitError(f"{what} {otherwise}; 'rsb-cluster status' says how it is.")
    return live
