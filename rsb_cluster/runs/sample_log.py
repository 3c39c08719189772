"""The sample log of a run (``samples/``): what each micro-batch held, whichever processes computed it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rsb_cluster.errors import StorageError
from rsb_cluster.runs.run import Run

_MODULUS = 1 << 32


@dataclass(frozen=True)
class MicroBatch:
    """What a virtual rank had in a step.

    Attributes:
        samples: Numbers of the samples in the index, by their slots.
        pixels: Checksum of the pixels: the sum over the images of their CRC-32, each begun with its slot.
        shares: The same of the share of each class, which depends on the partners and the λ of Mixup and CutMix.
    """

    samples: tuple[tuple[int, int], ...]
    pixels: int
    shares: int

    def merge(self, other: MicroBatch) -> MicroBatch:
        """Return the two parts of a micro-batch as one."""
        samples = tuple(sorted((*self.samples, *other.samples)))
        pixels, shares = (self.pixels + other.pixels) % _MODULUS, (self.shares + other.shares) % _MODULUS
        return MicroBatch(samples, pixels, shares)


def lines(run: Run, attempt: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the lines of all processes, of one attempt or of all."""
    prefix = "samples/" if attempt is None else f"samples/{attempt:04d}-"
    for name in run.store.files("samples"):
        if name.startswith(prefix):
            for line in run.store.read_bytes(name).decode().splitlines():
                yield json.loads(line)


def micro_batches(run: Run, attempt: int) -> dict[tuple[int, int], MicroBatch]:
    """Return the micro-batches of an attempt, by step and virtual rank, put together from their parts."""
    found: dict[tuple[int, int], MicroBatch] = {}
    for line in lines(run, attempt):
        key = (line["step"], line["virtual_rank"])
        # Logs of earlier versions have no slots: a process had whole micro-batches.
        slots = line.get("slots") or range(len(line["samples"]))
        part = MicroBatch(tuple(zip(slots, line["samples"], strict=True)), line["pixels"], line["shares"])
        if key in found and {slot for slot, _ in found[key].samples} & set(slots):
            raise StorageError(f"{run.url}: attempt {attempt} computed a part of micro-batch {key} twice.")
        found[key] = found[key].merge(part) if key in found else part
    return found
