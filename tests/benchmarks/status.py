"""How long the status of many unfinished runs on S3 takes: ``python -m tests.benchmarks.status``.

The runs have two attempts and their rows of metrics, and no active job. Each contender asks in a process of its own, in
turn: with the summaries that attempts keep, without any, and as the peer a script that reads three files of each run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from rsb_cluster.monitor.status import find_status
from rsb_cluster.runs.run import Run, Submission
from rsb_cluster.runs.snapshot import SUMMARY, write_summary
from rsb_cluster.storage.store import Store
from tests.benchmarks.sweep import finish, rows
from tests.servers.s3 import S3Server
from tests.unit.new_runs import make_run

FILES = ("recipe.json", "attempts/0002.json", "metrics/0002-000000.jsonl")


def ours(url: str) -> int:
    """Show the status of all runs; return how many there are."""
    return len(find_status(url, ())[1])


def three_files(url: str) -> int:
    """Read three files of each run, with concurrent requests."""
    store = Store(url)
    names = store.names()
    read = list(store.read_many(f"{name}/{file}" for name in names for file in FILES))
    assert all(isinstance(content, bytes) for content in read)
    return len(names)


def measure(url: str, what: str, number: int) -> tuple[float, float]:
    """Return the seconds of a contender, in a process of its own: by the clock, and of the CPU."""
    command = [sys.executable, "-m", "tests.benchmarks.status", "--only", what, url]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["runs"] == number, found
    return float(found["s"]), float(found["cpu_s"])


def make(url: str, number: int) -> list[Run]:
    """Make the runs."""
    like = rows()

    def one(seed: int) -> Run:
        run = make_run(url, seed)  # type: ignore[arg-type]
        run.add_submission(Submission(backend="local", job_id="1", folder="/nowhere", shape="1x1", time=1.0))
        finish(run, like)
        return run

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, range(number)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("ours", "three_files"), help=argparse.SUPPRESS)
    parser.add_argument("url", nargs="?", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        start, busy = time.perf_counter(), time.process_time()
        runs = {"ours": ours, "three_files": three_files}[arguments.only](arguments.url)
        print(json.dumps({"runs": runs, "s": time.perf_counter() - start, "cpu_s": time.process_time() - busy}))
        return
    found: dict[str, list[tuple[float, float]]] = {"three files": [], "without summaries": [], "with summaries": []}
    with S3Server() as server:
        os.environ.update(server.plain_env)
        url = f"s3://{server.make_bucket('benchmark-status')}/runs"
        made = make(url, arguments.runs)
        for _ in range(arguments.rounds):
            found["three files"].append(measure(url, "three_files", arguments.runs))
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(lambda run: run.store.delete_file(SUMMARY), made))
            found["without summaries"].append(measure(url, "ours", arguments.runs))
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(write_summary, made))
            found["with summaries"].append(measure(url, "ours", arguments.runs))
    for name, measured in found.items():
        seconds, cpu = zip(*measured, strict=True)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"{name:20} {statistics.median(seconds):6.2f} s ({spread}), of the CPU {statistics.median(cpu):.2f} s")


if __name__ == "__main__":
    main()
