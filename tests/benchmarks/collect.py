"""How long collecting many finished runs takes, and the memory for it: ``python -m tests.benchmarks.collect``.

The peer is what a script of one's own would do: read each run's result.json, one after the other. Both read the same
files in one process each, which are made first; ``--s3`` puts them on the tests' S3 server.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rsb_cluster.runs.lookup import list_folders
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from tests.made_runs import make_runs
from tests.servers.s3 import S3Server


def ours(url: str) -> int:
    """Collect all runs; return how many count."""
    from rsb_cluster.results.collect import collect, render

    collected = collect(list_folders(url))
    render(collected, "json")
    return sum(group.n for group in collected.groups)


def loop(url: str) -> int:
    """Read each result."""
    store = Store(url)
    return sum("top1" in json.loads(store.read_bytes(f"{name}/result.json")) for name in store.names())


def measure(url: str, what: str) -> dict[str, float]:
    """Run one of them in a process of its own: seconds, and MB at the peak above what it began with."""
    command = [sys.executable, "-m", "tests.benchmarks.collect", "--only", what, url]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def memory(what: str) -> float:
    """Return a line of this process's status, MB. Not getrusage: its peak begins with that of the parent."""
    text = Path("/proc/self/status").read_text()
    return float(text.split(f"{what}:")[1].split()[0]) / 1024


def copies(folder: Path, number: int) -> None:
    """Make a few hundred runs, then the rest as more seeds of them: all have their own id and science."""
    made = make_runs(folder, 300, rows=0, endings=("finished",))
    values = [(run.store.read_json("result.json"), run.run_id) for run in made]
    for i in range(len(made), number):
        result, run_id = values[i % len(values)]
        spec = result["science"]["spec"] | {"seed": i, "run_id": f"{run_id}{i:06d}"}
        run = Run.at(folder, spec["run_id"])
        science = result["science"] | {"spec": spec}
        run.store.write_json("result.json", result | {"run_id": run.run_id, "seed": i, "science": science})


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--s3", action="store_true", help="on the tests' S3 server instead of a folder")
    parser.add_argument("--only", choices=("ours", "loop"), help=argparse.SUPPRESS)
    parser.add_argument("url", nargs="?", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        before = memory("VmRSS")
        start = time.perf_counter()
        runs = {"ours": ours, "loop": loop}[arguments.only](arguments.url)
        seconds = time.perf_counter() - start
        peak = memory("VmHWM") - before
        print(json.dumps({"runs": runs, "s": seconds, "mb": peak}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "runs"
        copies(folder, arguments.runs)
        if not arguments.s3:
            report(str(folder), arguments.runs)
            return
        with S3Server() as server:
            os.environ.update(server.plain_env)
            url = f"s3://{server.make_bucket('benchmark-collect')}/runs"
            store = Store(url)
            with ThreadPoolExecutor(32) as pool:
                for run in list_folders(str(folder)):
                    pool.submit(store.write_bytes, f"{run.run_id}/result.json", run.store.read_bytes("result.json"))
            report(url, arguments.runs)


def report(url: str, number: int) -> None:
    """Measure both in turn, and print."""
    found: dict[str, dict[str, float]] = {}
    for what in ("ours", "loop"):
        values = found[what] = measure(url, what)
        assert values["runs"] == number, values
        print(f"{what:5} {values['runs']:6.0f} runs  {values['s']:7.2f} s  {values['mb']:5.0f} MB", flush=True)
    print(f"ours / loop: {found['ours']['s'] / found['loop']['s']:.2f}")


if __name__ == "__main__":
    main()
