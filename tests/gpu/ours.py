"""One rank of this package's training, from the shards to the rows of metrics, as a scheduler would start it.

Started by tests.gpu.evidence, one process a rank. With ``fed = false`` the loader is left out: the same batches again
and again, from pinned memory.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rsb_cluster.config.catalog import load_job
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.data.index import load_index
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.runs.metrics import MetricsRow, read_rows
from rsb_cluster.runs.run import Run, Spec
from rsb_cluster.storage.store import Store
from rsb_cluster.train import worker
from rsb_cluster.train.input.decoder_process import DecoderServer, ProcessBatches
from rsb_cluster.train.input.loader import Batch
from rsb_cluster.train.input.streams import TrainStream
from rsb_cluster.train.logfile import logging_to
from rsb_cluster.train.run_data import RunData
from tests.faults.lab import StopAfter
from tests.gpu.cases import CLASSES, Case, Speed, case_of, cores_per_rank, peak_memory, read_request, report

LOG_EVERY = 10
BUFFERS = 4


def create_run(case: Case, shards: Path, folder: Path, world_size: int) -> Run:
    """Create the run, before its ranks start."""
    store = Store(folder / "run")
    digests = {name: load_index(Store(shards / name)).digest for name in ("train", "val")}
    spec = Spec(
        run_id="run", seed=0, virtual_ranks=world_size, data=str(shards), train_digest=digests["train"],
        val_digest=digests["val"],
    )  # fmt: skip
    run = Run(store, spec.run_id)
    run.create(case.read_recipe(world_size), spec)
    return run


def leave_out_the_loader() -> None:
    """Let training batches come from memory."""
    loaded = RunData.batches

    def batches(self: RunData, stream: Any) -> Any:
        if not isinstance(stream, TrainStream):
            return loaded(self, stream)
        recipe, on_gpu = self._recipe, self._group.device.type == "cuda"
        side, size = recipe.augment.resolution, recipe.train.global_batch // self._spec.virtual_ranks
        made = []
        for _ in range(BUFFERS):
            batch = Batch(
                torch.randint(256, (size, 3, side, side), dtype=torch.uint8), torch.randint(CLASSES, (size,)),
                torch.arange(size), torch.ones(size, dtype=torch.bool),
            )  # fmt: skip
            made.append(batch.pin_memory() if on_gpu else batch)
        return Endless(made)

    RunData.batches = batches  # type: ignore[method-assign]


class Endless(ProcessBatches):
    """The same batches for ever; the trainer takes them to the device ahead, as those of the decoding process."""

    def __init__(self, made: list[Batch]) -> None:
        self._made, self.bytes_read = made, 0

    def __iter__(self) -> Iterator[Batch]:
        return itertools.cycle(self._made)

    def ready(self) -> bool:
        return True


def speed_of(rows: list[MetricsRow], case: Case, world_size: int) -> Speed:
    """Return the speed over the intervals after the warm-up."""
    steps, seconds, waited, before = 0, 0.0, 0.0, 0
    for row in (row for row in rows if row["kind"] == "train"):
        interval, before = row["step"] - before, row["step"]
        if row["step"] - interval < case.warm_up:
            continue
        steps += interval
        seconds += interval * case.batch * world_size / row["images_per_s"]
        waited += row["data_wait_s"] * interval
    return Speed(steps * case.batch * world_size / seconds, waited / seconds, peak_memory())


def main() -> None:
    request = read_request(sys.argv)
    case, rank, world_size = case_of(request), request["rank"], request["world_size"]
    if not request["fed"]:
        leave_out_the_loader()
    on_gpu = torch.cuda.is_available()
    cores = cores_per_rank(world_size)
    steps = case.warm_up + case.steps
    job, _ = load_job(
        "local",
        overrides=parse_overrides([
            f"gpus_per_node={world_size if on_gpu else 0}", f"tasks_per_node={world_size}",
            f"cpus_per_task={cores}", f"loader_workers={max(1, cores - 1)}",
            f"log_every_steps={min(LOG_EVERY, case.warm_up)}", "checkpoint.every_min=0",
            f"checkpoint.every_steps={request.get('save_every', 0)}",
        ]),
    )  # fmt: skip
    decoders = DecoderServer.start() if request["fed"] else None
    torch.set_num_threads(1 if on_gpu else cores)
    run = Run(Store(Path(request["folder"]) / "run"), "run")
    ranks = Ranks(rank, rank, world_size, "evidence", 0, world_size)
    with logging_to(run.store, ranks) as log_file:
        attempt = worker._Attempt(run, job, ranks, StopAfter(steps), log_file, "", decoders)
        cause = attempt.run()
    if cause != "preempted":
        sys.exit(f"the training ended: {cause}. See {run.store.url}/logs")
    if rank == 0:
        report(speed_of(read_rows(run), case, world_size))


if __name__ == "__main__":
    main()
