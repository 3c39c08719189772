"""From encoded samples to batches of pixels, in order, on several workers.

There are two pipelines: ``fast`` (ours, threads that write into the batch in place) and ``timm`` (timm's own PIL
transforms in worker processes, the reference). A faster decoder is another ``Transform``; the order stays the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rsb_cluster.errors import DataError
from rsb_cluster.train.input.pixels.decode import BadImageError, EncodedImage
from rsb_cluster.train.input.pixels.transforms import Transform
from rsb_cluster.train.input.streams import EncodedSample, EvalStream, TrainStream

# Batches that are decoded ahead of the one in use, which bounds the memory. (Those that share images with the last of
# them are started, too.)
AHEAD = 3

# How long a thread that returns from a decoder waits for the GIL, seconds. With Python's default of 5 ms decoder
# threads would often idle until another thread, such as the feeder, is done.
_SWITCH_S = 0.0005

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass
class Batch:
    """The micro-batch of a virtual rank in a step, or a part of the evaluation set.

    Attributes:
        images: uint8, shape (B, C, H, W).
        labels: int64, shape (B,).
        samples: Numbers of the samples in the index, shape (B,).
        good: Whether the image could be decoded, shape (B,).
        bad: ``key: reason`` for each image that could not be decoded (first copy only).
    """

    images: Tensor
    labels: Tensor
    samples: Tensor
    good: Tensor
    bad: list[str] = field(default_factory=list)

    def pin_memory(self) -> Batch:
        """Move to page-locked memory; called by the DataLoader if there is a GPU."""
        self.images, self.labels = self.images.pin_memory(), self.labels.pin_memory()
        return self


def _batch(samples: list[EncodedSample], images: Tensor, reasons: list[str]) -> Batch:
    """Assemble a batch. The next good image replaces a bad one, so the batch keeps its size."""
    good = [not reason for reason in reasons]
    if not any(good):
        raise DataError(
            f"no image of a batch of {len(samples)} can be decoded; the first is {samples[0].key}: {reasons[0]}"
        )
    labels = [sample.label for sample in samples]
    for i in range(len(samples)):
        if not good[i]:
            j = next((i + k) % len(good) for k in range(len(good)) if good[(i + k) % len(good)])
            images[i], labels[i] = images[j], samples[j].label
    return Batch(
        images=images,
        labels=torch.tensor(labels, dtype=torch.int64),
        samples=torch.tensor([sample.number for sample in samples], dtype=torch.int64),
        good=torch.tensor(good),
        bad=[f"{s.key}: {reason}" for s, reason in zip(samples, reasons, strict=True) if reason and s.copy == 0],
    )


# --- threads ------------------------------------------------------------------------------------------------------


class _Filling:
    """A batch whose images are being decoded."""

    def __init__(self, samples: list[EncodedSample], side: int, pin: bool) -> None:
        self.samples = samples
        self.parts: list[Future[None]] = []  # decode the images
        # Height, width, channel: the layout of decoders and of channels_last.
        self.images = torch.empty((len(samples), side, side, 3), dtype=torch.uint8, pin_memory=pin)
        self.out = self.images.numpy()
        self.reasons = [""] * len(samples)

    def finish(self) -> Batch:
        """Wait for the images; raises the exceptions of the threads."""
        for part in self.parts:
            part.result()
        return _batch(self.samples, self.images.permute(0, 3, 1, 2), self.reasons)


def _keep_freed_memory() -> None:
    """Have glibc keep the memory that a decoder frees, for the next image.

    By default glibc returns it to the system, and the next image faults all its pages in again, which takes a quarter
    of the time of an image.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # glibc's maximum
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


_Copies = list[tuple[_Filling, int]]  # the batch and the position in it of each copy of an image


def _fill(transform: Transform, images: list[_Copies]) -> None:
    """Decode each image once, and augment each of its copies."""
    for copies in images:
        first, at = copies[0]
        sample = first.samples[at]
        try:
            source = EncodedImage(sample.image)
            if len(copies) > 1:
                source.rows(source.height)  # the copies need different rows
            for filling, i in copies:
                transform(source, filling.samples[i].seed, filling.out[i])
        except BadImageError as error:
            for filling, i in copies:
                filling.reasons[i] = str(error)
        except Exception as error:
            raise RuntimeError(f"decoding sample '{sample.key}' failed: {error!r}") from error


