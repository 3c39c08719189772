"""What holds on GPUs, in parts of less than ten minutes each; ends with a table for the README.

    make gpu-evidence                                  all parts, on all GPUs of this machine
    make gpu-evidence GPU_EVIDENCE="step-deit-s lamb"    some of them; the table has also what earlier calls found
    python -m tests.gpu.evidence --list

Exit codes: 0 all is as wanted; 1 a part failed or a goal is missed; 3 there is no GPU. Then each part runs in a tiny
form on the CPU, which proves that its code runs and nothing else; 1 where it does not.

- tests: pytest -m gpu.
- resume-*: rsb-cluster selftest resume in deterministic mode, to the last bit.
- step-*: a training in four ways: this package and timm's loop, each with batches from memory again and again, and fed
  by its own loader from the same photographs. Goals: at least timm's rate when fed (1.2 times where its loader starves
  the GPU), and 0.98 of our own rate from memory.
- lamb: the optimizer alone, against timm's LAMB without foreach and torch's fused AdamW.
- saving: the rate of a training that saves every 25 steps, against one that does not. Goal: 0.97.
- sharing: what synchronised BatchNorm costs where GPUs share a virtual rank, and whether their gradient is that of one
  process; needs two GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.optim import create_optimizer_v2

from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.train.model import build_model
from rsb_cluster.train.optimizer import build_optimizer
from tests.gpu.cases import CASES, Case, Speed, make_data, request_of, run_ranks
from tests.gpu.conftest import ON_CPU
from tests.gpu.ours import create_run

NO_GPU = 3
LIMIT_S = 600.0  # of a part
FED_GOAL, SAVING_GOAL = 0.98, 0.97
SAVE_EVERY = 25


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        what: What was measured.
        found: The figures.
        goal: What is wanted, if anything is.
        met: Whether it is so.
        failed: Whether its code failed, which no machine excuses.
    """

    what: str
    found: str
    goal: str = ""
    met: bool = True
    failed: bool = False


@dataclass(frozen=True)
class Place:
    """Where the evidence is gathered.

    Attributes:
        folder: For data, runs and what was found.
        gpus: How many; 0: everything is tiny and on the CPU.
    """

    folder: Path
    gpus: int

    @property
    def world_size(self) -> int:
        return self.gpus or 2  # two processes on a CPU, as what is distributed has to run, too

    def case(self, name: str) -> Case:
        return CASES[name] if self.gpus else CASES[name].tiny()

    def fresh(self, name: str) -> Path:
        path = self.folder / "runs" / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


def command(*words: str, **environment: str) -> tuple[bool, str]:
    """Run a command; return whether it succeeded, and what it said."""
    whole = os.environ | environment
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=whole)
    return done.returncode == 0, done.stdout.rstrip()


def tests(place: Place) -> list[Line]:
    on_cpu = {} if place.gpus else {ON_CPU: "1"}
    passed, said = command(
        sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu", **on_cpu
    )
    print(said)
    return [Line("pytest -m gpu", said.splitlines()[-1], "no failure", passed, not passed)]


def resume(place: Place, amp: str) -> list[Line]:
    folder = place.fresh(f"resume-{amp}") / "selftest"
    passed, said = command(
        sys.executable, "-m", "rsb_cluster", "selftest", "resume", "--gpus", str(place.gpus), "--folder", str(folder),
        "--set", f"train.amp={amp}", "--timeout", "9",
    )  # fmt: skip
    print(said)
    state = next((line for line in said.splitlines() if "optimizer state" in line), "")
    bits = "not bit-equal" not in state and "bit-equal" in state
    text = "bit-equal" if bits else (state or said.splitlines()[-1]).strip()
    return [Line(f"selftest resume, {amp}", text, "bit-equal", passed and bits, failed=not state)]


def ours(place: Place, case: Case, data: Path, *, fed: bool, **more: Any) -> Speed:
    folder = place.fresh(f"{case.name}-ours-{'fed' if fed else 'memory'}{'-saving' if more else ''}")
    create_run(case, data / "shards", folder, place.world_size)
    return run_ranks(
        "tests.gpu.ours", request_of(case, data, folder, fed=fed, **more), place.world_size, limit_s=LIMIT_S
    )


