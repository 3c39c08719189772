"""The status of runs, from their folders and from the scheduler's view of their jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from rsb_cluster import backends
from rsb_cluster.errors import AccessError, RsbError
from rsb_cluster.evaluation import jobs as evaluation_jobs
from rsb_cluster.node import starts
from rsb_cluster.runs import lookup
from rsb_cluster.runs.metrics import MetricsRow
from rsb_cluster.runs.run import FINAL_CAUSES, READERS, Attempt, Run, Submission, environment_changes
from rsb_cluster.runs.sharing import why_unreadable
from rsb_cluster.runs.snapshot import Listings, Snapshot, list_together, read_last_rows

# Ordered by how much a run needs a user's attention.
STATES = (
    "broken", "missing", "failed", "crashed", "stuck", "killed", "lost peer", "preempted", "timed out", "gone",
    "superseded", "stopped", "cancelled", "never started", "unknown", "running", "starting", "queued", "unreadable",
    "finished",
)  # fmt: skip


@dataclass(frozen=True)
class Status:
    """One line of ``status``.

    Attributes:
        state: finished, running, starting or queued; without an active job the cause of the last attempt's end,
            cancelled if its job was cancelled before it could end by itself, gone if its job left the queue and nothing
            tells why, or never started; unknown if the back end cannot be asked from here, or does not answer; missing
            if the run has no folder, unreadable if another user does not share it, broken if its files cannot be read.
        step: Optimizer steps done, as far as they are logged; of an evaluation images.
        eta_s: Remaining seconds at the current throughput, or None.
        top1: Top-1 accuracy of the last evaluation, percent, or None.
        cause: What the job waits for, or where to ask; else why the last ended attempt ended, with its message; of a
            broken run, what is wrong with its files; if there was no attempt, why the engine gave up the job; empty of
            a finished run.
        job_id: The job that was submitted last.
        hosts: Hosts of the last attempt.
        updated: Unix time of the last submit, or of the last start or end of an attempt; 0 if unknown.
        changes: What changed in the environment between attempts.
        engine: The engine's own id and state of the job, where they say more than ``state``.
        problem: What keeps a job from starting, again and again, and the command that shows more.
        is_temporary: Whether a state that is unknown may be known when the engine is asked again.
    """

    run_id: str
    url: str
    state: str
    recipe: str = ""
    model: str = ""
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
    hosts: tuple[str, ...] = ()
    updated: float = 0.0
    engine: str = ""
    problem: str = ""
    changes: tuple[str, ...] = ()
    is_temporary: bool = False


@dataclass(frozen=True)
class _Folder:
    """What was read from the folder of an unfinished run or evaluation.

    Attributes:
        total_steps: Steps of the whole run, of so many images each.
        last: The last training row and the last evaluation row, by kind.
        failed_start: Why the last start did not become an attempt.
        cancelled: The jobs that the user cancelled last.
    """

    run: Run
    total_steps: int
    images_per_step: int
    submissions: list[Submission]
    attempts: list[Attempt]
    last: dict[str, MetricsRow]
    failed_start: str
    cancelled: tuple[str, ...]
    recipe: str = ""
    model: str = ""


def read_status(runs: Sequence[Run]) -> list[Status]:
    """Return the status of runs, for display; one query per scheduler.

    A broken run does not affect the others, nor does a scheduler that cannot be asked.
    """
    if not runs:
        return []
    listed = list_together(runs)
    with ThreadPoolExecutor(min(READERS, len(runs))) as pool:
        read = list(pool.map(partial(_read_folder, listed), runs))
    submissions = [s for folder in read if isinstance(folder, _Folder) for s in folder.submissions]
    jobs = iter(backends.look(submissions))
    return [f if isinstance(f, Status) else _unfinished_status(f, [next(jobs) for _ in f.submissions]) for f in read]


def find_status(runs_url: str, names: Sequence[str]) -> tuple[list[Run], list[Status]]:
    """Return the runs that match the names, and their status; without names all runs and submitted evaluations.

    Errors are those of `rsb_cluster.runs.lookup.match_names`.
    """
    # Without names one look at each folder tells whether it is a run, and how it is.
    runs = lookup.find_runs(runs_url, names, lookup.list_runs if names else lookup.list_folders)
    runs += [] if names else lookup.list_evaluations(runs_url)
    found = read_status(runs)
    kept = [i for i, status in enumerate(found) if names or status.state != "missing"]
    return [runs[i] for i in kept], [found[i] for i in kept]


def _read_folder(listed: Listings, run: Run) -> Status | _Folder:
    """Return the status of a finished, missing or broken run; of any other what its folder holds."""
    try:
        run = Snapshot.of(run, listed)
        if not run.exists():
            if lookup.has_lost_its_spec(run):
                lost = f"{run.url}/spec.json is missing; restore it, or submit the run again, which writes it"
                return Status(run.run_id, run.url, "broken", cause=lost)
            return Status(run.run_id, run.url, "missing", cause="its folder does not exist; submit its sweep again")
        if run.is_evaluation:
            return _read_evaluation(run)
        recipe, attempts, submissions = run.recipe(), run.attempts(), run.submissions()
        result = run.result()
        if result is None:
            failed_start = starts.describe(run, attempts, submissions)
            return _Folder(
                run=run,
                recipe=recipe.name,
                model=recipe.model.name,
                total_steps=recipe.total_steps,
                images_per_step=recipe.train.global_batch,
                submissions=submissions,
                attempts=attempts,
                last=read_last_rows(run, attempts),
                failed_start=failed_start,
                cancelled=run.cancelled(),
            )
        return Status(
            run_id=run.run_id,
            url=run.url,
            state="finished",
            recipe=recipe.name,
            model=recipe.model.name,
            attempt=int(result["attempts"]),
            epoch=float(result["epochs"]),
            step=int(result["steps"]),
            total_steps=recipe.total_steps,
            images_per_s=float(result["images_per_s"]),
            top1=float(result["top1"]),
            job_id=submissions[-1].job_id if submissions else "",
            hosts=attempts[-1].hosts if attempts else (),
            updated=_updated(submissions, attempts),
            changes=tuple(environment_changes(attempts)),
        )
    except AccessError as error:
        return Status(run.run_id, run.url, "unreadable", cause=why_unreadable(run, error))
    except RsbError as error:
        return Status(run.run_id, run.url, "broken", cause=str(error))
    except (ValueError, KeyError, TypeError) as error:  # metrics and results have no schema and may be edited by hand
        return Status(run.run_id, run.url, "broken", cause=f"its metrics or result.json cannot be read: {error!r}")


def _read_evaluation(run: Run) -> Status | _Folder:
    """Return the status of a submitted evaluation that has finished; of any other what its folder holds."""
    job, attempts, submissions = evaluation_jobs.read_job(run), run.attempts(), run.submissions()
    result = evaluation_jobs.read_result(run)
    if result is None:
        beat = run.heartbeat(attempts[-1].number) if attempts else None
        rows: dict[str, MetricsRow] = {"images": {"step": beat.step, "epoch": 0.0}} if beat else {}
        return _Folder(
            run=run,
            total_steps=job.images,
            images_per_step=1,
            submissions=submissions,
            attempts=attempts,
            last=rows,
            failed_start=starts.describe(run, attempts, submissions),
            cancelled=run.cancelled(),
        )
    return Status(
        run_id=run.run_id,
        url=run.url,
        state="finished",
        attempt=result.attempts,
        step=job.images,
        total_steps=job.images,
        images_per_s=result.evaluations[-1].images_per_s,
        top1=result.evaluations[0].values.get("top1"),
        model=result.evaluations[0].model,
        job_id=submissions[-1].job_id if submissions else "",
        hosts=attempts[-1].hosts if attempts else (),
        updated=_updated(submissions, attempts),
        changes=tuple(environment_changes(attempts)),
    )


def _unfinished_status(folder: _Folder, jobs: Sequence[backends.JobStatus]) -> Status:
    attempts = folder.attempts
    states = {job.state for job in jobs}
    last = attempts[-1] if attempts else None
    if "running" in states:
        # Before the first attempt and between two attempts the job is running, but no rank has reported yet.
        state = "running" if last is not None and not last.cause else "starting"
    elif "queued" in states:
        state = "queued"
    elif jobs and jobs[-1].state == "unknown" and not _is_over(last, folder.submissions[-1]):
        state = "unknown"
    else:
        state = _ended_state(folder, jobs[-1] if jobs else None)
    train, evaluation = folder.last.get("train"), folder.last.get("eval")
    problem = jobs[-1].problem if jobs and state in ("queued", "starting") else ""
    start: MetricsRow = {"step": 0, "epoch": 0.0}
    newest = max(folder.last.values(), key=lambda row: row["step"], default=start)
    throughput = train.get("images_per_s") if train else None
    remaining_images = (folder.total_steps - newest["step"]) * folder.images_per_step
    return Status(
        run_id=folder.run.run_id,
        url=folder.run.url,
        state=state,
        recipe=folder.recipe,
        model=folder.model,
        attempt=last.number if last else 0,
        epoch=newest.get("epoch", 0.0),
        step=newest["step"],
        total_steps=folder.total_steps,
        images_per_s=throughput,
        loss=train.get("loss") if train else None,
        eta_s=remaining_images / throughput if throughput and state == "running" else None,
        top1=evaluation.get("top1") if evaluation else None,
        cause=problem or _cause(folder, state, jobs[-1].reason if jobs else ""),
        job_id=folder.submissions[-1].job_id if folder.submissions else "",
        hosts=last.hosts if last else (),
        updated=_updated(folder.submissions, attempts),
        engine=jobs[-1].engine if jobs else "",
        problem=problem,
        changes=tuple(environment_changes(attempts)),
        is_temporary=state == "unknown" and jobs[-1].is_temporary,
    )


def _ended_state(folder: _Folder, job: backends.JobStatus | None) -> str:
    """Return the state of a run without an active job, whose last job is given."""
    last = folder.attempts[-1] if folder.attempts else None
    if job is not None:
        sent = folder.submissions[-1]
        if not _is_over(last, sent) and (job.is_cancelled or sent.job_id in folder.cancelled):
            return "cancelled"
        # A job that is killed has no time to say so; any other end either is final, or is followed by another start.
        was_killed = last is not None and last.job_id == sent.job_id and not last.cause
        if job.is_cancelled is None and not (was_killed or _is_over(last, sent) or folder.failed_start):
            return "gone"
    if last is None:
        return "never started"
    # An attempt that finished the last step but wrote no result was killed before it could.
    return last.cause if last.cause not in ("", "finished") else "killed"


def _updated(submissions: Sequence[Submission], attempts: Sequence[Attempt]) -> float:
    """Return when a run was last submitted, or an attempt of it last started or ended, unix time."""
    last = attempts[-1:]
    return max([0.0, *(s.time for s in submissions[-1:]), *(a.started for a in last), *(a.ended for a in last)])


def _cause(folder: _Folder, state: str, said: str) -> str:
    """Return what a job waits for, or where to ask; else why the last ended attempt ended."""
    if state in ("cancelled", "gone"):
        job = f"job {folder.submissions[-1].job_id}"
        before = f"; before: {exit_reason}" if (exit_reason := _exit_reason(folder.attempts)) else ""
        return (f"cancelled {job}" if state == "cancelled" else f"{job} is gone; cancelled?") + before
    if state in ("queued", "starting", "running", "unknown"):
        ended = folder.attempts[:-1] if state == "running" else folder.attempts
        return (folder.failed_start if state != "running" else "") or said or _exit_reason(ended)
    reason = folder.failed_start or _exit_reason(folder.attempts)
    return f"killed ({said})" if reason == "killed" and said else reason or said


def _is_over(last: Attempt | None, submission: Submission) -> bool:
    """Whether the last attempt shows that a job has ended."""
    return last is not None and last.job_id == submission.job_id and last.cause in FINAL_CAUSES


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
    return status.state not in ("running", "queued", "starting") and not status.is_temporary


def attention_order(state: str) -> int:
    """Return a sort key of states: those that need a user's attention come first."""
    return STATES.index(state) if state in STATES else -1


def count_runs(number: int) -> str:
    """Return ``"1 run"`` or ``"2 runs"``."""
    return f"{number} run{'' if number == 1 else 's'}"


def summary(found: Sequence[Status]) -> str:
    """Return ``"12 runs: 1 failed, 3 running, 8 finished"``."""
    counted = Counter(status.state for status in found)
    states = sorted(counted, key=attention_order)
    return f"{count_runs(len(found))}: " + ", ".join(f"{counted[state]} {state}" for state in states)
