"""Images per second from shards to batches, against what users have today, in one run.

    python -m tests.benchmarks.loader [--side 224] [--rounds 3] [--workers 2]

All read the same shards (see ``corpus``) and give uint8 batches of 128 with the augmentation of A2 (random resized
crop, flip, rand-m7-mstd0.5-inc1); contenders alternate. Each runs in a process of its own. ``per core`` is images per
second of CPU of all its processes, from the third batch on, which other work on the machine does not distort much.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks import corpus

BATCH = 128
SAMPLES = 3000
IMAGES = 2304  # counted: 18 batches, after the first two


def _timm_transform(side: int) -> Any:
    from timm.data import create_transform

    return create_transform(
        (3, side, side), is_training=True, use_prefetcher=True, auto_augment="rand-m7-mstd0.5-inc1",
        interpolation="bicubic", color_jitter=0,
    )  # fmt: skip


def timm_loader(data: Path, side: int, workers: int) -> Iterator[Any]:
    """timm's create_loader on its webdataset reader; the prefetcher's GPU part left out."""
    from timm.data import create_dataset, create_loader

    shards = len(list((data / "train").glob("*.tar")))
    dataset = create_dataset(
        f"wds/{data / 'train'}", root=str(data / "train"), split=f"shard-{{000000..{shards - 1:06d}}}.tar|{SAMPLES}",
        is_training=True, batch_size=BATCH,
    )  # fmt: skip
    loader = create_loader(
        dataset, (3, side, side), BATCH, is_training=True, use_prefetcher=False, num_workers=workers,
        auto_augment="rand-m7-mstd0.5-inc1", interpolation="bicubic", color_jitter=0, persistent_workers=True,
    )  # fmt: skip
    # As with the prefetcher on a GPU: uint8, normalised later.
    loader.dataset.transform = _timm_transform(side)
    return itertools.chain.from_iterable(loader for _ in itertools.count())


def webdataset_loader(data: Path, side: int, workers: int) -> Iterator[Any]:
    """webdataset's WebLoader with timm's transforms."""
    import webdataset

    transform = _timm_transform(side)
    shards = sorted(map(str, (data / "train").glob("*.tar")))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), resampled=True, nodesplitter=webdataset.split_by_node)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(BATCH)
    )
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))


def ours(data: Path, side: int, workers: int) -> Iterator[Any]:
    """This package's loader."""
    from rsb_cluster.catalog import load_recipe
    from rsb_cluster.data.index import load_index
    from rsb_cluster.data.reader import ShardReader
    from rsb_cluster.storage import Store
    from rsb_cluster.train.loader import ThreadedBatches
    from rsb_cluster.train.pixels.transforms import FastTrain
    from rsb_cluster.train.streams import TrainStream

    recipe = load_recipe(
        "a2",
        assignments=[
            f"augment.resolution={side}", "augment.repeats=1", f"train.global_batch={BATCH}",
            f"data.train_samples={SAMPLES}",
        ],
    ).recipe  # fmt: skip
    store = Store(data / "train")
    index = load_index(store)
    stream = TrainStream(
        ShardReader(store, index), recipe, index, seed=0, virtual_ranks=1, mine=[0], start_step=0,
        stop_step=recipe.total_steps,
    )  # fmt: skip
    return iter(ThreadedBatches(stream, FastTrain(recipe), side=side, threads=workers, pin=False))


CONTENDERS: dict[str, Callable[[Path, int, int], Iterator[Any]]] = {
    "timm create_loader": timm_loader,
    "webdataset WebLoader": webdataset_loader,
    "rsb-cluster": ours,
}


def _cpu() -> float:
    """CPU seconds of this process and of its living and ended children."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    total = own.ru_utime + own.ru_stime
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for child in children:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def contend(name: str, data: Path, side: int, workers: int) -> None:
    """Run one contender and print its figures as JSON."""
    import torch

    torch.set_num_threads(1)
    start = time.perf_counter()
    source = CONTENDERS[name](data, side, workers)
    next(source)
    first = time.perf_counter() - start
    next(source)
    wall, cpu = time.perf_counter(), _cpu()
    for _ in range(IMAGES // BATCH):
        next(source)
    wall, cpu = time.perf_counter() - wall, _cpu() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"images/s": IMAGES / wall, "per core": IMAGES / cpu, "first batch, s": first, "MiB": peak}))
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "rsb-cluster-corpus")
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        contend(options.contend, options.data, options.side, options.workers)
        return
    corpus.make(options.data, SAMPLES)
    if not (options.data / "train" / "index.npz").exists():
        from rsb_cluster.data.index import build_index
        from rsb_cluster.storage import Store

        build_index(Store(options.data / "train"))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name in CONTENDERS:
            command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.loader", "--contend", name]
            command += ["--side", str(options.side), "--workers", str(options.workers), "--data", str(options.data)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    title = f"{(options.data / 'done').read_text().strip()}; {options.side} px, {options.workers} workers"
    table = Table(title=f"{title}, median of {options.rounds} rounds", box=None)
    for column in ("loader", "images/s", "ratio", "per core", "ratio", "first batch, s", "MiB of the parent"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    base = found["timm create_loader"]
    for name, rounds in found.items():
        middle = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        ratios = [
            statistics.median(r[key] / b[key] for r, b in zip(rounds, base, strict=True))
            for key in ("images/s", "per core")
        ]
        table.add_row(
            name, f"{middle['images/s']:.0f}", f"{ratios[0]:.2f}", f"{middle['per core']:.0f}", f"{ratios[1]:.2f}",
            f"{middle['first batch, s']:.1f}", f"{middle['MiB']:.0f}",
        )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
