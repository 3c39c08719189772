"""Ranks of one node with repeated augmentation: images per second of all together, against timm's.

    python -m tests.benchmarks.node [--rounds 3] [--ranks 4] [--samples 3000]

Each rank is a process with one virtual rank, a micro-batch of 64 and three copies of each image in a global batch, as
on a node with so many GPUs. timm's ranks use its ``RepeatAugSampler`` by ``create_loader(num_aug_repeats=3)`` on a
folder with the same photographs (see ``corpus``), and one worker process each; ours read shards, and have one decoding
thread each, in the process beside the rank. ``alone`` is ours without neighbours: each rank decodes for itself. The
ranks of a contender start together after two epochs (see ``loader``). ``read`` is the bytes read from the store by all
ranks over those of the distinct images of each epoch; ``MiB`` is the PSS of all processes at the end. Ratios are
medians over rounds.
Exits with 1 if the goal is missed: at least 3.5 times timm's rate, and at most 1.1 times the distinct images read.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks import corpus
from tests.benchmarks.loader import _cpu_s, _memory_mib

BATCH, REPEATS = 64, 3
WARM_UP, COUNTED = 2, 4  # epochs
CONTENDERS = ("timm RepeatAugSampler", "rsb-cluster alone", "rsb-cluster")
GOAL_RATE, GOAL_READ = 3.5, 1.1
Figures = dict[str, float]


# --- in a rank ------------------------------------------------------------------------------------------------------


def timm_batches(options: argparse.Namespace) -> Iterator[Any]:
    """timm's loader; the prefetcher's GPU part left out."""
    import timm.data
    import torch.distributed as dist

    from tests.benchmarks.contenders import AUGMENT

    dist.init_process_group("gloo", f"file://{options.meeting}", rank=options.rank, world_size=options.ranks)
    dataset = timm.data.create_dataset("", root=str(options.data / "folder"), is_training=True)
    loader = timm.data.create_loader(
        dataset, (3, 224, 224), BATCH, is_training=True, use_prefetcher=False, num_workers=1, persistent_workers=True,
        distributed=True, num_aug_repeats=REPEATS,
    )  # fmt: skip
    loader.dataset.transform = timm.data.create_transform(
        (3, 224, 224), is_training=True, use_prefetcher=True, interpolation="bicubic", auto_augment=AUGMENT,
        color_jitter=0,
    )  # fmt: skip
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def our_batches(options: argparse.Namespace) -> Any:
    """Return this package's batches, and the bytes of the distinct images in them."""
    from rsb_cluster.train.input.decoder_process import DecoderServer

    server = DecoderServer.start()
    import torch.distributed as dist

    from rsb_cluster.config.catalog import load_recipe
    from rsb_cluster.config.schema import parse_overrides
    from rsb_cluster.data.global_batch import GlobalBatch
    from rsb_cluster.data.index import load_index
    from rsb_cluster.data.order import groups_of
    from rsb_cluster.data.reader import ShardReader
    from rsb_cluster.data.shared_index import SharedIndex
    from rsb_cluster.storage.store import Store
    from rsb_cluster.train.input.decoder_process import ProcessBatches, Split
    from rsb_cluster.train.input.neighbours import find_neighbours
    from rsb_cluster.train.input.pixels.transforms import FastTrain
    from rsb_cluster.train.input.streams import TrainStream

    meeting = dist.FileStore(options.meeting, options.ranks)

    def gather(name: str, text: str) -> list[str]:
        meeting.set(f"{name}/{options.rank}", text)
        return [meeting.get(f"{name}/{rank}").decode() for rank in range(options.ranks)]

    url = str(options.data / "train")
    index = SharedIndex(load_index(Store(url)))
    recipe = load_recipe(
        "a2",
        overrides=parse_overrides([
            f"augment.repeats={REPEATS}", f"train.global_batch={BATCH * options.ranks}",
            f"data.train_samples={index.index.num_samples}",
        ]),
    ).recipe  # fmt: skip
    batch = GlobalBatch.of(recipe, options.ranks)
    shares = [batch.share(rank, options.ranks) for rank in range(options.ranks)]
    near = (
        find_neighbours(gather, options.rank, shares, groups_of(options.ranks, REPEATS))
        if options.contend == CONTENDERS[-1]
        else None
    )
    stream = TrainStream(
        ShardReader(Store(url), index.index), recipe, index.index, seed=0, virtual_ranks=options.ranks,
        local_virtual_ranks=shares[options.rank].virtual_ranks, start_step=0,
        stop_step=(WARM_UP + COUNTED) * recipe.steps_per_epoch, sharing=near.sharing if near else None,
    )  # fmt: skip
    distinct = 0
    for epoch in range(WARM_UP + COUNTED):
        order = stream.epoch_order(epoch)
        drawn = {n for s in range(order.steps) for r in range(options.ranks) for n in order.draw(s, r).samples.tolist()}
        distinct += int(index.index.image_sizes[sorted(drawn)].sum())
    batches = ProcessBatches(
        server, Split(url, index), stream, FastTrain(recipe), side=224, threads=1, pin=False, neighbours=near
    )
    return batches, distinct