class ThreadedBatches:
    """A stream's batches, decoded by threads of this process.

    Args:
        stream: The encoded samples.
        transform: The transform, a pure function of an image's bytes and a seed.
        side: Side of the transformed images, px.
        threads: Decoding threads; 0: decode in the caller's thread.
        pin: Whether to use page-locked memory.
    """

    def __init__(
        self, stream: TrainStream | EvalStream, transform: Transform, *, side: int, threads: int, pin: bool
    ) -> None:
        self._stream, self._transform, self._side = stream, transform, side
        self._threads, self._pin = threads, pin
        _keep_freed_memory()
        sys.setswitchinterval(_SWITCH_S)

    def __iter__(self) -> Iterator[Batch]:
        if not self._threads:
            for micro_batches in self._stream:
                fillings, images = self._fillings(micro_batches)
                _fill(self._transform, images)
                yield from (filling.finish() for filling in fillings)
            return
        pending: queue.Queue[_Filling | BaseException | None] = queue.Queue(AHEAD)
        ended = threading.Event()
        feeder = threading.Thread(target=self._feed, args=(pending, ended), name="feeder", daemon=True)
        feeder.start()
        try:
            while (item := pending.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item.finish()
        finally:
            ended.set()
            with contextlib.suppress(queue.Empty):
                while True:
                    pending.get_nowait()  # unblocks the feeder, so it can check the event
            feeder.join(timeout=5.0)

    def _fillings(self, micro_batches: list[list[EncodedSample]]) -> tuple[list[_Filling], list[_Copies]]:
        """Return batches to be filled, and the copies of each of their images."""
        fillings = [_Filling(samples, self._side, self._pin) for samples in micro_batches]
        images: dict[int, _Copies] = {}
        for filling in fillings:
            for i, sample in enumerate(filling.samples):
                images.setdefault(sample.number, []).append((filling, i))
        return fillings, list(images.values())

    def _feed(self, pending: queue.Queue[_Filling | BaseException | None], ended: threading.Event) -> None:
        """Read the stream and start its batches, in order; on a thread, so reading does not delay a batch."""
        last: BaseException | None = None
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decoder") as executor:
            source = iter(self._stream)
            try:
                for filling in self._start(source, executor):
                    pending.put(filling)
                    if ended.is_set():
                        break
            except BaseException as error:  # raised again for the caller when it takes the next batch
                last = error
            finally:
                source.close()  # type: ignore[attr-defined]  # the generator ends its read-ahead
                executor.shutdown(wait=False, cancel_futures=ended.is_set())
        if not ended.is_set():
            pending.put(last)

    def _start(self, source: Iterator[list[list[EncodedSample]]], executor: ThreadPoolExecutor) -> Iterator[_Filling]:
        """Yield batches that threads are filling. Those that share images are started together."""
        for micro_batches in source:
            fillings, images = self._fillings(micro_batches)
            # In parts, not one by one, as a submit to the executor costs a twentieth of an image.
            size = -(-len(images) // (4 * self._threads))
            starts = range(0, len(images), size)
            parts = [executor.submit(_fill, self._transform, images[i : i + size]) for i in starts]
            for filling in fillings:
                filling.parts = parts
                yield filling


# --- processes ----------------------------------------------------------------------------------------------------


class _Decoder(Dataset[Any]):
    """Decodes and transforms one sample, in a worker process."""

    def __init__(self, transform: Callable[[Image.Image, int], Tensor]) -> None:
        self._transform = transform

    def __getitem__(self, sample: EncodedSample) -> tuple[EncodedSample, Tensor | None, str]:
        light = replace(sample, image=b"")
        try:
            with Image.open(io.BytesIO(sample.image)) as image:
                return light, self._transform(image.convert("RGB"), sample.seed), ""
        except Exception as error:  # decoders raise many kinds of errors; the caller counts and logs them
            return light, None, f"{type(error).__name__}: {error}"


def _collate(decoded: list[tuple[EncodedSample, Tensor | None, str]]) -> Batch:
    shape = next((image.shape for _, image, _ in decoded if image is not None), (3, 1, 1))
    blank = torch.zeros(shape, dtype=torch.uint8)
    images = torch.stack([blank if image is None else image for _, image, _ in decoded])
    return _batch([sample for sample, _, _ in decoded], images, [reason for _, _, reason in decoded])


class _StreamSampler:
    """A batch sampler whose 'indices' are the encoded samples of a stream."""

    def __init__(self, stream: TrainStream | EvalStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[list[EncodedSample]]:
        for samples in itertools.chain.from_iterable(self._stream):
            # A copy, as a view of a block cannot be sent to another process.
            yield [replace(sample, image=bytes(sample.image)) for sample in samples]


def process_batches(
    stream: TrainStream | EvalStream, transform: Callable[[Image.Image, int], Tensor], *, workers: int, pin: bool
) -> DataLoader[Any]:
    """Return a stream's batches, decoded by timm's transforms in worker processes (in this one if ``workers`` is 0).

    Threads cannot be used, as the transforms draw from generators that all threads of a process share.
    """
    return DataLoader(
        _Decoder(transform),
        batch_sampler=_StreamSampler(stream),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        # The server that forks the workers has no threads, CUDA context or network connection.
        multiprocessing_context="forkserver" if workers else None,
    )
