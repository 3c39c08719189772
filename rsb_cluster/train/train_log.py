"""What a training says of itself: its rows of metrics, and the lines of its log."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Mapping
from typing import Any

from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.host_memory import host_memory
from rsb_cluster.runs.run import Spec
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.exchange import StepReport
from rsb_cluster.train.input.streams import TrainStream
from rsb_cluster.train.run_data import RunData
from rsb_cluster.train.saver import Saver
from rsb_cluster.train.state import Progress
from rsb_cluster.train.telemetry import Telemetry
from rsb_cluster.train.validation.validate import Score

log = logging.getLogger(__name__)


class TrainLog:
    """Writes a row of metrics for each interval of steps and each evaluation, on rank 0.

    What the rows of an interval are made of is in the progress, so that a resume leaves no trace in them.

    Args:
        recipe: The recipe.
        data: The run's data.
        telemetry: Of this rank's steps.
        saver: On rank 0 only; writes the rows.
        first_step: Steps done before this attempt.
    """

    def __init__(
        self, recipe: Recipe, data: RunData, telemetry: Telemetry, saver: Saver | None, first_step: int
    ) -> None:
        self._recipe, self._data, self._telemetry, self._saver = recipe, data, telemetry, saver
        self._first_step, self._attempt_bytes = first_step, 0.0
        self.begin_interval()

    def start(self, stream: TrainStream, spec: Spec, job: Job, group: ProcessGroup, step: int, parts: int) -> None:
        """Log what is to be trained, from a step on; so many processes share a virtual rank."""
        recipe = self._recipe
        order = stream.epoch_order(step // recipe.steps_per_epoch)
        log.info(
            "step %d of %d (%d epochs of %d); %d virtual ranks × %d images on %d processes%s; %s on %s; "
            "%d samples that do not fill a global batch are dropped per epoch",
            step, recipe.total_steps, recipe.schedule.epochs, recipe.steps_per_epoch,
            spec.virtual_ranks, order.micro_batch, group.world_size,
            "" if parts == 1 else f", {parts} of which share each", recipe.model.name, group.device, order.dropped,
        )  # fmt: skip
        needed = host_memory(recipe, job, self._data.train_index, spec.virtual_ranks, spec.draws)
        log.info("host memory: at least %s", needed)

    def begin_interval(self) -> None:
        """Begin to measure the speed anew, as after an evaluation."""
        self._interval_started, self._interval_steps = time.monotonic(), 0

    def end_step(self) -> None:
        """Count a step of this process."""
        self._interval_steps += 1

    def add(self, progress: Progress, report: StepReport) -> None:
        """Add what all ranks report of a step to the progress of the interval."""
        progress.interval_loss += report.loss
        progress.interval_wait_s += report.data_wait_s
        progress.interval_steps += 1
        progress.interval_bytes += report.bytes_read
        self._attempt_bytes += report.bytes_read

    def end_interval(self, progress: Progress, rate: float) -> None:
        """Write the row of an interval, whose last step had a learning rate; a collective."""
        p = progress
        steps = max(1, p.interval_steps)
        seconds = max(1e-9, time.monotonic() - self._interval_started)
        images_per_s = self._interval_steps * self._recipe.train.global_batch / seconds
        needed = self._data.needed_bytes(p.step - self._first_step)
        row = {
            "kind": "train",
            "step": p.step,
            "epoch": p.step / self._recipe.steps_per_epoch,
            "loss": p.interval_loss / steps,
            "lr": rate,
            "images_per_s": images_per_s,
            "data_wait_s": p.interval_wait_s / steps,
            "bytes_read": round(p.interval_bytes / steps),
            "read_amplification": self._attempt_bytes / max(1.0, needed),
            "bad_samples": p.bad_samples,
            **self._telemetry.take(),
            "time": time.time(),
        }
        if self._saver is not None:
            self._saver.metrics.add(row)
            self._saver.flush_metrics(every_s=5.0)
            left = (self._recipe.total_steps - p.step) * self._recipe.train.global_batch / max(images_per_s, 1e-9)
            log.info(
                "step %d/%d epoch %.2f loss %.5f lr %.2e %.0f images/s, %.0f %% waiting for data, ETA %s",
                p.step, self._recipe.total_steps, row["epoch"], row["loss"], row["lr"], images_per_s,
                100 * p.interval_wait_s / seconds, datetime.timedelta(seconds=round(left)),
            )  # fmt: skip
        p.interval_loss, p.interval_wait_s, p.interval_bytes, p.interval_steps = 0.0, 0.0, 0.0, 0
        self.begin_interval()

    def evaluated(self, step: int, scores: Mapping[str, Score]) -> None:
        """Write the row of an evaluation.

        Args:
            step: The step at whose end it was.
            scores: As `Trainer.scores`.
        """
        epoch = step // self._recipe.steps_per_epoch
        row: dict[str, Any] = {"kind": "eval", "step": step, "epoch": epoch, "time": time.time()}
        for prefix, score in scores.items():
            row |= {f"{prefix}{k}": v for k, v in vars(score).items()}
        if self._saver is not None:
            self._saver.metrics.add(row)
            self._saver.flush_metrics()
        score = scores[""]
        log.info(
            "epoch %d: top-1 %.2f %%, top-5 %.2f %%, loss %.4f on %d images",
            epoch, score.top1, score.top5, score.loss, score.samples,
        )  # fmt: skip
