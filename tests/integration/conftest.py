"""A sweep on a real Slurm with a preemption and a failure, for all tests that read the results of sweeps."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rsb_cluster.config import catalog
from rsb_cluster.runs.run import Run
from tests.command import RsbCluster
from tests.commands_of import as_printed
from tests.faults.victim import on_slurm
from tests.servers.daemons import GUARD_S
from tests.servers.slurm import SlurmCluster

RECIPES = {"low": 4e-3, "high": 1.6e-2}
MODELS = ("test_resnet", "test_byobnet")

SWEEP = f"""
name = "resnet-depths"
job = "slurm-cpu"

[[grid]]
recipes = ["./low.toml"]
models = {list(MODELS)}
seeds = 2

[[grid]]
recipes = ["./high.toml"]
models = ["{MODELS[0]}"]

[[resources]]
models = ["{MODELS[0]}"]
set = {{ cpus_per_task = 2, log_every_steps = 2 }}

[[resources]]
set = {{ log_every_steps = 2 }}
"""


@dataclass(frozen=True)
class FinishedSweep:
    """Two models × two seeds, and another recipe, in two resource classes; one run was preempted, one failed at first.

    Attributes:
        runs: Folder of the runs, all finished.
        before: A copy from before the failed run was retried, with the files that --collect wrote.
        sent: The plan of the submit, as JSON.
        sent_again: The plan of a second submit while the jobs of the first were queued or running.
        status_before: The status of all runs before the retry.
        preempted: Id of the run that was preempted.
        failed: Id of the run that failed at first.
        retried: The output of the retry.
    """

    rsb: RsbCluster
    sweep_id: str
    runs: Path
    before: Path
    sent: dict[str, Any]
    sent_again: dict[str, Any]
    status_before: list[dict[str, Any]]
    preempted: str
    failed: str
    retried: str


@pytest.fixture(scope="session")
def finished_sweep(
    tmp_path_factory: pytest.TempPathFactory, slurm_cluster: SlurmCluster, digits: Path
) -> FinishedSweep:
    """The finished sweep; it takes some minutes."""
    rsb = RsbCluster(tmp_path_factory.mktemp("sweep"), slurm_cluster.env)
    text = (catalog.bundled_dir("recipes") / "digits.toml").read_text()
    for name, lr in RECIPES.items():
        values = {"name": f'"{name}"', "lr": lr, "epochs": 2, "warmup_epochs": 1, "every_epochs": 1, "virtual_ranks": 2}
        mine = text
        for key, value in values.items():
            mine = re.sub(rf"(?m)^{key} = \S+", f"{key} = {value}", mine, count=1)
        (rsb.cwd / f"{name}.toml").write_text(mine)
    (rsb.cwd / "jobs" / "sweeps").mkdir(parents=True)
    (rsb.cwd / "jobs" / "sweeps" / "resnet-depths.toml").write_text(SWEEP)
    (rsb.cwd / "data").mkdir()
    (rsb.cwd / "data" / "digits").symlink_to(digits)
    rsb.hold()
    submit = as_printed("rsb-cluster sweep resnet-depths --parallel 4")
    sent = rsb.json(*submit, "--dry-run", "--json")
    sweep_id, ids = rsb(*submit).strip(), [run["run_id"] for run in sent["runs"]]
    preempted, failed = ids[0], ids[-1]
    runs = rsb.cwd / "runs"
    # It is held before its first step, and will fail to write its metrics.
    (runs / failed / "metrics").write_text("in the way")
    sent_again = rsb.json(*submit, "--dry-run", "--json")
    # Nothing new: it waits for the jobs of the first.
    assert rsb(*as_printed("rsb-cluster sweep resnet-depths --collect")).strip() == sweep_id

    on_slurm(rsb, Run.at(runs, preempted), slurm_cluster).wait_for_steps(1, 6)
    rsb("preempt", preempted)
    rsb.allow()

    def all_over() -> list[dict[str, Any]] | None:
        found = rsb.json("status", sweep_id, "--json")
        return found if not any(run["state"] in ("running", "starting", "queued") for run in found) else None

    status_before = wait(rsb, "all runs have ended", all_over)
    wait(rsb, "the collector's job has written", (runs / "sweeps" / sweep_id / "report.html").exists)
    before = rsb.cwd / "before"
    shutil.copytree(runs, before)

    (runs / failed / "metrics").unlink()
    retried = rsb.run(*as_printed("rsb-cluster retry --failed resnet-depths")).stderr
    rsb(*as_printed("rsb-cluster status resnet-depths --watch"))
    return FinishedSweep(rsb, sweep_id, runs, before, sent, sent_again, status_before, preempted, failed, retried)


def wait(rsb: RsbCluster, what: str, check: Callable[[], Any], timeout: float = GUARD_S) -> Any:
    """Wait until a predicate holds, and return its value."""
    deadline = time.monotonic() + timeout
    while not (found := check()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}\n{rsb('status')}{rsb.logs()}"
        time.sleep(1)
    return found
