"""How runs are: what the run folder says, and what the scheduler says, in one line each."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rsb_cluster import scheduler
from rsb_cluster.metrics import Row, read_rows
from rsb_cluster.run import Attempt, Run, Submission


@dataclass(frozen=True)
class Status:
    """One line of ``status``.

    Attributes:
        state: finished, running, queued, or for a run that nobody works on: why its last attempt ended.
        step: Optimizer steps done, as far as logged.
        eta_s: Seconds to go at the present speed, or None.
        top1: Last evaluation, percent, or None.
        cause: Why the last ended attempt ended, with its message.
    """

    run_id: str
    url: str
    state: str
    attempt: int
    epoch: float
    step: int
    total_steps: int
    images_per_s: float | None
    loss: float | None
    eta_s: float | None
    top1: float | None
    cause: str
    job_id: str


@dataclass(frozen=True)
class _Folder:
    """What was read of a run's folder."""

    run: Run
    submissions: list[Submission]
    attempts: list[Attempt]
    rows: list[Row]
    total_steps: int
    global_batch: int
    top1: float | None


def read_status(runs: Sequence[Run]) -> list[Status]:
    """Return the state of runs; the scheduler is asked once for all."""
    if not runs:
        return []
    with ThreadPoolExecutor(min(16, len(runs))) as pool:
        folders = list(pool.map(_read, runs))
    open_ones = [s for f in folders if f.top1 is None for s in f.submissions]
    states = dict(zip([(s.job_id, s.folder) for s in open_ones], scheduler.states(open_ones), strict=True))
    return [_status(f, [states.get((s.job_id, s.folder), "gone") for s in f.submissions]) for f in folders]


def _read(run: Run) -> _Folder:
    recipe, result, attempts = run.recipe(), run.result(), run.attempts()
    return _Folder(
        run,
        run.submissions(),
        attempts,
        read_rows(run, attempts),
        recipe.total_steps,
        recipe.train.global_batch,
        result["top1"] if result else None,
    )


def _status(folder: _Folder, states: list[str]) -> Status:
    attempts, rows = folder.attempts, folder.rows
    last = attempts[-1] if attempts else None
    train = next((row for row in reversed(rows) if row["kind"] == "train"), None)
    score = next((row for row in reversed(rows) if row["kind"] == "eval"), None)
    step = max((row["step"] for row in rows), default=0)
    if folder.top1 is not None:
        state, step = "finished", folder.total_steps
    elif "running" in states:
        # The scheduler runs it, but between two attempts, or before the first, no rank has reported yet.
        state = "running" if last is not None and not last.cause else "starting"
    elif "queued" in states:
        state = "queued"
    elif last is None:
        state = "never started"
    else:
        state = last.cause or "killed"
    speed = train["images_per_s"] if train else None
    ended = next((a for a in reversed(attempts) if a.cause and a.cause != "finished"), None)
    eta = (folder.total_steps - step) * folder.global_batch / speed if speed and state == "running" else None
    return Status(
        run_id=folder.run.run_id,
        url=folder.run.url,
        state=state,
        attempt=last.number if last else 0,
        epoch=rows[-1]["epoch"] if rows else 0.0,
        step=step,
        total_steps=folder.total_steps,
        images_per_s=speed,
        loss=train["loss"] if train else None,
        eta_s=eta,
        top1=folder.top1 if folder.top1 is not None else (score["top1"] if score else None),
        cause=" ".join(filter(None, [ended.cause, f"({ended.message})" if ended.message else ""])) if ended else "",
        job_id=folder.submissions[-1].job_id if folder.submissions else "",
    )


def duration(seconds: float | None) -> str:
    """Return seconds as ``1:02:03``, or a dash."""
    return "–" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def is_over(status: Status) -> bool:
    """Whether nothing will happen to a run by itself."""
    return status.state not in ("running", "queued", "starting")
