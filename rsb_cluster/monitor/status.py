"""How runs are: what the run folder says, and what the scheduler says, in one line each."""

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
from rsb_cluster.runs.run import READERS, Attempt, Run, Submission

# In the order of a person's interest.
STATES = (
    "broken", "missing", "failed", "crashed", "killed", "lost peer", "preempted", "timed out", "stopped",
    "never started", "running", "starting", "queued", "finished",
)  # fmt: skip


@dataclass(frozen=True)
class Status:
    """One line of ``status``.

    Attributes:
        state: finished, running, starting, queued; for a run that nobody works on why its last attempt ended, or never
            started; missing where there is no folder, broken where its files cannot be read.
        step: Optimizer steps done, as far as logged.
        eta_s: Seconds to go at the present speed, or None.
        top1: Last evaluation, percent, or None.
        cause: Why the last ended attempt ended, with its message; of a broken run what is wrong with its files; without
            an attempt why the engine gave the job up.
        engine: The engine's own id and word for the job, where it has more to say than ``state``.
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


@dataclass(frozen=True)
class _Folder:
    """What was read of a run's folder.

    Attributes:
        last: The last training row and the last evaluation, by kind.
        failed_start: Why the last start became no attempt.
    """

    run: Run
    recipe: Recipe
    submissions: list[Submission]
    attempts: list[Attempt]
    last: dict[str, MetricsRow]
    failed_start: str


def read_status(runs: Sequence[Run]) -> list[Status]:
    """Return the state of runs; the scheduler is asked once for all. What is wrong with one is no other's business."""
    if not runs:
        return []
    with ThreadPoolExecutor(min(READERS, len(runs))) as pool:
        read = list(pool.map(_read, runs))
    unfinished = [s for folder in read if isinstance(folder, _Folder) for s in folder.submissions]
    seen = iter(backends.query(unfinished))
    return [f if isinstance(f, Status) else _unfinished(f, [next(seen) for _ in f.submissions]) for f in read]


def _read(run: Run) -> Status | _Folder:
    try:
        if not run.exists():
            return Status(run.run_id, run.url, "missing", cause="it has no folder; send its sweep again")
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
            cause=_last_end(attempts),
            job_id=submissions[-1].job_id if submissions else "",
        )
    except RsbError as error:
        return Status(run.run_id, run.url, "broken", cause=str(error))
    except (ValueError, KeyError, TypeError) as error:  # rows and results are plain values, and may be edited by hand
        return Status(run.run_id, run.url, "broken", cause=f"its metrics or result.json: {error!r}")


def _unfinished(folder: _Folder, seen: Sequence[backends.JobStatus]) -> Status:
    recipe, attempts = folder.recipe, folder.attempts
    states = {one.state for one in seen}
    last = attempts[-1] if attempts else None
    if "running" in states:
        # The scheduler runs it, but between two attempts, or before the first, no rank has reported yet.
        state = "running" if last is not None and not last.cause else "starting"
    elif "queued" in states:
        state = "queued"
    elif last is None:
        state = "never started"
    else:
        # An attempt that ended the run without a result was killed just then.
        state = last.cause if last.cause not in ("", "finished") else "killed"
    train, score = folder.last.get("train"), folder.last.get("eval")
    start: MetricsRow = {"step": 0, "epoch": 0.0}
    newest = max(folder.last.values(), key=lambda row: row["step"], default=start)
    speed = train["images_per_s"] if train else None
    to_go = (recipe.total_steps - newest["step"]) * recipe.train.global_batch
    return Status(
        run_id=folder.run.run_id,
        url=folder.run.url,
        state=state,
        attempt=last.number if last else 0,
        epoch=newest["epoch"],
        step=newest["step"],
        total_steps=recipe.total_steps,
        images_per_s=speed,
        loss=train["loss"] if train else None,
        eta_s=to_go / speed if speed and state == "running" else None,
        top1=score["top1"] if score else None,
        cause=(folder.failed_start if state != "running" else "")
        or _last_end(attempts if state != "running" else attempts[:-1])
        or (seen[-1].reason if seen else ""),
        job_id=folder.submissions[-1].job_id if folder.submissions else "",
        engine=seen[-1].engine if seen else "",
    )


def _last_end(attempts: Sequence[Attempt]) -> str:
    """Return why the last of some ended attempts ended; an attempt without a cause was killed, and could not say so."""
    for attempt in reversed(attempts):
        if attempt.cause != "finished":
            return f"{attempt.cause or 'killed'}{f' ({attempt.message})' if attempt.message else ''}"
    return ""


def duration(seconds: float | None) -> str:
    """Return seconds as ``1:02:03``, with as many hours as there are, or a dash."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def is_over(status: Status) -> bool:
    """Whether nothing will happen to a run by itself."""
    return status.state not in ("running", "queued", "starting")


def interest(state: str) -> int:
    """Return a number to sort states by: first what a person should look into."""
    return STATES.index(state) if state in STATES else -1


def summary(found: Sequence[Status]) -> str:
    """Return ``"12 runs: 1 failed, 3 running, 8 finished"``."""
    counted = Counter(status.state for status in found)
    states = sorted(counted, key=interest)
    of = f"{len(found)} run{'' if len(found) == 1 else 's'}"
    return f"{of}: " + ", ".join(f"{counted[state]} {state}" for state in states)
