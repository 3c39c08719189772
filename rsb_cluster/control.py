"""Ending runs, and making them save and come back."""

from __future__ import annotations

from rsb_cluster import scheduler
from rsb_cluster.errors import SubmitError
from rsb_cluster.run import Run, Submission


def cancel(run: Run) -> str:
    """End a run: a running one saves first, a queued one leaves the queue. Returns the job's id.

    Raises:
        SubmitError: Nobody works on the run, or the scheduler cannot be asked.
    """
    submission = _live(run)
    # Said in the run's folder first: the ranks see no difference between scancel's SIGTERM and a preemption's.
    run.request_cancel(submission.job_id)
    scheduler.cancel(submission)
    return submission.job_id


def preempt(run: Run) -> str:
    """Make a running run save and go back to the queue. Returns the job's id.

    Raises:
        SubmitError: It is not running, or the scheduler cannot be asked.
    """
    submission = _live(run)
    scheduler.preempt(submission)
    return submission.job_id


def _live(run: Run) -> Submission:
    submissions = run.submissions()
    states = scheduler.states(submissions)
    live = [s for s, state in zip(submissions, states, strict=True) if state != "gone"]
    if not live:
        raise SubmitError(f"{run.run_id} is neither queued nor running; 'rsb-cluster status' says how it ended.")
    return live[-1]
