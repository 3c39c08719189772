"""The status of runs, from their folders and from the scheduler's view of their jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rsb_cluster import backends
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.errors import RsbError
from rsb_cluster.node import starts
from rsb_cluster.runs.metrics import MetricsRow, last_rows
from rsb_cluster.runs.run import READERS, Attempt, Run, Submission, environment_changes

# Ordered by how much a run needs a user's attention.
STATES = (
    "broken", "missing", "failed", "crashed", "killed", "lost peer", "preempted", "timed out", "stopped",
    "never started", "running", "starting", "queued", "finished",
)  # fmt: skip


@dataclass(frozen=True)
class Status:
    """One line of ``status``.

    Attributes:
        state: finished, running, starting or queued; without an active job the cause of the last attempt's end, or
            never started; missing if the run has no folder, broken if its files cannot be read.
        step: Optimizer steps done, as far as they are logged.
        eta_s: Remaining seconds at the current throughput, or None.
        top1: Top-1 accuracy of the last evaluation, percent, or None.
        cause: Why the last ended attempt ended, with its message; of a broken run, what is wrong with its files; if
            there was no attempt, why the engine gave up the job.
        changes: What changed in the environment between attempts.
        engine: The engine's own id and state of the job, where they say more than ``state``.
    """

    run_id: str
    url: str
    state: str
    attempt: int = 0
    epoch: float = 0.0
    step: int = 0
    total_steps: int = 0
    images_per_s: float | None = None
    loss: float | None = None
    eta_s: float | None = None
    top1: float | None = None
    cause: str = ""
    job_id: str = ""
    engine: str = ""
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Folder:
    """What was read from the folder of an unfinished run.

    Attributes:
        last: The last training row and the last evaluation row, by kind.
        failed_start: Why the last start did not become an attempt.
    """

    run: Run
    recipe: Recipe
    submissions: list[Submission]
    attempts: list[Attempt]
    last: dict[str, MetricsRow]
    failed_start: str


def read_status(runs: Sequence[Run]) -> list[Status]:
    """Return the status of runs; one query per scheduler. A broken run does not affect the others."""
    if not runs:
        return []
    with ThreadPoolExecutor(min(READERS, len(runs))) as pool:
        read = list(pool.map(_read_folder, runs))
    submissions = [s for folder in read if isinstance(folder, _Folder) for s in folder.submissions]
    jobs = iter(backends.query(submissions))
    return [f if isinstance(f, Status) else _unfinished_status(f, [next(jobs) for _ in f.submissions]) for f in read]


def _read_folder(run: Run) -> Status | _Folder:
    """Return the status of a finished, missing or broken run; of any other what its folder holds."""
    try:
        if not run.exists():
            return Status(run.run_id, run.url, "missing", cause="its folder does not exist; submit its sweep again")
        recipe, attempts, submissions = run.recipe(), run.attempts(), run.submissions()
        result = run.result()
        if result is None:
            failed_start = starts.describe(run, attempts, submissions)
            return _Folder(run, recipe, submissions, attempts, last_rows(run, attempts), failed_start)
        return Status(
            run_id=run.run_id,
            url=run.url,
            state="finished",
            attempt=int(result["attempts"]),
            epoch=float(result["epochs"]),
            step=int(result["steps"]),
            total_steps=recipe.total_steps,
            images_per_s=float(result["images_per_s"]),
            top1=float(result["top1"]),
            cause=_exit_reason(attempts),
            job_id=submissions[-1].job_id if submissions else "",
            changes=tuple(environment_changes(attempts)),
        )
    except RsbError as error:
        return Status(run.run_id, run.url, "broken", cause=str(error))
    except (ValueError, KeyError, TypeError) as error:  # metrics and results have no schema and may be edited by hand
        return Status(run.run_id, run.url, "broken", cause=f"its metrics or result.json cannot be read: {error!r}")


def _unfinished_status(folder: _Folder, jobs: Sequence[backends.JobStatus]) -> Status:
    recipe, attempts = folder.recipe, folder.attempts
    states = {job.state for job in jobs}
    last = attempts[-1] if attempts else None
    if "running" in states:
        # Before the first attempt and between two attempts the job is running, but no rank has reported yet.
        state = "running" if last is not None and not last.cause else "starting"
    elif "queued" in states:
        state = "queued"
    elif last is None:
        state = "never started"
    else:
        # An attempt that finished the last step but wrote no result was killed before it could.
        state = last.cause if last.cause not in ("", "finished") else "killed"
    train, evaluation = folder.last.get("train"), folder.last.get("eval")
    start: MetricsRow = {"step": 0, "epoch": 0.0}
    newest = max(folder.last.values(), key=lambda row: row["step"], default=start)
    throughput = train["images_per_s"] if train else None
    remaining_images = (recipe.total_steps - newest["step"]) * recipe.train.global_batch
    return Status(
        run_id=folder.run.run_id,
        url=folder.run.url,
        state=state,
        attempt=last.number if last else 0,
        epoch=newest["epoch"],
        step=newest["step"],
        total_steps=recipe.total_steps,
        images_per_s=throughput,
        loss=train["loss"] if train else None,
        eta_s=remaining_images / throughput if throughput and state == "running" else None,
        top1=evaluation["top1"] if evaluation else None,
        cause=(folder.failed_start if state != "running" else "")
        or _exit_reason(attempts if state != "running" else attempts[:-1])
        or (jobs[-1].reason if jobs else ""),
        job_id=folder.submissions[-1].job_id if folder.submissions else "",
        engine=jobs[-1].engine if jobs else "",
        changes=tuple(environment_changes(attempts)),
    )


def _exit_reason(attempts: Sequence[Attempt]) -> str:
    """Return why the last of some ended attempts ended; one without a recorded cause was killed."""
    for attempt in reversed(attempts):
        if attempt.cause != "finished":
            return f"{attempt.cause or 'killed'}{f' ({attempt.message})' if attempt.message else ''}"
    return ""


def format_duration(seconds: float | None) -> str:
    """Return seconds as ``1:02:03`` (hours may exceed 24), or a dash for None."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def has_ended(status: Status) -> bool:
    """Whether a run has no active job: finished, or stopped until it is submitted again."""
    return status.state not in ("running", "queued", "starting")


def attention_order(state: str) -> int:
    """Return a sort key of states: those that need a user's attention come first."""
    return STATES.index(state) if state in STATES else -1


def summary(found: Sequence[Status]) -> str:
    """Return ``"12 runs: 1 failed, 3 running, 8 finished"``."""
    counted = Counter(status.state for status in found)
    states = sorted(counted, key=attention_order)
    runs = f"{len(found)} run{'' if len(found) == 1 else 's'}"
    return f"{runs}: " + ", ".join(f"{counted[state]} {state}" for state in states)
