"""The history of a run from its folder, downsampled for charts."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.errors import RsbError
from rsb_cluster.runs.gpu_hours import Span, spans
from rsb_cluster.runs.metrics import MetricsRow, read_rows
from rsb_cluster.runs.run import Run, Submission, environment_changes

DIGITS = 5


@dataclass(frozen=True)
class History:
    """The attempts of a run and its curves.

    Attributes:
        attempts: Oldest first, as plain values; ``queued`` is the time since which it waited to start, unix time.
        loss: Epochs and training loss.
        top1: Epochs and top-1 on val/, percent.
        images_per_s: Median over the logged intervals; None if nothing was logged.
        waiting: Share of the time in which ranks waited for data, median.
        measured: Step time, GPUs and the slowest rank, as text by name; nothing that was not measured.
        logs: Paths of logs in the run's folder.
        changes: What changed in the environment between attempts.
        data: Where the data were at the last submit; empty if that is not recorded.
        damage: The error if something could not be read; else empty.
    """

    attempts: tuple[dict[str, Any], ...] = ()
    loss: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    top1: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    images_per_s: float | None = None
    waiting: float | None = None
    measured: dict[str, str] = field(default_factory=dict)
    logs: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    data: str = ""
    damage: str = ""


def read_history(run: Run, recipe: Recipe, state: str, *, points: int) -> History:
    """Read a run's attempts and metrics. An error is reported in the history, not raised.

    Args:
        run: The run.
        recipe: Its recipe.
        state: Its state; used as the cause of the last attempt if that has none.
        points: Maximum number of points of a curve.
    """
    try:
        found = spans(run)
        rows = read_rows(run, [span.attempt for span in found])
        submissions, logs = run.submissions(), run.store.files("logs")
    except RsbError as error:
        return History(damage=str(error))
    train = [row for row in rows if row.get("kind") == "train"]
    scores = [row for row in rows if row.get("kind") == "eval"]
    timed = [row for row in train if row.get("images_per_s") and math.isfinite(row["images_per_s"])]
    speeds = [row["images_per_s"] for row in timed]
    waits = [
        row["data_wait_s"] * row["images_per_s"] / recipe.train.global_batch for row in timed if "data_wait_s" in row
    ]
    return History(
        attempts=tuple(_attempts(found, submissions, recipe.steps_per_epoch, state)),
        loss=downsample(train, "loss", points),
        top1=downsample(scores, "top1", points),
        images_per_s=short(statistics.median(speeds)) if speeds else None,
        waiting=short(min(1.0, statistics.median(waits))) if waits else None,
        measured=_measured(train),
        logs=tuple(logs),
        changes=tuple(environment_changes([span.attempt for span in found])),
        data=next((submission.data for submission in reversed(submissions) if submission.data), ""),
    )


def downsample(rows: Sequence[MetricsRow], key: str, points: int) -> tuple[list[float], list[float]]:
    """Return epochs and values of a curve, as means over equal parts of it; the last point is kept."""
    finite = [row for row in rows if {key, "epoch"} <= row.keys() and math.isfinite(row[key])]
    if len(finite) > points:
        head, last = finite[:-1], finite[-1]
        edges = [round(i * len(head) / (points - 1)) for i in range(points)]
        parts = [head[a:b] for a, b in itertools.pairwise(edges)] + [[last]]
    else:
        parts = [[row] for row in finite]

    def means(name: str) -> list[float]:
        return [short(statistics.fmean(row[name] for row in part)) for part in parts]

    return means("epoch"), means(key)


def _measured(rows: Sequence[MetricsRow]) -> dict[str, str]:
    """Return what the rows say of the time of steps, of GPUs and of the slowest rank, as text by name."""

    def of(key: str) -> list[Any]:
        return [row[key] for row in rows if key in row]

    found: dict[str, str] = {}
    if p50 := of("step_s_p50"):
        medians = statistics.median(p50), statistics.median(of("step_s_p99"))
        found["step time"] = "p50 {:.4g} s, p99 {:.4g} s (medians over the logged intervals)".format(*medians)
    if memory := of("gpu_memory_bytes"):
        found["GPU memory"] = f"{max(memory) / 1e9:.1f} GB at most, of the fullest"
    if utilization := of("gpu_utilization"):
        found["GPU utilisation"] = f"{statistics.fmean(utilization):.0%}"
    if power := of("gpu_power_w"):
        found["GPU power"] = f"{statistics.fmean(power):.0f} W each"
    if energy := of("gpu_energy_j"):
        found["GPU energy"] = f"{sum(energy) / 3.6e6:,.3g} kWh"
    if ranks := of("slowest_rank"):
        (rank, host), times = Counter(zip(ranks, of("slowest_host"), strict=True)).most_common(1)[0]
        by = [row["slowest_by"] for row in rows if (row.get("slowest_rank"), row.get("slowest_host")) == (rank, host)]
        found["slowest rank"] = (
            f"{rank} on {host}, in {times / len(ranks):.0%} of the intervals; behind the median by "
            f"{statistics.median(by):.0%} until its last forward pass ends"
        )
    return found


def short(value: float) -> float:
    """Round to the digits that a chart can show, to keep a file of a thousand curves small."""
    return float(f"{value:.{DIGITS}g}")


def _attempts(
    found: Sequence[Span], submissions: Sequence[Submission], steps_per_epoch: int, state: str
) -> list[dict[str, Any]]:
    values = []
    ready = 0.0  # the time since which the run could have started
    for span in found:
        attempt = span.attempt
        submitted = [submission.time for submission in submissions if ready <= submission.time <= attempt.started]
        values.append(
            {
                "number": attempt.number,
                "queued": round(submitted[-1] if submitted else ready or attempt.started, 1),
                "started": round(attempt.started, 1),
                "ended": round(span.ended, 1),
                "cause": attempt.cause or (state if span is found[-1] else "killed"),
                "message": attempt.message,
                "job": attempt.job_id,
                "hosts": list(attempt.hosts),
                "ranks": attempt.world_size,
                "gpus": attempt.gpus,
                "steps": [attempt.start_step, span.end_step],
                "epoch": short(attempt.start_step / steps_per_epoch),
            }
        )
        ready = span.ended
    return values
