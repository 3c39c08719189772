"""The state of a training as files, and saving it while training goes on."""

from __future__ import annotations

import io
import json
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rsb_cluster import checkpoint
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
    """

    step: int = 0
    evaluated_step: int = 0
    bad_samples: int = 0
    train_s: float = 0.0
    interval_loss: float = 0.0
    interval_wait_s: float = 0.0
    interval_bytes: float = 0.0
    interval_steps: int = 0


def to_files(progress: Progress, tensors: dict[str, Any]) -> dict[str, memoryview]:
    """Serialise plain numbers and state dicts, one file each."""
    files = {"progress.json": memoryview(json.dumps(asdict(progress)).encode())}
    for name, state in tensors.items():
        buffer = io.BytesIO()
        torch.save(state, buffer)
        files[f"{name}.pt"] = buffer.getbuffer()
    return files


def from_files(read: checkpoint.Checkpoint, device: torch.device) -> tuple[Progress, dict[str, Any]]:
    """Undo ``to_files``. Only tensors and plain containers are accepted: nothing from storage is ever unpickled."""
    try:
        progress = Progress(**json.loads(read.files["progress.json"]))
        tensors = {
            name.removesuffix(".pt"): torch.load(io.BytesIO(content), map_location=device, weights_only=True)
            for name, content in read.files.items()
            if name.endswith(".pt")
        }
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint of step {read.step} was written by another version of this package: {error}"
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


class Saver:
    """Writes checkpoints and metrics of rank 0 in the background, in the order in which they were asked for.

    Training waits only for the copy to host memory, and for an earlier save that is not done yet: there is never more
    than one copy.

    Args:
        folder: The run's folder.
        rules: When to save and how many to keep.
        metrics: The attempt's rows; they are written ahead of a checkpoint, so that a resume misses none.
    """

    def __init__(self, folder: Store, rules: CheckpointRules, metrics: MetricsWriter) -> None:
        self._folder = folder.child("checkpoints")
        self._rules = rules
        self._metrics = metrics
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: list[Future[None]] = []
        self._last_save = time.monotonic()
        self._last_flush = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a save is due after a step."""
        by_steps = self._rules.every_steps and step % self._rules.every_steps == 0
        by_time = self._rules.every_min and time.monotonic() - self._last_save >= self._rules.every_min * 60
        return bool(by_steps or by_time)

    def save(self, progress: Progress, tensors: dict[str, Any], *, wait: bool) -> None:
        """Save the state of a step.

        Raises:
            StorageError: Writing failed, and ``wait`` asks to know. Else a failed save is logged and training goes on:
                the checkpoint before is still there.
        """
        self._wait(raise_errors=False)
        copied, numbers = on_host(tensors), Progress(**asdict(progress))
        self._last_save = time.monotonic()
        self._pending.append(self._executor.submit(self._write, numbers, copied))
        if wait:
            self._wait(raise_errors=True)

    def flush_metrics(self, *, every_s: float = 0.0) -> None:
        """Write the metric rows, at most every so many seconds."""
        if time.monotonic() - self._last_flush >= every_s:
            self._last_flush = time.monotonic()
            self._pending.append(self._executor.submit(self._metrics.flush))

    def close(self) -> None:
        """Write what is left and end the thread."""
        self.flush_metrics()
        self._wait(raise_errors=False)
        self._executor.shutdown()

    def _write(self, progress: Progress, tensors: dict[str, Any]) -> None:
        start = time.monotonic()
        self._metrics.flush()
        checkpoint.write(self._folder, progress.step, to_files(progress, tensors))
        checkpoint.prune(self._folder, self._rules.keep)
        log.info("saved step %d in %.1f s", progress.step, time.monotonic() - start)

    def _wait(self, *, raise_errors: bool) -> None:
        pending, self._pending = self._pending, []
        for future in pending:
            try:
                future.result()
            except (StorageError, CheckpointError) as error:
                if raise_errors:
                    raise
                log.error("could not write: %s", error)