def theirs(place: Place, case: Case, data: Path, *, fed: bool) -> Speed:
    folder = place.fresh(f"{case.name}-timm-{'fed' if fed else 'memory'}")
    return run_ranks("tests.gpu.peer", request_of(case, data, folder, fed=fed), place.world_size, limit_s=LIMIT_S)


def step(place: Place, name: str) -> list[Line]:
    case = place.case(name)
    data = make_data(place.folder, case.samples)
    from_memory = {"timm": theirs(place, case, data, fed=False), "ours": ours(place, case, data, fed=False)}
    fed = {"timm": theirs(place, case, data, fed=True), "ours": ours(place, case, data, fed=True)}
    ratio = fed["ours"].images_per_s / fed["timm"].images_per_s
    of_memory = fed["ours"].images_per_s / from_memory["ours"].images_per_s
    figures = [
        Line(
            f"{name}, {who}, {way}",
            f"{s.images_per_s:,.0f} images/s, {s.waiting:.1%} waiting, {s.memory / 2**30:.1f} GiB",
        )
        for way, both in (("from memory", from_memory), ("fed", fed))
        for who, s in both.items()
    ]
    return [
        *figures,
        Line(f"{name}, fed, against timm's loop", f"{ratio:.2f} x", f">= {case.goal:.1f} x", ratio >= case.goal),
        Line(f"{name}, fed, against memory", f"{of_memory:.3f} x", f">= {FED_GOAL} x", of_memory >= FED_GOAL),
    ]


def lamb(place: Place) -> list[Line]:
    device = torch.device("cuda" if place.gpus else "cpu")
    recipe = load_recipe("a1", model="resnet50" if place.gpus else "test_resnet").recipe
    network = build_model(recipe).to(device)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    spec = recipe.optimizer
    contenders: dict[str, torch.optim.Optimizer] = {
        "LAMB, ours": build_optimizer(network, spec),
        "LAMB, timm, foreach=False": create_optimizer_v2(network, "lamb", lr=spec.lr, weight_decay=0.02, foreach=False),
        "AdamW, torch, fused": torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True),
    }
    turns = [
        {name: time_of(o, device, steps=10 if place.gpus else 2) for name, o in contenders.items()} for _ in range(6)
    ]
    ms = {name: statistics.median(turn[name] for turn in turns[1:]) for name in contenders}  # the first warms up
    lines = [
        Line(f"{name}, {recipe.model.name}", f"{ms[name]:.2f} ms a step, {launches_of(optimizer, device)} launches")
        for name, optimizer in contenders.items()
    ]
    ratio = ms["LAMB, ours"] / ms["LAMB, timm, foreach=False"]
    return [
        *lines,
        Line("LAMB, ours, against timm's without foreach", f"{ratio:.2f} x the time", "<= 1.1 x", ratio <= 1.1),
    ]


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_of(optimizer: torch.optim.Optimizer, device: torch.device, steps: int) -> float:
    """Return milliseconds of a step."""
    finish(device)
    started = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    finish(device)
    return (time.perf_counter() - started) / steps * 1000


