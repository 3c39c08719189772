"""Batches on their way to the device: copied and normalised on a stream of their own, ahead of the computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rsb_cluster.train.input.loader import Batch


class OnDevice(NamedTuple):
    """A batch, and on the device its normalised images, float32 of shape (B, C, H, W), and labels, shape (B,)."""

    batch: Batch
    images: Tensor
    labels: Tensor


class Side(Protocol):
    """A stream beside the one of the computation."""

    def queue(self, work: Callable[[], OnDevice]) -> OnDevice:
        """Queue work on it, and return what will be its result."""

    def join(self, result: OnDevice) -> None:
        """Have the computation wait for the work that was queued last, on the device, before it uses the result."""


class CudaSide:
    """A stream of a GPU."""

    def __init__(self) -> None:
        self._stream, self._done = torch.cuda.Stream(), torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream())  # what it normalises with was queued there

    def queue(self, work: Callable[[], OnDevice]) -> OnDevice:
        """See ``Side``."""
        with torch.cuda.stream(self._stream):
            result = work()
            self._done.record()
        return result

    def join(self, result: OnDevice) -> None:
        """See ``Side``. The tensors' memory is not used again before the computation is through with them."""
        computing = torch.cuda.current_stream()
        computing.wait_event(self._done)
        for tensor in (result.images, result.labels):
            tensor.record_stream(computing)


class ToDevice:
    """Takes batches to a device.

    On a GPU the next batch is taken, copied and normalised while the current one is computed, if it has arrived: its
    copy is queued before the process waits for anything, on another stream. Nothing is drawn there, so between the seed
    of a micro-batch and its forward pass nothing comes in between. On a CPU each batch is taken when it is needed.

    Args:
        source: The batches.
        ready: Whether the next batch can be taken from the source without waiting.
        device: Where to.
        normalise: From uint8 to the model's input.
        side: The stream for the copies; None: batches are not taken ahead.
    """

    def __init__(
        self,
        source: Iterator[Batch],
        ready: Callable[[], bool],
        device: torch.device,
        normalise: Callable[[Tensor], Tensor],
        side: Side | None,
    ) -> None:
        self._source, self._ready, self._device, self._normalise = source, ready, device, normalise
        self._side = side
        self._ahead: OnDevice | BaseException | None = None

    def take(self) -> OnDevice:
        """Return the next batch, waiting until it has arrived.

        Raises:
            StopIteration: There is none. What the source raises is raised here as well, also what it raised ahead.
        """
        if self._side is None:
            return self._move(next(self._source))
        if self._ahead is None:
            self._take_ahead(self._side)
        taken, self._ahead = self._ahead, None
        if not isinstance(taken, OnDevice):
            assert taken is not None
            raise taken
        self._side.join(taken)
        return taken

    def prefetch(self) -> None:
        """Queue what the next batch needs, if it has arrived; an error waits for the next ``take``."""
        if self._side is not None and self._ahead is None and self._ready():
            self._take_ahead(self._side)

    def _take_ahead(self, side: Side) -> None:
        try:
            batch = next(self._source)
            self._ahead = side.queue(lambda: self._move(batch))
        except (StopIteration, Exception) as error:
            self._ahead = error

    def _move(self, batch: Batch) -> OnDevice:
        images, labels = batch.to(self._device)
        return OnDevice(batch, self._normalise(images), labels)