def run(options: argparse.Namespace) -> None:
    """Be a rank: say when it is warm, go on when told to, and print what was read."""
    import torch

    torch.set_num_threads(1)
    steps = options.samples // (BATCH * options.ranks)
    ours, distinct = (None, 1) if options.contend == CONTENDERS[0] else our_batches(options)
    source = timm_batches(options) if ours is None else iter(ours)
    for _ in range(WARM_UP * steps):
        next(source)
    print("warm", flush=True)
    sys.stdin.readline()
    for _ in range(COUNTED * steps):
        next(source)
    print("done", flush=True)
    sys.stdin.readline()  # the decoding process, whose time and memory count, ends with the stream
    if ours is not None:
        assert next(source, None) is None
    print(json.dumps({"read": ours.bytes_read if ours is not None else 0, "distinct": distinct}), flush=True)
    sys.stdin.readline()
    os._exit(0)


# --- in the benchmark -------------------------------------------------------------------------------------------------


def measure(name: str, options: argparse.Namespace) -> Figures:
    """Run all ranks of a contender."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.node", "--contend", name]
        command += [
            "--ranks",
            str(options.ranks),
            "--samples",
            str(options.samples),
            "--data",
            str(options.data),
            "--meeting",
            f"{folder}/store",
        ]
        ranks = [
            subprocess.Popen(
                [*command, "--rank", str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for rank in range(options.ranks)
        ]  # fmt: skip

        def said() -> list[str]:
            return [rank.stdout.readline() for rank in ranks if rank.stdout is not None]

        def tell() -> None:
            for rank in ranks:
                assert rank.stdin is not None
                rank.stdin.write("\n")
                rank.stdin.flush()

        if said() != ["warm\n"] * len(ranks):
            raise SystemExit(f"{name} failed")
        cpu, wall = sum(_cpu_s(rank.pid) for rank in ranks), time.perf_counter()
        tell()
        if said() != ["done\n"] * len(ranks):
            raise SystemExit(f"{name} failed")
        cpu, wall = sum(_cpu_s(rank.pid) for rank in ranks) - cpu, time.perf_counter() - wall
        memory = sum(_memory_mib(rank.pid) for rank in ranks)
        tell()
        counts = [json.loads(line) for line in said()]
        tell()
        for rank in ranks:
            rank.wait()
    images = COUNTED * (options.samples // (BATCH * options.ranks)) * BATCH * options.ranks
    read = sum(count["read"] for count in counts) / counts[0]["distinct"]
    return {"images/s": images / wall, "per core": images / cpu, "read": read, "MiB": memory}


def make_folder(folder: Path) -> None:
    """Unpack the photographs, for timm."""
    for path in sorted((folder / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: member for member in tar.getmembers()}
            for name, member in members.items():
                if name.endswith(".jpg"):
                    label = tar.extractfile(name.removesuffix("jpg") + "cls")
                    image = tar.extractfile(member)
                    assert label is not None and image is not None
                    target = folder / "folder" / f"{int(label.read()):04d}" / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(image.read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "rsb-cluster-corpus")
    for hidden in ("--contend", "--meeting"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        run(options)
        return
    from rsb_cluster.data.indexing import build_index
    from rsb_cluster.storage.store import Store

    made = corpus.make(options.data, options.samples)
    if not (options.data / "train" / "index.npz").exists():
        build_index(Store(options.data / "train"))
    if not (options.data / "folder").exists():
        make_folder(options.data)
    rounds = [{name: measure(name, options) for name in CONTENDERS} for _ in range(options.rounds)]
    table = Table("contender", "images/s", "ratio", "per core", "ratio", "read", "MiB", box=None)
    ratios: dict[str, float] = {}
    for name in CONTENDERS:
        middle = {key: statistics.median(r[name][key] for r in rounds) for key in rounds[0][name]}
        ratio = {
            k: statistics.median(r[name][k] / r[CONTENDERS[0]][k] for r in rounds) for k in ("images/s", "per core")
        }
        ratios[name] = ratio["images/s"]
        table.add_row(
            name, f"{middle['images/s']:.0f}", f"{ratio['images/s']:.2f}", f"{middle['per core']:.0f}",
            f"{ratio['per core']:.2f}", f"{middle['read']:.2f}" if middle["read"] else "", f"{middle['MiB']:.0f}",
        )  # fmt: skip
    console = Console(width=120)
    console.print(f"{made}; {options.ranks} ranks, {REPEATS} repeats, median of {options.rounds}")
    console.print(table)
    most = max(r[CONTENDERS[-1]]["read"] for r in rounds)
    if ratios[CONTENDERS[-1]] < GOAL_RATE or most > GOAL_READ:
        raise SystemExit(
            f"the goal is missed: {GOAL_RATE} times timm's rate, {GOAL_READ} times the distinct images read"
        )


if __name__ == "__main__":
    main()
