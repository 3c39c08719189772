"""Images per second from shards to batches, against what users have today, in one run.

    python -m tests.benchmarks.loader [--where s3] [--eval] [--side 160] [--cores 1] [--rounds 3] [--only timm,rsb]

All contenders (see ``contenders``) read the same shards (see ``corpus``) from the page cache, or from a real S3 server
that runs beside them; they alternate, each in a process of its own, with as many workers as cores. ``per core`` is
images per second of CPU time of all the contender's processes, which other work on the machine does not distort much;
the server's is not in it. ``first batch`` leaves out the imports. ``MiB`` is the largest PSS of all its processes
together. Ratios are medians over the rounds of the quotients within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import site
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks import corpus

SAMPLES = 3000
# What is counted is the third to fifth epoch, as a training has many: all have their memory by then (on a virtual
# machine the first touch of a page can cost more than its content), and ours has checked each shard against its hash.
EPOCH = 23  # batches
WARM_UP, COUNTED = 2 * EPOCH, 3 * EPOCH
Figures = dict[str, float]


# --- in the contender's process -------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Run one contender and print its figures as JSON."""
    from tests.benchmarks.contenders import BATCH, Task, contend

    task = Task(options.url, options.side, not options.eval, options.cores)
    start = time.perf_counter()
    source = contend(options.contend, task, options.cores)
    next(source)
    first = time.perf_counter() - start
    for _ in range(WARM_UP):
        next(source)
    wall, cpu = time.perf_counter(), _cpu_s(os.getpid())
    for _ in range(COUNTED):
        next(source)
    wall, cpu = time.perf_counter() - wall, _cpu_s(os.getpid()) - cpu
    images = COUNTED * BATCH
    print(json.dumps({"images/s": images / wall, "per core": images / cpu, "first batch, s": first}), flush=True)
    os._exit(0)


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += _tree(int(child))
    return found


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process and of its living and ended children."""
    ticks = 0
    for each in _tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))  # user, system, and both of the children waited for
    return ticks / os.sysconf("SC_CLK_TCK")


# --- in the benchmark's --------------------------------------------------------------------------------------------


def _memory_mib(pid: int) -> float:
    """Memory of a process and its children; what they share counts once."""
    total = 0
    for each in _tree(pid):
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
            total += int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total / 1024


def measure(name: str, python: str, url: str, options: argparse.Namespace) -> Figures:
    """Run one contender in a process of its own."""
    command = [python, "-W", "ignore", "-m", "tests.benchmarks.loader", "--contend", name, "--url", url]
    command += ["--side", str(options.side), "--cores", str(options.cores), *(["--eval"] if options.eval else [])]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        memory = 0.0
        while process.poll() is None:
            memory = max(memory, _memory_mib(process.pid))
            time.sleep(0.5)
        assert process.stdout is not None
        printed = process.stdout.read().splitlines()
        if process.returncode or not printed:
            errors.seek(0)
            raise SystemExit(f"{name} failed:\n{errors.read()}")
    figures: Figures = json.loads(printed[-1])
    return figures | {"MiB": memory}


def pillow_simd(folder: Path) -> str | None:
    """Return a Python that has pillow-simd in Pillow's place and all else of this one; None if it cannot be built."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-binary", ":all:", "pillow-simd"]
        built = subprocess.run(install, env=os.environ | {"CC": "cc -mavx2"}, capture_output=True, text=True)
        if built.returncode:
            print(f"pillow-simd cannot be built here:\n{built.stderr[-1000:]}", file=sys.stderr)
        own = next((folder / "lib").glob("python*/site-packages"))
        (own / "rest.pth").write_text("".join(f"{path}\n" for path in [*site.getsitepackages(), str(Path.cwd())]))
    check = [str(python), "-c", "import PIL; print(PIL.__version__)"]
    version = subprocess.run(check, capture_output=True, text=True).stdout
    return str(python) if ".post" in version else None


@contextlib.contextmanager
def served(data: Path, where: str) -> Iterator[str]:
    """The URL of the shards; from a real S3 server if asked for."""
    if where == "local":
        yield str(data)
        return
    from rsb_cluster.storage.store import Store
    from tests.servers.s3 import S3Server

    server = S3Server()
    if missing := server.unavailable():
        raise SystemExit(f"no S3 server can run here: {', '.join(missing)} missing")
    with server:
        os.environ |= server.plain_env
        store = Store(f"s3://{server.make_bucket('corpus')}/train")
        for path in sorted(data.iterdir()):
            store.write_bytes(path.name, path.read_bytes())
        yield store.url


def show(title: str, found: dict[str, list[Figures]]) -> Table:
    """The table that the README quotes; ratios are to the first contender."""
    table = Table(title=title, box=None)
    for column in ("loader", "images/s", "ratio", "per core", "ratio", "first batch, s", "MiB"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    base = next(iter(found.values()))
    for name, rounds in found.items():
        middle = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        ratio = {key: statistics.median(r[key] / b[key] for r, b in zip(rounds, base, strict=True)) for key in middle}
        table.add_row(
            name, f"{middle['images/s']:.0f}", f"{ratio['images/s']:.2f}", f"{middle['per core']:.0f}",
            f"{ratio['per core']:.2f}", f"{middle['first batch, s']:.1f}", f"{middle['MiB']:.0f}",
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--where", choices=("local", "s3"), default="local")
    parser.add_argument("--eval", action="store_true", help="evaluation instead of training")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="contenders whose names hold one of these, by commas")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "rsb-cluster-corpus")
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        run(options)
        return
    from rsb_cluster.data.indexing import build_index
    from rsb_cluster.storage.store import Store
    from tests.benchmarks.contenders import LOCAL, S3

    made = corpus.make(options.data, SAMPLES)
    if not (options.data / "train" / "index.npz").exists():
        build_index(Store(options.data / "train"))
    pythons = dict.fromkeys(LOCAL if options.where == "local" else S3, sys.executable)
    if simd := pillow_simd(options.data / "pillow-simd") if options.where == "local" else None:
        pythons["timm on pillow-simd"] = simd
    else:
        pythons.pop("timm on pillow-simd", None)
    wanted = [name for name in pythons if any(part in name for part in options.only.split(","))]
    if options.eval:
        wanted = [name for name in wanted if "repeats" not in name]
    found: dict[str, list[Figures]] = {name: [] for name in wanted}
    with served(options.data / "train", options.where) as url:
        for _ in range(options.rounds):
            for name in wanted:
                found[name].append(measure(name, pythons[name], url, options))
    kind = "evaluation" if options.eval else "training"
    title = f"{made}; {options.where}, {kind}, {options.side} px, {options.cores} cores, median of {options.rounds}"
    Console(width=140).print(show(title, found))


if __name__ == "__main__":
    main()
