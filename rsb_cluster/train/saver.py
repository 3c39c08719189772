"""Saving in the background of training."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from rsb_cluster.config.job import CheckpointPolicy
from rsb_cluster.errors import CheckpointError, StorageError
from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.lease import Lease
from rsb_cluster.runs.metrics import MetricsWriter
from rsb_cluster.storage.store import Store
from rsb_cluster.train.state import Progress, Staging, staged_bytes

log = logging.getLogger(__name__)


class SaveTooSlowError(CheckpointError):
    """A save did not finish in the time that was left."""


class Saver:
    """Writes checkpoints and metrics of rank 0 in the background, in order.

    Training waits only for the copy to host memory, and for the previous save if it is not finished: there is only one
    copy, and the save writes from it.

    Args:
        folder: The run's folder.
        policy: When to save and how many checkpoints to keep.
        lease: The attempt; once it is superseded, nothing more is saved.
        device: Device of the state.

    Attributes:
        metrics: The attempt's rows, written before each checkpoint, so a resumed run misses none.
    """

    def __init__(self, folder: Store, policy: CheckpointPolicy, lease: Lease, device: torch.device) -> None:
        self._folder = folder.child("checkpoints")
        self._policy = policy
        self.metrics = MetricsWriter(folder, lease.record.number)
        self._lease = lease
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: list[Future[None]] = []
        self._staging = Staging(device)
        self._last_save = time.monotonic()
        self._last_flush = time.monotonic()
        self._is_closed = False
        self._copied_step = self._saved_step = lease.record.start_step

    def is_due(self, step: int) -> bool:
        """Whether a save is due after a step that is not saved yet."""
        by_steps = self._policy.every_steps and step % self._policy.every_steps == 0
        by_time = self._policy.every_min and time.monotonic() - self._last_save >= self._policy.every_min * 60
        return step != self._copied_step and bool(by_steps or by_time)

    def prepare(self, states: Mapping[str, Any]) -> None:
        """Allocate host memory for a state, in the background, so the first save takes no longer than others."""
        self._pending.append(self._executor.submit(self._staging.reserve, staged_bytes(states)))

    def save(self, progress: Progress, states: Mapping[str, Any]) -> None:
        """Copy the state of a step, and write it in the background.

        A save that fails is logged and training continues, as the previous checkpoint is still there.

        Raises:
            SupersededError: A later attempt has taken the run over.
        """
        self._wait(raise_errors=False)
        files = self._staging.put(progress, states)
        self._last_save, self._copied_step = time.monotonic(), progress.step
        self._pending.append(self._executor.submit(self._write, progress.step, progress.best_step, files))

    def save_last(self, progress: Progress, states: Mapping[str, Any], *, within_s: float | None) -> None:
        """Save the state of the attempt's last step, and wait until its manifest is written.

        Args:
            progress: The progress of the training.
            states: Its state dicts by name.
            within_s: Timeout, seconds, or None.

        Raises:
            StorageError: Writing failed.
            SaveTooSlowError: The save timed out; the process must exit without waiting for it.
            SupersededError: A later attempt has taken the run over.
        """
        deadline = None if within_s is None else time.monotonic() + within_s
        try:
            self._wait(raise_errors=False, deadline=deadline)
            self.save(progress, states)
            self._wait(raise_errors=True, deadline=deadline)
        except TimeoutError:
            raise SaveTooSlowError(
                f"the state of step {progress.step} could not be saved in the {within_s:.0f} s that were left. "
                f"The last checkpoint is of step {self._saved_step}; the steps since will be repeated. "
                "Save more often (job.checkpoint.every_min), or ask the site for a longer grace time (job.grace_s)."
            ) from None

    def flush_metrics(self, *, every_s: float = 0.0) -> None:
        """Write the metrics rows in the background, at most every ``every_s`` seconds."""
        if time.monotonic() - self._last_flush >= every_s:
            self._last_flush = time.monotonic()
            self._pending.append(self._executor.submit(self._flush_metrics))

    def flush(self, *, within_s: float) -> None:
        """Wait for what is being written, from another thread; the main one may wait in a collective forever."""
        wait(list(self._pending), within_s)

    def close(self) -> None:
        """Write the remaining rows and end the thread; closing again does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self.flush_metrics()
            self._wait(raise_errors=False)
            self._executor.shutdown()

    def _flush_metrics(self) -> None:
        self._lease.check_exists()
        self.metrics.flush()

    def _write(self, step: int, best_step: int, files: Mapping[str, memoryview]) -> None:
        start = time.monotonic()
        self._flush_metrics()
        saved = checkpoint.CheckpointId(step, self._lease.record.number)
        checkpoint.write(self._folder, saved, files, before_manifest=self._lease.check)
        self._saved_step = step
        try:
            checkpoint.prune(self._folder, self._lease.starts, keep=self._policy.keep, best_step=best_step)
        except StorageError as error:
            log.warning("old checkpoints could not be removed: %s", error)
        log.info("saved step %d in %.1f s", step, time.monotonic() - start)

    def _wait(self, *, raise_errors: bool, deadline: float | None = None) -> None:
        while self._pending:
            wait([self._pending[0]], None if deadline is None else max(0.0, deadline - time.monotonic()))
            if not self._pending[0].done():
                raise TimeoutError
            try:
                self._pending.pop(0).result()
            except (StorageError, CheckpointError) as error:
                if raise_errors:
                    raise
                log.error("a save failed: %s", error)