def launches_of(optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Return the kernels of a step; on a CPU its operations."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device.type == "cuda" else activity.CPU]) as profile:
        optimizer.step()
        finish(device)
    return sum(not event.name.startswith(("Optimizer.step", "cuda")) for event in profile.events())


def saving(place: Place) -> list[Line]:
    case = place.case("resnet50-a3")
    data = make_data(place.folder, case.samples)
    without = ours(place, case, data, fed=False)
    with_ = ours(place, case, data, fed=False, save_every=SAVE_EVERY if place.gpus else 2)
    ratio = with_.images_per_s / without.images_per_s
    text = f"{ratio:.3f} x ({with_.images_per_s:,.0f} of {without.images_per_s:,.0f} images/s)"
    return [Line(f"saving every {SAVE_EVERY} steps, {case.model}", text, f">= {SAVING_GOAL} x", ratio >= SAVING_GOAL)]


def sharing(place: Place) -> list[Line]:
    if place.gpus == 1:
        return [Line("a virtual rank of several GPUs", "not shown: needs two GPUs")]
    processes = 1 << place.world_size.bit_length() - 1
    size = ("--model", "resnet50", "--images", "64", "--side", "224") if place.gpus else ("--model", "resnet10t")
    options = ("--processes", str(processes), "--device", "cuda" if place.gpus else "cpu", *size)
    passed, said = command(sys.executable, "-m", "tests.benchmarks.sharing", *options)
    print(said)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    costs = [Line(f"k = {k}, {size[1]}", f"{ms} ms a step, {ratio} x that of k = 1") for k, ms, ratio, _ in rows]
    return [*costs, Line("gradient", said.splitlines()[-1], "equal gradients", passed, failed=not passed)]


PARTS: dict[str, Callable[[Place], list[Line]]] = {
    "tests": tests,
    **{f"resume-{amp}": partial(resume, amp=amp) for amp in ("off", "fp16", "bf16")},
    **{f"step-{name}": partial(step, name=name) for name in CASES},
    "lamb": lamb,
    "saving": saving,
    "sharing": sharing,
}


def machine(gpus: int) -> str:
    """Return what the figures are of."""
    name = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "NO GPU: tiny networks on a CPU, no evidence"
    return f"{name}; {len(os.sched_getaffinity(0))} cores; torch {torch.__version__}, timm {timm.__version__}"


def run_part(name: str, place: Place) -> None:
    """Run a part, and keep what it found."""
    started = time.monotonic()
    try:
        lines = PARTS[name](place)
    except Exception as error:
        print(error)
        lines = [Line(name, f"failed: {str(error).splitlines()[0]}", "runs", met=False, failed=True)]
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    keep(name, place, lines)


def run_in_time(name: str, place: Place) -> None:
    """Run a part in a process of its own, so that what it holds of a GPU is free after it, and end it in time."""
    words = [sys.executable, "-m", "tests.gpu.evidence", "--part", name, "--folder", str(place.folder)]
    keep(name, place, [Line(name, "ended without a word", "runs", met=False, failed=True)])
    process = subprocess.Popen(words, start_new_session=True)
    try:
        process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        keep(name, place, [Line(name, f"took more than {LIMIT_S:.0f} s", "runs", met=False, failed=True)])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also the ranks that it started
        process.wait()


def keep(name: str, place: Place, lines: list[Line]) -> None:
    """Write what a part found, for the tables of later calls, too."""
    (place.folder / "found").mkdir(exist_ok=True, parents=True)
    found = {"machine": machine(place.gpus), "lines": [vars(line) for line in lines]}
    (place.folder / "found" / f"{name}.json").write_text(json.dumps(found, indent=1))


def show(place: Place) -> int:
    """Print the table of all that was found on such a machine; return the exit code."""
    table = Table("part", "what", "found", "goal", "", box=None)
    met, failed = True, False
    for name in PARTS:
        path = place.folder / "found" / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else None
        if found is None or found["machine"] != machine(place.gpus):
            table.add_row(name, "not run")
            met = False
            continue
        for line in (Line(**values) for values in found["lines"]):
            judged = ("ok" if line.met else "MISSED") if line.goal and place.gpus else ""
            table.add_row(name, line.what, line.found, line.goal, "FAILED" if line.failed else judged)
            met, failed = met and line.met, failed or line.failed
    print(f"\n{machine(place.gpus)}")
    Console(width=180).print(table)
    if not place.gpus:
        what = "some of the code fails" if failed else "this shows that the code runs, and nothing about GPUs"
        print(f"There is no GPU here: {what}.", file=sys.stderr)
        return 1 if failed else NO_GPU
    return 0 if met else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="which; none: all")
    parser.add_argument("--folder", type=Path, default=Path("build/gpu-evidence"))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="name the parts")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}. There are {', '.join(PARTS)}")
    if options.list:
        print("\n".join(PARTS))
        return 0
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    place = Place(options.folder.absolute(), gpus)
    print(machine(gpus))
    if options.part:
        run_part(options.part, place)
        return 0
    for name in options.parts or PARTS:
        print(f"--- {name}", flush=True)
        run_in_time(name, place)
    return show(place)


if __name__ == "__main__":
    sys.exit(main())
