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
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rsb_cluster.data.host_memory import AHEAD
from rsb_cluster.errors import DataError
from rsb_cluster.train.input.pixels.decode import BadImageError, EncodedImage
from rsb_cluster.train.input.pixels.transforms import Transform
from rsb_cluster.train.input.streams import EncodedSample, EvalStream, MicroBatch, TrainStream, followers

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
        copied: Happens when the copy of the images to a GPU is done; None without one.
    """

    images: Tensor
    labels: Tensor
    samples: Tensor
    good: Tensor
    bad: list[str] = field(default_factory=list)
    copied: torch.cuda.Event | None = None

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return images and labels on a device; the copy to a GPU is asynchronous."""
        images, labels = self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True)
        if device.type == "cuda":
            self.copied = torch.cuda.Event()
            self.copied.record()
        return images, labels

    def pin_memory(self) -> Batch:
        """Move to page-locked memory; called by the DataLoader if there is a GPU."""
        self.images, self.labels = self.images.pin_memory(), self.labels.pin_memory()
        return self


class BadImage(NamedTuple):
    """An image of a batch that could not be decoded: what and why, and the number of its copy."""

    text: str
    copy: int


def assemble(
    images: Tensor,
    samples: Tensor,
    labels: Tensor,
    bad: Mapping[int, BadImage],
    substitutes: Callable[[int], Iterator[int | EncodedSample]],
    transform: Transform | None = None,
) -> Batch:
    """Assemble a batch. The next good image replaces a bad one, so the batch keeps its size.

    Args:
        images: uint8, shape (B, C, H, W); those at the positions in ``bad`` are overwritten.
        samples: int64, shape (B,).
        labels: int64, shape (B,); as the images.
        bad: The images that could not be decoded, by their positions.
        substitutes: See ``TrainStream.substitutes``, for the position of an image of this batch.
        transform: Of substitutes that are not in the batch.

    Raises:
        DataError: No image could be decoded.
    """
    good = torch.ones(len(labels), dtype=torch.bool)
    for i in sorted(bad):
        good[i] = False
        if not any(_put(other, i, images, labels, bad, transform) for other in substitutes(i)):
            raise DataError(f"no image of a batch of {len(labels)} can be decoded; the first is {bad[i].text}")
    return Batch(images, labels, samples, good, [bad[i].text for i in sorted(bad) if bad[i].copy == 0])


def _put(
    other: int | EncodedSample, i: int, images: Tensor, labels: Tensor, bad: Container[int], transform: Transform | None
) -> bool:
    """Put another image, if it is good, in the place of a bad one; return whether it is."""
    if isinstance(other, int):
        if other not in bad:
            images[i], labels[i] = images[other], labels[other]
        return other not in bad
    assert transform is not None
    try:
        transform(EncodedImage(other.image), other.seed, images[i].permute(1, 2, 0).numpy())
    except BadImageError:
        return False
    labels[i] = other.label
    return True


# --- threads ------------------------------------------------------------------------------------------------------


class Filling:
    """A batch whose images are being decoded.

    Attributes:
        micro_batch: What is decoded here of it.
        bad: What could not be decoded, by its position.
    """

    def __init__(self, micro_batch: MicroBatch, images: Tensor) -> None:
        self.micro_batch = micro_batch
        self.parts: list[Future[None]] = []  # decode the images
        self.images, self.out = images, images.numpy()
        self.bad: dict[int, BadImage] = {}

    def wait(self) -> None:
        """Wait for the images; raises the exceptions of the threads."""
        for part in self.parts:
            part.result()


