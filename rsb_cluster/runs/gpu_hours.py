"""The cost of a run: GPU-hours, attempts, and repeated steps; and its GPU-hour budget."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError, RsbError, StorageError
from rsb_cluster.runs.metrics import MetricsRow, chunks, read_chunk
from rsb_cluster.runs.run import Attempt, Run


class BudgetExceededError(ConfigError):
    """A run has exceeded its GPU-hour budget."""


@dataclass(frozen=True)
class Span:
    """An attempt, and its last known time and step.

    An attempt that was killed, or still runs, has not recorded its end. Its last heartbeat stands for it, else its last
    metrics row, else its start.

    Attributes:
        ended: Unix time.
        end_step: Optimizer steps done by then.
    """

    attempt: Attempt
    ended: float
    end_step: int

    @property
    def seconds(self) -> float:
        """Duration of the attempt, as far as known."""
        return max(0.0, self.ended - self.attempt.started)

    @property
    def device_hours(self) -> float:
        """Hours times GPUs; without GPUs, times processes, so that a budget holds there as well."""
        return self.seconds * count_devices(self.attempt) / 3600


@dataclass(frozen=True)
class Cost:
    """The cost of all attempts of a run.

    Attributes:
        gpu_hours: Hours times allocated GPUs.
        rank_hours: Hours times ranks, the measure for runs without GPUs.
        wall_s: Total duration of the attempts, seconds.
        attempts: Number of attempts.
        preemptions: Attempts that were preempted.
        steps_repeated: Steps computed again, as they came after the checkpoint from which the next attempt resumed.
    """

    gpu_hours: float
    rank_hours: float
    wall_s: float
    attempts: int
    preemptions: int
    steps_repeated: int


def spans(run: Run, attempts: Sequence[Attempt] | None = None) -> list[Span]:
    """Return the spans of a run's attempts, oldest first; more files are read only if an attempt recorded no end."""
    attempts = run.attempts() if attempts is None else attempts
    return [Span(a, a.ended, a.end_step) if a.ended else Span(a, *_last_activity(run, a)) for a in attempts]


def cost(found: Sequence[Span]) -> Cost:
    """Return the total cost of a run's attempts."""
    computed = sum(max(0, span.end_step - span.attempt.start_step) for span in found)
    return Cost(
        gpu_hours=sum(span.seconds * span.attempt.gpus for span in found) / 3600,
        rank_hours=sum(span.seconds * span.attempt.world_size for span in found) / 3600,
        wall_s=sum(span.seconds for span in found),
        attempts=len(found),
        preemptions=sum(span.attempt.cause == "preempted" for span in found),
        steps_repeated=max(0, computed - max((span.end_step for span in found), default=0)),
    )


def count_devices(attempt: Attempt) -> int:
    """Return the devices that ``job.max_gpu_hours`` counts: the attempt's GPUs, or its processes if it has none."""
    return attempt.gpus or attempt.world_size


def check_budget(run: Run, job: Job, attempts: Sequence[Attempt] | None = None) -> float:
    """Return the rest of a run's GPU-hour budget; infinite if the job sets none.

    Raises:
        BudgetExceededError: Nothing is left.
    """
    if not job.max_gpu_hours:
        return math.inf
    used = sum(span.device_hours for span in spans(run, attempts))
    if used >= job.max_gpu_hours:
        raise BudgetExceededError(budget_message(run, used, job))
    return job.max_gpu_hours - used


def budget_message(run: Run, used: float, job: Job) -> str:
    """Return the message for the user of a run that has exceeded its GPU-hour budget."""
    return (
        f"{run.run_id} exceeded its GPU-hour budget (used {used:.2f} of {job.max_gpu_hours:g}). "
        "Its state is saved; submit it again with a larger --max-gpu-hours to resume."
    )


def _last_activity(run: Run, attempt: Attempt) -> tuple[float, int]:
    """Return the time and the step of an attempt's last heartbeat, else of its last metrics row, else of its start."""
    last = None
    with contextlib.suppress(RsbError):  # damaged
        if heartbeat := run.heartbeat(attempt.number):
            last = heartbeat.time, heartbeat.step
    time, step = last or _last_row(run, attempt.number) or (attempt.started, attempt.start_step)
    return max(attempt.started, time), max(attempt.start_step, step)


def _last_row(run: Run, number: int) -> tuple[float, int] | None:
    """Return the time and the step of an attempt's last metrics row; of a damaged file that of the last whole one."""
    last: MetricsRow = {}
    with contextlib.suppress(StorageError):
        for name in [name for name, attempt in chunks(run) if attempt == number][-1:]:
            for row in read_chunk(run, name):
                last = row
    return (float(last["time"]), int(last["step"])) if "time" in last else None
