"""How well the order of samples shuffles, against a full random permutation.

    python -m tests.benchmarks.shuffle

For a data set of ImageNet's size with class-mixed shards and with shards sorted by class (the classic mistake):

- classes/micro and classes/batch: distinct classes in a micro-batch and in a global batch;
- imbalance: sum of squared class counts of a micro-batch, over its expectation under a full permutation (1 is perfect);
- neighbours: how often two images of a micro-batch lay within one piece of a shard, over that of a full permutation;
- distance: the median number of steps in an epoch between two samples that lay next to each other in a shard.
"""

import itertools
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from rsb_cluster.data.index import ShardIndex
from rsb_cluster.data.order import EpochOrder, permutation
from tests.unit.tars import index_of

SHARDS, CLASSES, BATCH = 1281, 1000, 2048
STEPS = 40  # looked at, spread over the epoch


def micro_batches(index: ShardIndex, virtual_ranks: int, block: int, piece: int) -> list[list[np.ndarray]]:
    """The samples of some steps, by virtual rank."""
    order = EpochOrder(
        index, seed=0, epoch=0, global_batch=BATCH, virtual_ranks=virtual_ranks, repeats=1, block=block, piece=piece
    )
    steps = np.linspace(0, order.steps - 1, STEPS).astype(int).tolist()
    return [[order.draw(step, v).samples for v in range(virtual_ranks)] for step in steps]


def full_permutation(index: ShardIndex, virtual_ranks: int) -> list[list[np.ndarray]]:
    """The same of a permutation of all samples."""
    shuffled = permutation(index.num_samples, 0)
    steps = np.linspace(0, index.num_samples // BATCH - 1, STEPS).astype(int).tolist()
    return [np.split(shuffled[step * BATCH : (step + 1) * BATCH], virtual_ranks) for step in steps]


def same_piece(samples: np.ndarray, size: int = 256) -> float:
    """Share of the pairs of a micro-batch that lie in one run of ``size`` samples of the data set."""
    counts = np.bincount(samples // size)
    return float((counts * (counts - 1)).sum() / (len(samples) * (len(samples) - 1)))


def measure(steps: list[list[np.ndarray]], labels: np.ndarray) -> dict[str, float]:
    """The figures of one order."""
    micro = list(itertools.chain.from_iterable(steps))
    counts = [np.bincount(labels[m], minlength=CLASSES) for m in micro]
    m = len(micro[0])
    expected = m + m * (m - 1) / CLASSES
    return {
        "classes/micro": float(np.mean([(c > 0).sum() for c in counts])),
        "classes/batch": float(np.mean([len(np.unique(labels[np.concatenate(s)])) for s in steps])),
        "imbalance": float(np.mean([(c.astype(float) ** 2).sum() for c in counts]) / expected),
        "neighbours": float(np.mean([same_piece(s) for s in micro]) / (256 / len(labels))),
    }


def distance(index: ShardIndex, virtual_ranks: int, block: int, piece: int) -> float:
    """Median steps between neighbours in a shard; random would be about 0.29 of an epoch."""
    order = EpochOrder(
        index, seed=0, epoch=0, global_batch=BATCH, virtual_ranks=virtual_ranks, repeats=1, block=block, piece=piece
    )
    when = np.full(index.num_samples, -1)
    for v in range(min(4, virtual_ranks)):
        for step in range(order.steps):
            when[order.draw(step, v).samples] = step
    both = (when[:-1] >= 0) & (when[1:] >= 0)
    return float(np.median(np.abs(np.diff(when)[both])))


def main() -> None:
    index = index_of([1000] * SHARDS)
    n = index.num_samples
    orders = {"sorted by class": np.arange(n) * CLASSES // n, "class-mixed": permutation(n, 1) % CLASSES}
    console = Console(width=150)
    for name, labels in orders.items():
        table = Table(title=f"shards {name}: {n:,} samples, {SHARDS} shards, global batch {BATCH}", box=None)
        for column in ("virtual ranks", "block", "piece", "classes/micro", "classes/batch", "imbalance", "neighbours"):
            table.add_column(column, justify="right")
        table.add_column("distance, steps", justify="right")
        for virtual_ranks in (4, 32):
            rows = [(4096, 1000), (4096, 256), (4096, 64), (4096, 8), (4096, 1), (16384, 256)]
            for block, piece in rows:
                found = measure(micro_batches(index, virtual_ranks, block, piece), labels)
                far = distance(index, virtual_ranks, block, piece)
                cells = [f"{value:.2f}" for value in found.values()]
                table.add_row(str(virtual_ranks), str(block), str(piece), *cells, f"{far:.0f}")
            found = measure(full_permutation(index, virtual_ranks), labels)
            table.add_row(str(virtual_ranks), "all", "1", *[f"{value:.2f}" for value in found.values()], "–")
        console.print(table)
    start = time.process_time()
    order = EpochOrder(index, seed=0, epoch=1, global_batch=BATCH, virtual_ranks=64, repeats=1, block=4096, piece=256)
    for v in range(64):
        order.draw(300, v)
    console.print(f"plan of an epoch and a step of 64 virtual ranks: {time.process_time() - start:.2f} s of CPU")


if __name__ == "__main__":
    main()
