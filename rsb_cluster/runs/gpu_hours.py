"""What a run cost: time on machines, starts, and steps that were computed twice."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError, RsbError, StorageError
from rsb_cluster.runs.run import Attempt, Run


class BudgetExceededError(ConfigError):
    """A run has used up the GPU-hours that it may have."""


@dataclass(frozen=True)
class Span:
    """An attempt, and the end that is known of it.

    An attempt that was killed could not write its end. What it last said stands for it: its sign of life, else its last
    metrics row, else its start. The same holds for one that still runs.

    Attributes:
        ended: Unix time.
        end_step: Steps done by then.
    """

    attempt: Attempt
    ended: float
    end_step: int

    @property
    def seconds(self) -> float:
        """How long it held its machines, as far as known."""
        return max(0.0, self.ended - self.attempt.started)

    @property
    def device_hours(self) -> float:
        """Hours times GPUs held; on CPUs times processes, so that a limit holds there as well."""
        return self.seconds * devices(self.attempt) / 3600


@dataclass(frozen=True)
class Cost:
    """What all attempts of a run took.

    Attributes:
        gpu_hours: Hours times GPUs held.
        rank_hours: Hours times processes; on GPUs the same, on CPUs the only measure there is.
        wall_s: Seconds in which an attempt was on.
        attempts: Starts.
        preemptions: Attempts that ended because the scheduler took the machine back.
        steps_repeated: Steps computed again: they came after the checkpoint from which the next attempt went on.
    """

    gpu_hours: float
    rank_hours: float
    wall_s: float
    attempts: int
    preemptions: int
    steps_repeated: int


def spans(run: Run, attempts: Sequence[Attempt] | None = None) -> list[Span]:
    """Return a run's attempts with their ends, oldest first; files are read only for those that did not write it."""
    attempts = run.attempts() if attempts is None else attempts
    return [Span(a, a.ended, a.end_step) if a.ended else Span(a, *_last_sign(run, a)) for a in attempts]


def cost(found: Sequence[Span]) -> Cost:
    """Add up the attempts of a run."""
    computed = sum(max(0, span.end_step - span.attempt.start_step) for span in found)
    return Cost(
        gpu_hours=sum(span.seconds * span.attempt.gpus for span in found) / 3600,
        rank_hours=sum(span.seconds * span.attempt.world_size for span in found) / 3600,
        wall_s=sum(span.seconds for span in found),
        attempts=len(found),
        preemptions=sum(span.attempt.cause == "preempted" for span in found),
        steps_repeated=max(0, computed - max((span.end_step for span in found), default=0)),
    )


def devices(attempt: Attempt) -> int:
    """Return what ``job.max_gpu_hours`` counts in an attempt: its GPUs, or without any its processes."""
    return attempt.gpus or attempt.world_size


def check_budget(run: Run, job: Job, attempts: Sequence[Attempt] | None = None) -> float:
    """Return the GPU-hours that a run has left; infinite where the job sets no limit.

    Raises:
        SpentError: None are left.
    """
    if not job.max_gpu_hours:
        return math.inf
    used = sum(span.device_hours for span in spans(run, attempts))
    if used >= job.max_gpu_hours:
        raise BudgetExceededError(budget_message(run, used, job))
    return job.max_gpu_hours - used


def budget_message(run: Run, used: float, job: Job) -> str:
    """Return what a user is told whose run has no GPU-hours left."""
    return (
        f"{run.run_id} has used {used:.2f} of the {job.max_gpu_hours:g} GPU-hours that it may. "
        "Its state is saved; submit it again with a larger --max-gpu-hours to go on."
    )


def _last_sign(run: Run, attempt: Attempt) -> tuple[float, int]:
    signs = [(attempt.started, attempt.start_step)]
    with contextlib.suppress(RsbError):  # damaged
        if heartbeat := run.heartbeat(attempt.number):
            return max(attempt.started, heartbeat.time), max(attempt.start_step, heartbeat.step)
    signs += _last_row(run, attempt.number)
    return max(time for time, _ in signs), max(step for _, step in signs)


def _last_row(run: Run, number: int) -> list[tuple[float, int]]:
    chunks = [name for name in run.store.files("metrics") if name.startswith(f"metrics/{number:04d}-")]
    try:
        row = json.loads(run.store.read_bytes(chunks[-1]).splitlines()[-1])
        return [(float(row["time"]), int(row["step"]))]
    except (IndexError, KeyError, TypeError, ValueError, StorageError):
        return []  # it wrote none, or none that can be read
