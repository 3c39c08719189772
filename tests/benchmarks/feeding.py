"""What it costs the training thread that images are decoded: the price of an operation that it launches.

    python -m tests.benchmarks.feeding [--rounds 3]

An emulation of a rank on a node with many cores, so that two show it: the real loader with its Python, eight decoding
threads, and sleeps in place of the C code that holds no lock of Python's (a JPEG in 1.8 ms, a resize in 0.6 ms). The
training thread launches 700 small torch operations a step, as a network without compilation does, and then waits for a
GPU that takes 22 ms for a micro-batch of 64. ``us per operation`` is what an operation costs the thread, ``x alone`` is
against the same loop without a loader, in a process of its own, in the same round. The decoding threads are in the
rank's process (``loader_processes = 0``), or in one beside it (1). Exits with 1 if the goal is missed: with 1, at most
1.3 times the cost alone while at least 2,500 images/s arrive.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.data.index import load_index
from rsb_cluster.data.indexing import build_index
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.data.shared_index import SharedIndex
from rsb_cluster.storage.store import Store
from rsb_cluster.train.input.decoder_process import DecoderServer, ProcessBatches, Split
from rsb_cluster.train.input.loader import ThreadedBatches
from rsb_cluster.train.input.pixels import transforms
from rsb_cluster.train.input.pixels.decode import EncodedImage, Pixels
from rsb_cluster.train.input.pixels.transforms import FastTrain
from rsb_cluster.train.input.streams import TrainStream
from tests.benchmarks import corpus

BATCH, THREADS, OPERATIONS, GPU_S = 64, 8, 700, 0.022
DECODE_S, RESIZE_S = 0.0018, 0.0006
SAMPLES, WARM_UP, STEPS = 1024, 30, 150
GOAL_RATE, GOAL_RATIO = 2500.0, 1.3
WAYS = ("alone", "0", "1")


def emulate_decoders() -> None:
    """Have decoding and resizing sleep; all the Python around them stays."""
    blank = np.zeros((1024, 1024, 3), np.uint8)
    small = np.zeros((224, 224, 3), np.uint8)

    def rows(self: EncodedImage, stop: int) -> Pixels:
        time.sleep(DECODE_S)
        return blank[: self.height, : self.width]

    def resize(*_: Any) -> Pixels:
        time.sleep(RESIZE_S)
        return small

    EncodedImage.rows = rows  # type: ignore[method-assign]
    transforms.resize = resize  # type: ignore[assignment]


def source(way: str, url: str) -> Iterator[Any]:
    """Return the batches; None for ever without a loader."""
    if way == "alone":
        while True:
            yield None
    emulate_decoders()
    server = DecoderServer.start() if way == "1" else None
    overrides = parse_overrides([
        f"data.train_samples={SAMPLES}", f"train.global_batch={BATCH}", "augment.resolution=224",
        "augment.crop_scale=[0.08, 1.0]",
    ])  # fmt: skip
    recipe = load_recipe("digits", overrides=overrides).recipe
    store = Store(url)
    index = load_index(store)
    stream = TrainStream(
        ShardReader(store, index), recipe, index, seed=0, virtual_ranks=1, local_virtual_ranks=[0], start_step=0,
        stop_step=WARM_UP + STEPS,
    )  # fmt: skip
    transform = FastTrain(recipe)
    if server is None:
        yield from ThreadedBatches(stream, transform, side=224, threads=THREADS, pin=False)
    else:
        split = Split(url, SharedIndex(index))
        yield from ProcessBatches(server, split, stream, transform, side=224, threads=THREADS, pin=False)


def run(way: str, url: str) -> None:
    """Train for some steps, and print the figures as JSON."""
    torch.set_num_threads(1)
    batches, tensor, in_operations, started = source(way, url), torch.zeros(64), 0.0, 0.0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            in_operations, started = 0.0, time.perf_counter()
        next(batches)
        begun = time.perf_counter()
        for _ in range(OPERATIONS):
            tensor.add_(1.0)
        launched = time.perf_counter() - begun
        in_operations += launched
        time.sleep(max(0.0, GPU_S - launched))
    seconds = time.perf_counter() - started
    print(json.dumps({"us": in_operations / STEPS / OPERATIONS * 1e6, "images/s": STEPS * BATCH / seconds}), flush=True)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        run(options.way, options.url)
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        print(f"corpus: {corpus.make(Path(folder), SAMPLES)}")
        url = str(next(Path(folder).rglob("*.tar")).parent)
        if not (Path(url) / "index.npz").exists():
            build_index(Store(url))
        for _ in range(options.rounds):
            found = {}
            for way in WAYS:
                command = [sys.executable, "-m", "tests.benchmarks.feeding", "--way", way, "--url", url]
                found[way] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
            rounds.append(found)
    table = Table("loader_processes", "us per operation", "x alone", "images/s", box=None)
    ratios = {way: statistics.median(r[way]["us"] / r["alone"]["us"] for r in rounds) for way in WAYS}
    rates = {way: statistics.median(r[way]["images/s"] for r in rounds) for way in WAYS}
    for way in WAYS:
        cost = statistics.median(r[way]["us"] for r in rounds)
        table.add_row(way, f"{cost:.1f}", f"{ratios[way]:.2f}", "-" if way == "alone" else f"{rates[way]:,.0f}")
    Console().print(table)
    if ratios["1"] > GOAL_RATIO or rates["1"] < GOAL_RATE:
        raise SystemExit(f"the goal is missed: at most {GOAL_RATIO} x alone with at least {GOAL_RATE:,.0f} images/s")


if __name__ == "__main__":
    main()
