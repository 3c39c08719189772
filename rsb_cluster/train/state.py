"""The state of a training as files, and saving it while training goes on."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from rsb_cluster import checkpoint
from rsb_cluster.claim import Claim
from rsb_cluster.errors import CheckpointError, StorageError
from rsb_cluster.job import Checkpoint as CheckpointRules
from rsb_cluster.metrics import MetricsWriter
from rsb_cluster.storage import Store

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a training stands; the part of its state that is plain numbers.

    Attributes:
        step: Optimizer steps done.
        evaluated_step: Step of the last complete evaluation.
        bad_samples: Undecodable images of the present epoch so far.
        train_s: Seconds spent in the steps done, over all attempts.
        interval_loss: Sum of the losses since the last metric row, so that a resume leaves no trace in the rows.
        interval_wait_s: Seconds waited for data since the last metric row.
        interval_bytes: Bytes read from the store since the last metric row.
        interval_steps: Steps since the last metric row.
        best_top1: Best top-1 of an evaluation so far, percent; negative before the first.
        best_step: Its step.
    """

    step: int = 0
    evaluated_step: int = 0
    bad_samples: int = 0
    train_s: float = 0.0
    interval_loss: float = 0.0
    interval_wait_s: float = 0.0
    interval_bytes: float = 0.0
    interval_steps: int = 0
    best_top1: float = -1.0
    best_step: int = 0


def to_files(progress: Progress, tensors: dict[str, Any]) -> Iterator[tuple[str, memoryview]]:
    """Serialise plain numbers and state dicts, one file each.

    A state dict is taken out of ``tensors`` when its turn comes, so that only
    the one that is being written is in memory twice.
    """
    yield "progress.json", memoryview(json.dumps(asdict(progress)).encode())
    for name in list(tensors):
        buffer = io.BytesIO()
        torch.save(tensors.pop(name), buffer)
        yield f"{name}.pt", buffer.getbuffer()


def from_files(read: checkpoint.Checkpoint, device: torch.device) -> tuple[Progress, dict[str, Any]]:
    """Undo ``to_files``. Only tensors and plain containers are accepted: nothing from storage is ever unpickled."""
    try:
        progress = Progress(**json.loads(read.files["progress.json"]))
        tensors = {
            name.removesuffix(".pt"): torch.load(io.BytesIO(content), map_location=device, weights_only=True)
            for name, content in read.files.items()
            if name.endswith(".pt")
        }
    except (KeyError, TypeError, ValueError, RuntimeError, UnpicklingError) as error:
        raise CheckpointError(
            f"the checkpoint of step {read.step} was not written by this version of the package: {error}"
        ) from error
    return progress, tensors


def on_host(value: Any) -> Any:
    """Copy all tensors of a nested state to host memory, so that training may change the originals."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(item) for item in value)
    return value


class SaveTooSlowError(CheckpointError):
    """A save did not end in the time that was left for it."""


class Saver:
    """Writes checkpoints and metrics of rank 0 in the background, in the order in which they were asked for.

    Training waits only for the copy to host memory, and for an earlier save that is not done yet: there is never more
    than one copy.

    Args:
        folder: The run's folder.
        rules: When to save and how many to keep.
        claim: The attempt; once another has taken its place, nothing more is saved.

    Attributes:
        metrics: The attempt's rows; they are written ahead of a checkpoint, so that a resume misses none.
    """

    def __init__(self, folder: Store, rules: CheckpointRules, claim: Claim) -> None:
        self._folder = folder.child("checkpoints")
        self._rules = rules
        self.metrics = MetricsWriter(folder, claim.record.number)
        self._claim = claim
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: list[Future[None]] = []
        self._last_save = time.monotonic()
        self._last_flush = time.monotonic()
        self._saved_step = claim.record.start_step

    def is_due(self, step: int) -> bool:
        """Whether a save is due after a step."""
        by_steps = self._rules.every_steps and step % self._rules.every_steps == 0
        by_time = self._rules.every_min and time.monotonic() - self._last_save >= self._rules.every_min * 60
        return bool(by_steps or by_time)

    def save(self, progress: Progress, tensors: dict[str, Any]) -> None:
        """Copy the state of a step and write it in the background.

        A save that fails is logged and training goes on: the checkpoint before is still there.

        Raises:
            SupersededError: A later attempt has taken the run over.
        """
        self._wait(raise_errors=False)
        copied, numbers = on_host(tensors), Progress(**asdict(progress))
        self._last_save = time.monotonic()
        self._pending.append(self._executor.submit(self._write, numbers, copied))

    def save_last(self, progress: Progress, tensors: dict[str, Any], *, within_s: float | None) -> None:
        """Save the state of the last step of this attempt, and wait until its manifest is written.

        Args:
            progress: Where the training stands.
            tensors: Its state.
            within_s: Seconds that are left, or None.

        Raises:
            StorageError: Writing failed.
            SaveTooSlowError: The time was over; the process must end without waiting for the save.
            SupersededError: A later attempt has taken the run over.
        """
        deadline = None if within_s is None else time.monotonic() + within_s
        try:
            self._wait(raise_errors=False, deadline=deadline)
            self.save(progress, tensors)
            self._wait(raise_errors=True, deadline=deadline)
        except TimeoutError:
            raise SaveTooSlowError(
                f"the state of step {progress.step} could not be written in the {within_s:.0f} s that were left. "
                f"The last complete checkpoint is of step {self._saved_step}: the steps since will be repeated. "
                "Save more often (job.checkpoint.every_min), or ask the site for a longer grace time (job.grace_s)."
            ) from None

    def flush_metrics(self, *, every_s: float = 0.0) -> None:
        """Write the metric rows, at most every so many seconds."""
        if time.monotonic() - self._last_flush >= every_s:
            self._last_flush = time.monotonic()
            self._pending.append(self._executor.submit(self.metrics.flush))

    def close(self) -> None:
        """Write what is left and end the thread."""
        self.flush_metrics()
        self._wait(raise_errors=False)
        self._executor.shutdown()

    def _write(self, progress: Progress, tensors: dict[str, Any]) -> None:
        start = time.monotonic()
        self.metrics.flush()
        saved = checkpoint.Saved(progress.step, self._claim.record.number)
        checkpoint.write(self._folder, saved, to_files(progress, tensors), before_manifest=self._claim.check)
        self._saved_step = progress.step
        checkpoint.prune(self._folder, self._claim.starts, keep=self._rules.keep, best_step=progress.best_step)
        log.info("saved step %d in %.1f s", progress.step, time.monotonic() - start)

    def _wait(self, *, raise_errors: bool, deadline: float | None = None) -> None:
        while self._pending:
            try:
                self._pending[0].result(None if deadline is None else max(0.0, deadline - time.monotonic()))
            except (StorageError, CheckpointError) as error:
                if raise_errors:
                    raise
                log.error("could not write: %s", error)
            self._pending.pop(0)
