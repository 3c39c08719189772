"""How long training stands still for a checkpoint, and how long a requeued job takes to its next step.

    python -m tests.benchmarks.saving still [--rounds 5] [--s3]
    python -m tests.benchmarks.saving back

``still``: ResNet-50 and ResNet-152 with LAMB's state, on the GPU where there is one. ``torch.save`` in the loop, as
most training scripts do it, against the copy that training waits for here; the two take turns in one run. ``back``: a
run on two hosts of a real Slurm is requeued, and watched from outside. Both need no GPU; the servers need root.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.config.job import CheckpointPolicy
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.runs.lease import Lease
from rsb_cluster.runs.run import Attempt, Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train.model import build_model
from rsb_cluster.train.optimizer import build_optimizer
from rsb_cluster.train.saver import Saver
from rsb_cluster.train.state import Progress
from tests.command import RsbCluster
from tests.faults.victim import on_slurm, submit
from tests.servers.daemons import poll, processes_with
from tests.servers.hosts import SlurmHosts
from tests.servers.s3 import S3Server

MIB = 1 << 20
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def state_of(model: str) -> dict[str, Any]:
    """Return the state of a training after one step."""
    recipe = load_recipe("a2", model=model).recipe
    network = build_model(recipe).to(DEVICE)
    optimizer = build_optimizer(network, recipe.optimizer)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {"model": network.state_dict(), "optimizer": optimizer.state_dict()}


def timed(action: Callable[..., object], *arguments: Any, **named: Any) -> float:
    started = time.perf_counter()
    action(*arguments, **named)
    return time.perf_counter() - started


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextmanager
def peak_memory(before: int) -> Iterator[list[int]]:
    """Yield a list that in the end holds by how many bytes this process was larger than it had been before."""
    found, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            found[0] = max(found[0], resident() - before)

    thread = threading.Thread(target=look)
    thread.start()
    yield found
    over.set()
    thread.join()


def in_the_loop(store: Store, state: dict[str, Any]) -> None:
    if store.is_local:
        with Path(store.url, "in-the-loop.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        store.write_bytes("in-the-loop.pt", buffer.getvalue())


def still(url: str, where: str, rounds: int) -> None:
    for model in ("resnet50", "resnet152"):
        state = state_of(model)
        size = sum(t.numel() * t.element_size() for t in tensors(state))
        store = Store(url)
        record = Attempt(number=1, job_id="", world_size=1, hosts=(), started=0.0, start_step=0)
        run = Run(store.child(model), model)
        run.claim_attempt(record)
        run.store.write_json("spec.json", {})  # without it the folder is none of a run
        saver = Saver(run.store, CheckpointPolicy(), Lease(run, record, []), DEVICE)
        theirs, ours, behind, burnt, peaks = [], [], [], [], []
        before = resident()
        saver.prepare(state)
        for step in range(1, rounds + 1):
            theirs.append(timed(in_the_loop, store, state))
            with peak_memory(before) as peak:
                ours.append(timed(saver.save, Progress(step=step), state))
                begun = time.process_time()
                behind.append(timed(saver._wait, raise_errors=True))
                burnt.append(time.process_time() - begun)
            peaks.append(peak[0])
        saver.close()
        one, other = statistics.median(theirs), statistics.median(ours)
        print(
            f"{model:10s} {where:6s} {size / MIB:6.0f} MiB   torch.save in the loop {one:6.2f} s   here {other:6.3f} s"
            f" ({min(ours):.3f} to {max(ours):.3f})   {one / other:5.1f} times less   "
            f"in the background {statistics.median(behind):5.2f} s ({statistics.median(burnt):.2f} s of CPU)   "
            f"memory at most +{max(peaks) / size:.2f} of the state",
            flush=True,
        )


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def back(folder: Path) -> None:
    """Requeue a run, and say when each part of its return was there."""
    make_set(open_set("digits"), Store(folder / "data"))
    with SlurmHosts(2) as hosts:
        victim = on_slurm(
            rsb := RsbCluster(folder, hosts.env),
            run := submit(rsb, folder / "data", "--job", "slurm-cpu", "--nodes", "2", "--set", "job.tasks_per_node=1"),
            hosts,
        )
        victim.wait_for_steps(1)
        begun = time.monotonic()
        hosts.run("scontrol", "requeue", victim.job_id)
        rank_0 = [*victim.rank_env(victim.job_id, 0), "\0SLURM_RESTART_COUNT=1\0"]
        stations: dict[str, Callable[[], object]] = {
            "saved and ended (the grace)": lambda: run.attempts()[0].cause,
            "Slurm starts it again (cred_expire=10)": lambda: processes_with(rank_0),
            "Python, torch and timm are imported": lambda: any("-1.json" in n for n in run.store.files("rendezvous")),
            "the ranks have met": lambda: len(run.attempt_numbers()) > 1,
            "model built, checkpoint read and verified": lambda: " epochs of " in victim.log().split("attempt 2, ")[-1],
            "first batch and first step": lambda: victim.progress()[0] == 2 and victim.progress()[1],
        }
        last = begun
        for name, there in stations.items():
            if poll(lambda there=there: bool(there()), 300, 0.02) is None:  # type: ignore[misc]
                raise SystemExit(f"never: {name}\n{rsb.logs()}")
            now = time.monotonic()
            print(f"{now - begun:6.1f} s   +{now - last:5.1f}   {name}", flush=True)
            last = now
        rsb("cancel", run.run_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("still", "back"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--s3", action="store_true", help="also to a Ceph server on this machine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rsb-saving-") as folder:
        if options.what == "back":
            back(Path(folder))
            return
        still(folder, "folder", options.rounds)
        if options.s3:
            with S3Server() as server:
                os.environ.update(server.plain_env)
                still(f"s3://{server.make_bucket('saving')}", "S3", options.rounds)


if __name__ == "__main__":
    main()
