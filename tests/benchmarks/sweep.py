"""What a sweep of many runs costs: submitting it, against submitit's bare ``map_array``, and asking how it is.

    python -m tests.benchmarks.sweep [--runs 1000] [--s3]

It starts the real Slurm of the tests, holds the jobs in the queue, and measures in one run, contenders alternating:

- map_array: submitit hands over as many tasks of the same kind, and keeps nothing besides;
- sweep: plan (grid, digests, the index, what exists, what is queued), a folder for each run, and the array;
- models, once: the plan of ten runs whose model has not been checked before, in a process that imports torch;
- again: the same sweep planned once more while all of it is queued;
- status: of all runs, queued; and of as many that have finished, with checkpoints' worth of rows behind them.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import submitit
from rich.console import Console
from rich.table import Table

from rsb_cluster.backends.slurm.script import _parameters
from rsb_cluster.config.catalog import load_job
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.config.sweep_file import Grid, SweepFile
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.monitor.status import read_status
from rsb_cluster.node.task import Task
from rsb_cluster.runs.lookup import find_runs
from rsb_cluster.runs.metrics import MetricsWriter
from rsb_cluster.runs.run import Attempt, Run
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.plan import Plan, plan
from rsb_cluster.submission.request import Request
from rsb_cluster.submission.submit import submit
from tests.servers.s3 import S3Server
from tests.servers.slurm import SlurmCluster

HOLD = ("job.slurm.hold=true",)  # nothing is to run while we measure


def timed(what: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    value = what()
    return time.perf_counter() - start, value


def make_plan(runs_url: str, data: Path, count: int) -> Plan:
    """Plan a sweep of ten recipes (learning rates) of so many runs in all, in one resource class."""
    rates = [round(1e-3 * (i + 1), 6) for i in range(10)]
    grid = Grid(recipes=("digits",), models=("test_resnet",), vary={"optimizer.lr": rates}, seeds=count // 10)
    request = Request(job="slurm-cpu", data=str(data), runs=runs_url, overrides=parse_overrides(HOLD))
    return plan(SweepFile(name="many", grid=(grid,)), None, request, is_sweep=True)


def bare(folder: Path, count: int) -> None:
    """Hand over as many tasks by submitit alone."""
    job = load_job("slurm-cpu")[0]
    executor = submitit.SlurmExecutor(folder)
    executor.update_parameters(**_parameters(job, "bare") | {"additional_parameters": {"hold": True}})
    executor.map_array(Task.__call__, [Task("/nowhere", f"r{i}", job.model_dump(mode="json")) for i in range(count)])


def finish(run: Run, like: list[dict[str, Any]]) -> None:
    """Leave what a finished run leaves: two attempts, rows, a result."""
    for number in (1, 2):
        run.write_attempt(
            Attempt(
                number=number, job_id="1", world_size=1, hosts=("n1",), started=1, start_step=(number - 1) * 275,
                ended=2, end_step=number * 275, cause="preempted" if number == 1 else "finished",
            )
        )  # fmt: skip
        writer = MetricsWriter(run.store, number)
        for row in like:
            writer.add(row)
        writer.flush()


def rows(count: int = 500) -> list[dict[str, Any]]:
    """Rows as a run logs them."""
    row = {"kind": "train", "loss": 0.123456789, "lr": 5e-3, "images_per_s": 1234.5, "time": 1.7e9, "data_wait": 0.01}
    made = [row | {"step": i + 1, "epoch": (i + 1) / 50} for i in range(count)]
    return [*made, {"kind": "eval", "step": count, "epoch": count / 50, "top1": 80.4, "top5": 95.0, "loss": 1.0}]


def measure(runs_url: str, data: Path, count: int, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each, by name."""
    found: dict[str, list[float]] = {}

    def note(name: str, what: Callable[[], Any]) -> Any:
        seconds, value = timed(what)
        found.setdefault(name, []).append(seconds)
        return value

    note("models, once", lambda: make_plan(f"{runs_url}/first", data, 10))
    for turn in range(rounds):
        url = f"{runs_url}/{turn}"
        note("map_array", lambda turn=turn: bare(folder / f"bare-{turn}", count))
        seconds, made = timed(lambda url=url: make_plan(url, data, count))
        sending, sent = timed(lambda made=made: submit(made))
        assert len(sent) == count
        found.setdefault("sweep", []).append(seconds + sending)
        again = note("again", lambda url=url: make_plan(url, data, count))
        assert again.arrays == () and {p.state for p in again.runs} == {"already submitted"}
        name = (made.sweep.sweep_id,) if made.sweep else ()
        queued = note("status, queued", lambda url=url, name=name: read_status(find_runs(url, name)))
        assert {s.state for s in queued} == {"queued"} and len(queued) == count
        like = rows()
        for planned in made.runs:
            finish(planned.run, like)
        waiting = note("status, with rows", lambda url=url, name=name: read_status(find_runs(url, name)))
        assert {s.step for s in waiting} == {500}
        for planned in made.runs:
            result = {"top1": 80.4, "attempts": 2, "epochs": 25, "steps": 550, "images_per_s": 1e3}
            planned.run.store.write_json("result.json", result)
        ended = note("status, finished", lambda url=url, name=name: read_status(find_runs(url, name)))
        assert {s.state for s in ended} == {"finished"}
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--s3", action="store_true", help="keep the runs on the tests' S3 server")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rsb-sweep-")))
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        os.environ |= stack.enter_context(SlurmCluster()).env
        runs_url = str(folder / "runs")
        if args.s3:
            server = stack.enter_context(S3Server())
            os.environ |= server.plain_env
            runs_url = f"s3://{server.make_bucket(f'sweep-{uuid.uuid4().hex[:8]}')}"
        data = folder / "digits"
        make_set(open_set("digits"), Store(data), shard_samples=200)
        found = measure(runs_url, data, args.runs, folder, args.rounds)
        shutil.rmtree(folder / "runs", ignore_errors=True)
    table = Table("what", "s (median)", "min–max", "ratio to map_array", box=None)
    base = statistics.median(found["map_array"])
    for name, seconds in found.items():
        middle = statistics.median(seconds)
        table.add_row(name, f"{middle:.2f}", f"{min(seconds):.2f}–{max(seconds):.2f}", f"{middle / base:.1f}")
    Console().print(f"{args.runs} runs, {'S3' if args.s3 else 'local folder'}", table)


if __name__ == "__main__":
    main()
