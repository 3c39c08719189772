"""What has become of planned runs: which exist, are queued or finished, belong to another user, or are over budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from rsb_cluster import backends
from rsb_cluster.errors import AccessError, ConfigError
from rsb_cluster.runs import sharing
from rsb_cluster.runs.gpu_hours import BudgetExceededError, check_budget
from rsb_cluster.runs.run import READERS, Run, Submission, check_same_recipe
from rsb_cluster.runs.snapshot import Snapshot, list_together
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.planned_run import PlannedRun
from rsb_cluster.submission.resubmit import active_run


def with_states(
    runs: Sequence[PlannedRun], runs_url: str, *, resubmit: bool = False
) -> tuple[list[PlannedRun], list[str]]:
    """Return the runs with their states, and notes; folders are read in parallel, each scheduler is queried once.

    Args:
        runs: The runs.
        runs_url: Their folder.
        resubmit: Whether queued jobs are to be replaced.
    """
    folder = Store(runs_url)
    # Not from a folder's listing, which on NFS may lack for a minute what another machine has made.
    existing = set() if folder.is_local else set(folder.names())
    candidates = [run for p in runs if p.data.is_found for run in (p.run, *p.older)]
    listed = list_together([run for run in candidates if run.run_id in existing])

    def find(run: Run) -> Run | None:
        """Return a run's snapshot if it exists."""
        if not (folder.is_local or run.run_id in existing):
            return None
        known = Snapshot.of(run, listed)
        return known if known.exists() else None

    def read(planned: PlannedRun) -> tuple[PlannedRun, list[Submission], list[str]]:
        if not planned.data.is_found:
            return planned, [], []
        try:
            if (known := find(planned.run)) is not None:
                return *read_existing(planned, known), []
            return read_older(planned)
        except AccessError:
            if not sharing.other_owner(planned.run):
                raise
            return replace(planned, state="not yours"), [], []

    def read_existing(planned: PlannedRun, run: Run) -> tuple[PlannedRun, list[Submission]]:
        check_same_recipe(run, planned.recipe)
        if run.result() is not None:
            return replace(planned, state="finished"), []
        return replace(planned, state="unfinished"), run.submissions()

    def read_older(planned: PlannedRun) -> tuple[PlannedRun, list[Submission], list[str]]:
        """Return an earlier version's unfinished run with the same virtual ranks, else the planned one; and notes."""
        remarks: list[str] = []
        for run in planned.older:
            if (known := find(run)) is None:
                continue
            theirs, has_result = known.spec().virtual_ranks, known.result() is not None
            if theirs == planned.virtual_ranks and not has_result:
                remark = f"{run.run_id} was begun by an earlier version with its own order of samples, which it keeps: "
                return (
                    replace(planned, run=run, state="unfinished"),
                    known.submissions(),
                    [remark + "it is resumed in place of a new run."],
                )
            remarks.append(_not_taken(run, theirs, planned.virtual_ranks, has_result=has_result))
        return planned, [], remarks

    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(read, runs))
    states = iter(backends.states([s for _, submissions, _ in found for s in submissions]))
    result, notes = [], []
    for planned, submissions, remarks in found:
        notes += remarks
        # The machine of a job of unknown state may no longer exist; if the job lives, its lease keeps the run.
        jobs = zip(submissions, itertools.islice(states, len(submissions)), strict=True)
        if active := [(submission, state) for submission, state in jobs if state in ("queued", "running")]:
            planned, more = active_run(planned, active, resubmit=resubmit and planned.run.store.is_writable())
            notes += more
        elif planned.state == "unfinished" and not planned.run.store.is_writable():
            planned = replace(planned, state="not yours")
        if planned.state == "not yours":
            notes.append(_not_yours(planned))
        result.append(planned)
    return result, notes


def refuse_others(runs: Sequence[PlannedRun]) -> None:
    """Refuse a submit of which only other users' runs are left.

    Raises:
        ConfigError: No run is left to submit, as its owner must do it.
    """
    others = [_not_yours(planned) for planned in runs if planned.state == "not yours"]
    if others and not any(planned.should_submit for planned in runs):
        raise ConfigError("\n".join([*others, "Nothing is left to submit. Use other --runs for runs of your own."]))


def mark_over_budget(runs: Sequence[PlannedRun]) -> tuple[list[PlannedRun], list[str]]:
    """Mark the runs that have used up their GPU-hour budget, as their jobs would stop at once; and return notes.

    Raises:
        BudgetExceededError: No other run is left to submit.
    """

    def check(planned: PlannedRun) -> str:
        try:
            if planned.state in ("unfinished", "queued anew"):
                check_budget(planned.run, planned.point.job)
        except BudgetExceededError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(READERS) as pool:
        problems = list(pool.map(check, runs))
    marked = [replace(p, state="over budget") if problem else p for p, problem in zip(runs, problems, strict=True)]
    notes = list(filter(None, problems))
    if notes and not any(p.should_submit for p in marked):
        raise BudgetExceededError("\n".join(notes))
    return marked, notes


def _not_taken(run: Run, theirs: int, wanted: int, *, has_result: bool) -> str:
    """Return why a run of an earlier version is not this one, and how to go on with it."""
    if has_result:
        return (
            f"{run.run_id} was finished by an earlier version, with {theirs} virtual ranks and another order of "
            "samples: it is not taken for this run, which is trained from the start."
        )
    return (
        f"{run.run_id} was begun by an earlier version with {theirs} virtual ranks; this is another run, with {wanted}."
        f" To resume that one, submit with --virtual-ranks {theirs}."
    )


def _not_yours(planned: PlannedRun) -> str:
    owner = sharing.other_owner(planned.run) or "another user"
    return f"{planned.run.run_id} belongs to {owner}, who must submit it: {planned.run.url} is not writable for you."
