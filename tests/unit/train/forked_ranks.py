"""Trains runs with several processes: a program that imports torch once and forks all ranks.

``python -m tests.unit.train.forked_ranks JOBS``: a JSON list of attempts, each with ``run`` (its folder),
``processes``, ``stop`` (0, or after how many questions to the stop flag), ``double`` (precision) and ``hosts``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rsb_cluster.config.catalog import load_job
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.node.stopping import StopFlag
from rsb_cluster.runs import lease
from rsb_cluster.runs.run import Attempt, Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.trainer import Trainer
from rsb_cluster.train.watchdog import Watchdog
from tests.faults.lab import StopAfter
from tests.servers.daemons import GUARD_S
from tests.unit.train.forking import fork


def attempt(run: Run, processes: int, *, stop: int = 0, double: bool = False, hosts: Sequence[str] = ()) -> Any:
    """One attempt, for ``train``."""
    return {"run": run.url, "processes": processes, "stop": stop, "double": double, "hosts": list(hosts)}


def train(*attempts: Any) -> None:
    """Do some attempts, one after the other."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(attempts)],
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _rank(rank: int, number: int, wanted: dict[str, Any]) -> None:
    if wanted["double"]:
        torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    run, world = Run(Store(wanted["run"]), Path(wanted["run"]).name), wanted["processes"]
    job, _ = load_job("local", overrides=parse_overrides(["log_every_steps=1", "log_samples=true"]))
    ranks = Ranks(rank, rank, world, f"test-{number}", 0, world)
    group = ProcessGroup(ranks, run.store, wait_s=60, collective_s=60, gpus=0)
    if wanted["hosts"]:
        group.hosts = tuple(wanted["hosts"])
    claimed = None
    if rank == 0:
        draft = Attempt(number=0, job_id="test", world_size=world, hosts=(), started=time.time(), start_step=0)
        claimed = lease.acquire(run, draft)
    group.broadcast("claimed", "yes")
    watchdog = Watchdog(
        group, stalled_s=0, peer_timeout_s=0, report=lambda cause, suspects: None, exit_rank=lambda cause: None
    )
    flag = StopAfter(wanted["stop"]) if wanted["stop"] else StopFlag()
    trainer = Trainer(run, run.spec(), run.recipe(), job, group, flag, watchdog, claimed)
    start = trainer.progress.step
    cause = trainer.train()
    if claimed is not None:
        record = claimed.record.model_copy(
            update={"start_step": start, "end_step": trainer.progress.step, "cause": cause, "ended": time.time()}
        )
        run.write_attempt(record)
    group.exit_together()
    group.close()


if __name__ == "__main__":
    for index, values in enumerate(json.loads(sys.argv[1])):
        if not fork(values["processes"], partial(_rank, number=index, wanted=values)):
            sys.exit(1)
