"""Ending runs, making them save and come back, and sending again those that ended too early."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rsb_cluster import scheduler
from rsb_cluster.cost import check_budget
from rsb_cluster.errors import RsbError, SubmitError
from rsb_cluster.job import Job
from rsb_cluster.plan import make_arrays
from rsb_cluster.recipe import validate
from rsb_cluster.run import READERS, Run, Submission
from rsb_cluster.status import Status, is_over, read_status
from rsb_cluster.submit import hand_over


def cancel(runs: Sequence[Run]) -> dict[str, str]:
    """End runs: running ones save first, queued ones leave the queue.

    Returns:
        The jobs' ids by run id, of the runs that were queued or running.

    Raises:
        SubmitError: Nobody works on any of them, or the scheduler cannot be asked.
    """
    live = _live(runs, ("queued", "running"), "neither queued nor running")
    # Said in the runs' folders first: the ranks see no difference between scancel's SIGTERM and a preemption's.
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(lambda pair: pair[0].request_cancel(pair[1].job_id), live))
    scheduler.cancel([submission for _, submission in live])
    return {run.run_id: submission.job_id for run, submission in live}


def preempt(runs: Sequence[Run]) -> dict[str, str]:
    """Make running runs save and go back to the queue.

    Returns:
        The jobs' ids by run id, of the runs that were running.

    Raises:
        SubmitError: None of them is running, or the scheduler cannot be asked.
    """
    live = _live(runs, ("running",), "not running")
    scheduler.preempt([submission for _, submission in live])
    return {run.run_id: submission.job_id for run, submission in live}


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
    sent = hand_over(arrays)
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
    return validate(Job, submissions[-1].job, f"the last job of {run.run_id}")


def _live(runs: Sequence[Run], wanted: tuple[str, ...], otherwise: str) -> list[tuple[Run, Submission]]:
    """Return the runs that somebody works on, with what was submitted last; one query to the scheduler for all."""
    with ThreadPoolExecutor(READERS) as pool:
        submitted = list(pool.map(Run.submissions, runs))
    states = iter(scheduler.states([s for submissions in submitted for s in submissions]))
    live = []
    for run, submissions in zip(runs, submitted, strict=True):
        found = [s for s in submissions if next(states) in wanted]
        if found:
            live.append((run, found[-1]))
    if not live:
        what = f"{runs[0].run_id} is" if len(runs) == 1 else f"all {len(runs)} runs are"
        raise SubmitError(f"{what} {otherwise}; 'rsb-cluster status' says how it is.")
    return live
