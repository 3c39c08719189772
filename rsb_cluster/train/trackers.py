"""Experiment trackers: each run is one experiment in TensorBoard, W&B or MLflow, over all its attempts.

Rank 0 forwards metrics rows after they are written to the run's folder. So the rows of earlier attempts in the folder
have been forwarded, and a step that is repeated after a kill is not sent again.

A tracker runs on a thread of its own and is disabled when it fails: training and saving never wait for a server.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import flatten
from rsb_cluster.errors import StorageError
from rsb_cluster.runs.metrics import MetricsRow, MetricsWriter, chunks, read_chunk
from rsb_cluster.runs.run import Run

log = logging.getLogger(__name__)

PROJECT = "rsb-cluster"
CLOSING_S = 20.0
NOT_VALUES = ("kind", "step", "time")


class Tracker(Protocol):
    """A tracking library."""

    def log(self, step: int, when: float, values: dict[str, float]) -> None:
        """Log the values of a step, with their Unix time."""

    def close(self, *, finished: bool) -> None:
        """Close the tracker at the end of an attempt."""


class TensorBoard:
    """Writes event files to ``<run>/tensorboard``; an object store gets none, as events are appended to a file."""

    def __init__(self, run: Run, recipe: Recipe) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not run.store.is_local:
            raise ValueError("TensorBoard needs a local folder, and the runs are in an object store")
        self._writer = SummaryWriter(str(Path(run.store.url) / "tensorboard"))
        self._writer.add_text("recipe", f"```\n{recipe.model_dump_json(indent=2)}\n```")

    def log(self, step: int, when: float, values: dict[str, float]) -> None:
        """Log the values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=when)
        self._writer.flush()

    def close(self, *, finished: bool) -> None:
        """Close the file."""
        self._writer.close()


class WandB:
    """One W&B run, whose id is the run's; ``WANDB_MODE=offline`` works too, with one folder for each attempt."""

    def __init__(self, run: Run, recipe: Recipe) -> None:
        import wandb

        settings = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.run_id,
            name=run.run_id,
            resume="allow",
            config=flatten(recipe),
            settings=settings,
        )

    def log(self, step: int, when: float, values: dict[str, float]) -> None:
        """Log the values of a step."""
        self._run.log(values | {"_timestamp": when}, step=step)

    def close(self, *, finished: bool) -> None:
        """Send the remaining values, with exit code 0, as an attempt that will be resumed has not failed."""
        self._run.finish(exit_code=0)


class MLflow:
    """One MLflow run, found again by its tag."""

    def __init__(self, run: Run, recipe: Recipe) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        known = self._client.search_runs([experiment], f"tags.rsb_run = '{run.run_id}'", max_results=1)
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"mlflow.runName": run.run_id, "rsb_run": run.run_id}
        self._id = self._client.create_run(experiment, tags=tags).info.run_id
        self._client.log_batch(self._id, params=[Param(key, str(value)) for key, value in flatten(recipe).items()])

    def log(self, step: int, when: float, values: dict[str, float]) -> None:
        """Log the values of a step."""
        from mlflow.entities import Metric

        metrics = [Metric(name, value, round(when * 1000), step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, *, finished: bool) -> None:
        """Set the run's status if it is finished; otherwise the next attempt continues it."""
        if finished:
            self._client.set_terminated(self._id, "FINISHED")


TRACKERS: dict[str, Callable[[Run, Recipe], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


class Trackers:
    """Forwards an attempt's rows to all trackers of a job.

    Args:
        names: Names of the trackers.
        run: The run.
        recipe: Its recipe.
        metrics: The writer of the attempt's rows.
        attempt: Number of the attempt.
    """

    def __init__(self, names: Sequence[str], run: Run, recipe: Recipe, metrics: MetricsWriter, attempt: int) -> None:
        self._run, self._recipe = run, recipe
        self._forwarded = _read_forwarded(run, attempt)
        # None ends a thread, after the rows before it.
        self._queues: list[queue.SimpleQueue[list[MetricsRow] | None]] = []
        self._threads: list[threading.Thread] = []
        self._finished = False
        for name in names:
            rows: queue.SimpleQueue[list[MetricsRow] | None] = queue.SimpleQueue()
            thread = threading.Thread(target=self._track, args=(name, rows), name=f"tracker-{name}", daemon=True)
            thread.start()
            self._queues.append(rows)
            self._threads.append(thread)
        metrics.forward = self._forward

    def close(self, *, finished: bool) -> None:
        """Close the trackers, and wait for them for at most ``CLOSING_S``."""
        self._finished = finished
        for rows in self._queues:
            rows.put(None)
        deadline = time.monotonic() + CLOSING_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _forward(self, rows: list[MetricsRow]) -> None:
        new = [row for row in rows if _key(row) not in self._forwarded]
        for queued in self._queues:
            queued.put(new)

    def _track(self, name: str, rows: queue.SimpleQueue[list[MetricsRow] | None]) -> None:
        try:
            tracker = TRACKERS[name](self._run, self._recipe)
            while (batch := rows.get()) is not None:
                for row in batch:
                    values = {f"{row['kind']}/{k}": float(v) for k, v in row.items() if _is_value(k, v)}
                    tracker.log(row["step"], row["time"], values)
            tracker.close(finished=self._finished)
        except Exception as error:  # no error of a tracking library may end the training
            log.warning("%s is disabled for this attempt: %s: %s", name, type(error).__name__, error)


def _read_forwarded(run: Run, attempt: int) -> set[tuple[str, int]]:
    """Return the kinds and steps of the rows that earlier attempts forwarded: all that they wrote."""
    found: set[tuple[str, int]] = set()
    for name, number in chunks(run):
        if number < attempt:
            with suppress(StorageError):  # damaged: what cannot be read is forwarded again
                found.update(map(_key, read_chunk(run, name)))
    return found


def _key(row: MetricsRow) -> tuple[str, int]:
    return row["kind"], row["step"]


def _is_value(key: str, value: Any) -> bool:
    return key not in NOT_VALUES and isinstance(value, int | float) and not isinstance(value, bool)
