"""What is trained side by side, on what data, and what a rank of either loop reports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.data.indexing import build_index
from rsb_cluster.storage.store import Store
from tests.benchmarks import corpus

CLASSES = 1000
# Each photograph is in the shards so many times under one name, so that an epoch is not over after a few steps.
COPIES = 8


@dataclass(frozen=True)
class Case:
    """A training that both loops do.

    Attributes:
        name: Name of the case.
        recipe: The recipe; its augmentation, loss, optimizer and precision are those of both.
        model: timm's name.
        batch: Images of a rank in a step.
        goal: Images per second that are wanted, as a multiple of timm's loop fed by its loader.
        warm_up: Steps before the clock starts.
        steps: Steps that are measured.
        samples: Photographs.
        side: Side of the images, px; 0: the recipe's.
    """

    name: str
    recipe: str
    model: str
    batch: int = 256
    goal: float = 1.0
    warm_up: int = 20
    steps: int = 100
    samples: int = 4096
    side: int = 0

    def tiny(self) -> Case:
        """The same with next to nothing to compute, which proves that the code runs."""
        model, side = ("test_vit", 160) if "deit" in self.model else ("test_resnet", 32)
        return replace(self, model=model, side=side, batch=4, warm_up=2, steps=4, samples=24)

    def read_recipe(self, world_size: int) -> Recipe:
        """Return the recipe for so many ranks, each of which is a virtual rank."""
        batch = self.batch * world_size
        samples = self.samples * COPIES
        return load_recipe(
            self.recipe,
            model=self.model,
            overrides=parse_overrides([
                f"train.global_batch={batch}", f"train.virtual_ranks={world_size}", f"data.train_samples={samples}",
                f"data.val_samples={self.samples}", f"data.num_classes={CLASSES}", "schedule.warmup_epochs=0",
                f"schedule.epochs={2 + (self.warm_up + self.steps + 1) * batch // samples}",
                "eval.every_epochs=1000000", *([f"augment.resolution={self.side}"] if self.side else []),
            ]),
        ).recipe  # fmt: skip


CASES = {
    case.name: case
    for case in (
        Case("resnet50-a1", "a1", "resnet50"),
        Case("resnet50-a3", "a3", "resnet50"),
        # 160 px and the smallest network: no loader that decodes in Python keeps up.
        Case("resnet18-a3", "a3", "resnet18", goal=1.2),
        Case("deit-s", "deit", "deit_small_patch16_224"),
    )
}


@dataclass(frozen=True)
class Speed:
    """What one loop did.

    Attributes:
        images_per_s: Of all ranks.
        waiting: Share of the time in which the device had nothing to do as data were missing.
        memory: Peak of what torch allocated on a GPU, bytes; 0 on a CPU.
    """

    images_per_s: float
    waiting: float
    memory: int


def peak_memory() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def cores_per_rank(world_size: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // world_size)


def make_data(folder: Path, samples: int) -> Path:
    """Make shards and the same photographs as files, unless they are there; return their folder."""
    data = folder / f"photographs-{samples}"
    if (data / "complete").exists():
        return data
    shutil.rmtree(data, ignore_errors=True)
    corpus.make(data / "corpus", samples)
    for split, copies in (("train", COPIES), ("val", 1)):
        (data / "shards" / split).mkdir(parents=True)
        made = sorted((data / "corpus" / "train").glob("*.tar"))
        for number, shard in enumerate(made * copies):
            os.link(shard, data / "shards" / split / f"shard-{number:06d}.tar")
        build_index(Store(data / "shards" / split))
    for shard in sorted((data / "corpus" / "train").glob("*.tar")):
        with tarfile.open(shard) as tar:
            tar.extractall(data / "unpacked", filter="data")
    for image in sorted((data / "unpacked").glob("*.jpg")):
        of_class = data / "files" / image.with_suffix(".cls").read_text()
        of_class.mkdir(parents=True, exist_ok=True)
        image.rename(of_class / image.name)
    (data / "complete").touch()
    return data


def run_ranks(module: str, request: dict[str, Any], world_size: int, *, limit_s: float) -> Speed:
    """Run a module's ranks as processes, and return what rank 0 reports.

    Raises:
        RuntimeError: A rank failed; with the end of what it said.
    """
    processes: list[subprocess.Popen[bytes]] = []
    outputs = [Path(request["folder"]) / f"output-{rank}" for rank in range(world_size)]
    try:
        for rank, output in enumerate(outputs):
            words = [sys.executable, "-m", module, json.dumps({**request, "rank": rank, "world_size": world_size})]
            with output.open("wb") as file:
                processes.append(subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + limit_s
        while any(process.poll() is None for process in processes) and not any(p.returncode for p in processes):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{module} took more than {limit_s:.0f} s")
            time.sleep(0.1)
        failed = [rank for rank, process in enumerate(processes) if process.returncode]
    finally:
        for process in processes:
            process.kill()  # those that wait for one that failed
            process.wait()
    for rank in failed:
        said = outputs[rank].read_text(errors="replace")
        raise RuntimeError(f"{module}, rank {rank}: exit code {processes[rank].returncode}\n{said[-4000:]}")
    return Speed(**json.loads(outputs[0].read_text().splitlines()[-1]))


def report(speed: Speed) -> None:
    """Print what a rank has to say, as its last line."""
    print(json.dumps(asdict(speed)), flush=True)


def case_of(request: dict[str, Any]) -> Case:
    return Case(**request["case"])


def request_of(case: Case, data: Path, folder: Path, *, fed: bool, **more: Any) -> dict[str, Any]:
    return {"case": asdict(case), "data": str(data), "folder": str(folder), "fed": fed, **more}


def read_request(arguments: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(arguments[1])
    return found