def _keep_freed_memory() -> None:
    """Have glibc keep the memory that a decoder frees, for the next image.

    By default glibc returns it to the system, and the next image faults all its pages in again, which takes a quarter
    of the time of an image.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # glibc's maximum
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


_Copies = list[tuple[Filling, int, EncodedSample]]  # of each copy of an image: the batch, and the position in it


def _fill(transform: Transform, images: list[_Copies]) -> None:
    """Decode each image once, and augment each of its copies."""
    with torch.inference_mode():  # resizing costs a tenth less
        for copies in images:
            _, _, sample = copies[0]
            try:
                source = EncodedImage(sample.image)
                if len(copies) > 1:
                    source.rows(source.height)  # the copies need different rows
                for filling, at, copy in copies:
                    transform(source, copy.seed, filling.out[at])
            except BadImageError as error:
                for filling, at, copy in copies:
                    filling.bad[at] = BadImage(f"{sample.key}: {error}", copy.copy)
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
        for filling in self.filled():
            micro_batch, images = filling.micro_batch, filling.images.permute(0, 3, 1, 2)
            samples, labels = (torch.from_numpy(numbers) for numbers in micro_batch[:2])
            substitutes = partial(self._stream.substitutes, micro_batch.number)
            yield assemble(images, samples, labels, filling.bad, substitutes, self._transform)

    def filled(self) -> Iterator[Filling]:
        """Yield the batches when their images are decoded."""
        if not self._threads:
            for micro_batches in self._stream:
                fillings, images = self._fillings(micro_batches)
                _fill(self._transform, images)
                for filling in fillings:
                    filling.wait()
                    yield filling
            return
        places = AHEAD * len(self._stream.sharing.virtual_ranks)
        pending: queue.Queue[Filling | BaseException | None] = queue.Queue(places)
        ended = threading.Event()
        feeder = threading.Thread(target=self._feed, args=(pending, ended), name="feeder", daemon=True)
        feeder.start()
        try:
            while (item := pending.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                item.wait()
                yield item
        finally:
            ended.set()
            with contextlib.suppress(queue.Empty):
                while True:
                    pending.get_nowait()  # unblocks the feeder, so it can check the event
            feeder.join(timeout=5.0)

    def _fillings(self, micro_batches: list[MicroBatch]) -> tuple[list[Filling], list[_Copies]]:
        """Return batches to be filled, and the copies of each of their images."""
        fillings = [Filling(micro_batch, self._new_images(micro_batch)) for micro_batch in micro_batches]
        images: dict[int, _Copies] = {}
        for filling in fillings:
            for at, sample in zip(filling.micro_batch.at, filling.micro_batch.encoded, strict=True):
                images.setdefault(sample.number, []).append((filling, at, sample))
        return fillings, list(images.values())

    def _new_images(self, micro_batch: MicroBatch) -> Tensor:
        """Return memory for the images of a batch, in the layout of decoders and of channels_last."""
        shape = (len(micro_batch.samples), self._side, self._side, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)

    def _feed(self, pending: queue.Queue[Filling | BaseException | None], ended: threading.Event) -> None:
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

    def _start(self, source: Iterator[list[MicroBatch]], executor: ThreadPoolExecutor) -> Iterator[Filling]:
        """Yield batches that threads are filling. Those that share images are started together."""
        for micro_batches in source:
            fillings, images = self._fillings(micro_batches)
            # In parts, not one by one, as a submit to the executor costs a twentieth of an image.
            size = max(1, -(-len(images) // (4 * self._threads)))
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
        light = sample._replace(image=b"")
        try:
            with Image.open(io.BytesIO(sample.image)) as image:
                return light, self._transform(image.convert("RGB"), sample.seed), ""
        except Exception as error:  # decoders raise many kinds of errors; the caller counts and logs them
            return light, None, f"{type(error).__name__}: {error}"


def _collate(decoded: list[tuple[EncodedSample, Tensor | None, str]]) -> Batch:
    shape = next((image.shape for _, image, _ in decoded if image is not None), (3, 1, 1))
    blank = torch.zeros(shape, dtype=torch.uint8)
    images = torch.stack([blank if image is None else image for _, image, _ in decoded])
    numbers, labels = (torch.tensor([getattr(s, name) for s, _, _ in decoded]) for name in ("number", "label"))
    bad = {i: BadImage(f"{s.key}: {why}", s.copy) for i, (s, image, why) in enumerate(decoded) if image is None}
    return assemble(images, numbers, labels, bad, partial(followers, len(labels)))


class _StreamSampler:
    """A batch sampler whose 'indices' are the encoded samples of a stream."""

    def __init__(self, stream: TrainStream | EvalStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[list[EncodedSample]]:
        for micro_batch in itertools.chain.from_iterable(self._stream):
            # A copy, as a view of a block cannot be sent to another process.
            yield [sample._replace(image=bytes(sample.image)) for sample in micro_batch.encoded]


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
