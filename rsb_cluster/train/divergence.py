"""A loss that is not finite: what is said of it, and which images were in the batch."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.index import ShardIndex
from rsb_cluster.errors import CheckpointError, RsbError, StorageError
from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.checkpoint import CheckpointId
from rsb_cluster.storage.store import Store
from rsb_cluster.train.state import from_files

FOLDER = "divergence"
# Steps whose images are kept. On a GPU a loss is read one step late; and gradients that overflow without half precision
# make weights of which the next step's loss is the first to show it.
_STEPS = 3


class DivergedError(RsbError):
    """The loss is not finite."""


class RecentBatches:
    """The images and losses of this rank's last micro-batches.

    Args:
        folder: The run's folder.
        rank: This rank.
        index: The index of the training set.
    """

    def __init__(self, folder: Store, rank: int, index: ShardIndex) -> None:
        self._folder, self._rank, self._index = folder, rank, index
        self._steps: deque[tuple[int, list[tuple[int, Tensor, Tensor]]]] = deque(maxlen=_STEPS)

    def add(self, step: int, virtual_rank: int, samples_B: Tensor, loss: Tensor) -> None:
        """Remember a micro-batch of a step (counted from 0): the numbers of its samples, and its loss on the device."""
        if not self._steps or self._steps[-1][0] != step:
            self._steps.append((step, []))
        self._steps[-1][1].append((virtual_rank, samples_B, loss))

    def write(self, diverged_step: int) -> str:
        """Write what is remembered as JSON, and return the file's name in the run's folder; steps count from 1."""
        name = f"{FOLDER}/step-{diverged_step:08d}-rank{self._rank:05d}.json"
        micro_batches = [
            {
                "step": step + 1,
                "virtual_rank": virtual_rank,
                "loss": loss if math.isfinite(loss := float(on_device)) else str(loss),
                "images": [self._index.key(number) for number in samples_B.tolist()],
            }
            for step, parts in self._steps
            for virtual_rank, samples_B, on_device in parts
        ]
        self._folder.write_json(name, {"diverged_step": diverged_step, "micro_batches": micro_batches})
        return name


def explain(
    recipe: Recipe, *, step: int, loss: float, rate: float, scale: float | None, batches: RecentBatches, folder: Store
) -> str:
    """Write the images of the last micro-batches, and return what the user is told.

    Args:
        recipe: The run's recipe.
        step: The step, counted from 1.
        loss: Its loss.
        rate: Its learning rate.
        scale: The loss scale of half precision after it; None without.
        batches: This rank's last micro-batches.
        folder: The run's folder.
    """
    state = [f"epoch {step / recipe.steps_per_epoch:.2f}", f"learning rate {rate:.2e}"]
    state += [] if scale is None else [f"loss scale {scale:g}"]
    try:
        batches.write(step)
        images = (
            f"The images of the last {_STEPS} steps, with the loss of each micro-batch, are in {folder.locate(FOLDER)}."
        )
    except StorageError as error:
        images = f"The images of the batch could not be written: {error}"
    half = "--set train.amp=bf16 (or off), as half precision may overflow; " if recipe.train.amp == "fp16" else ""
    return (
        f"the loss of step {step} is {loss} ({', '.join(state)}). {images} What to try, as a new run: {half}a lower "
        "optimizer.lr; a longer schedule.warmup_epochs; optimizer.clip_grad_norm=1. If one micro-batch alone is not "
        "finite, look at its images."
    )


def last_good_checkpoint(folder: Store, starts: Mapping[int, int]) -> CheckpointId | None:
    """Return the newest checkpoint that can be read and holds finite numbers only: a loss may tell a step late.

    Args:
        folder: The run's ``checkpoints`` folder.
        starts: As for `checkpoint.list_checkpoints`.
    """
    with contextlib.suppress(StorageError):
        for saved in reversed(checkpoint.list_checkpoints(folder, starts)):
            with contextlib.suppress(CheckpointError):
                _, states = from_files(checkpoint.read(folder, saved))
                if all(bool(tensor.isfinite().all()) for tensor in _tensors(states)):
                    return saved
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
