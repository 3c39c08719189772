"""Proving on the user's own cluster that a preempted run ends as an unbroken one does.

Two runs of one recipe, with the same seed: one is left alone, the other preempted at a third and at two thirds of its
way. Then all that they leave behind is compared.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsb_cluster.config.schema import Override
from rsb_cluster.config.sweep_file import Grid, SweepFile
from rsb_cluster.errors import ConfigError, RsbError, StorageError
from rsb_cluster.monitor import actions
from rsb_cluster.monitor.status import Status, is_over, read_status
from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.metrics import read_rows
from rsb_cluster.runs.run import Run
from rsb_cluster.submission.data_location import make_missing
from rsb_cluster.submission.plan import Request, plan
from rsb_cluster.submission.submit import submit

# A real recipe and real images, small enough for a CPU: some 250 steps in a minute or two.
RECIPE = "digits"
CHANGES: tuple[Override, ...] = (
    ("model.name", "test_resnet"),
    ("schedule.epochs", 12),
    ("augment.cutmix", 1.0),
    ("augment.mix_switch_prob", 0.5),
    ("augment.rand_augment", "rand-m7-mstd0.5-inc1"),
    ("train.ema_decay", 0.9),
    ("job.log_samples", True),
    ("job.log_every_steps", 5),
    ("job.gpus_per_node", 0),
)
# Where the preemptions come, as parts of the way.
PREEMPT_AT = (1 / 3, 2 / 3)
POLL_S = 0.5
# Largest difference of a loss that different machines or a GPU may make, relative.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Outcome:
    """One line of the comparison.

    Attributes:
        what: What was compared.
        found: What came out, in words.
        holds: Whether it is as it must be.
    """

    what: str
    found: str
    holds: bool


def resume(
    folder: Path, *, job: str, overrides: Sequence[Override], say: Callable[[str], None], timeout_s: float
) -> list[Outcome]:
    """Run the test.

    Args:
        folder: New folder for data and runs, on a file system that all nodes share.
        job: Where to train: name of a job, or empty for the default.
        overrides: Fields of the job, such as ``("job.nodes", 2)``.
        say: Gets a line about each thing that happens.
        timeout_s: How long the two runs may take in all, queueing included.

    Raises:
        RsbError: A run did not finish.
    """
    unbroken, broken = (_submit(folder / name, job, overrides, folder / "data") for name in ("unbroken", "preempted"))
    say(f"unbroken:  {unbroken.url}\npreempted: {broken.url}")
    total = broken.recipe().total_steps
    due = [math.ceil(part * total) for part in PREEMPT_AT]
    deadline = time.monotonic() + timeout_s
    while not all(map(is_over, statuses := read_status([unbroken, broken]))):
        if time.monotonic() > deadline:
            raise RsbError(f"the runs did not end within {timeout_s:.0f} s ({_states(statuses)}); see {folder}.")
        if due and statuses[1].state == "running" and _last_step(broken) >= due[0]:
            say(f"preempting after step {due.pop(0)} of {total}")
            actions.preempt([broken])
        time.sleep(POLL_S)
    if any(s.state != "finished" for s in statuses):
        raise RsbError(f"a run did not finish ({_states(statuses)}); see its log below {folder}.")
    return compare(unbroken, broken)


def new_folder(folder: Path) -> Path:
    """Return the folder's absolute path; it must not hold an earlier test, whose finished runs would prove nothing."""
    path = folder.expanduser().absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} is not empty. Give another --folder.")
    return path


def compare(unbroken: Run, broken: Run) -> list[Outcome]:
    """Compare what two runs left behind: attempts, samples, pixels, metric rows and final state."""
    attempts = broken.attempts()
    preempted = [a for a in attempts if a.cause == "preempted"]
    gaps = [(a.end_step, b.start_step) for a, b in itertools.pairwise(attempts) if a.end_step != b.start_step]
    ours, theirs = _samples(broken), _samples(unbroken)
    repeated = sum(1 for _ in _sample_lines(broken)) - len(ours)
    differing = sorted(place for place in ours.keys() | theirs.keys() if ours.get(place) != theirs.get(place))
    findings = [
        Outcome("preemptions", f"{len(preempted)} in {len(attempts)} attempts", bool(preempted)),
        Outcome("resumed at the next step", "always" if not gaps else f"no: {gaps}", not gaps),
        Outcome("micro-batches computed twice", str(repeated), repeated == 0),
        Outcome(
            "samples, pixels and mix of each micro-batch",
            f"{len(theirs)} equal" if not differing else f"{len(differing)} differ, first at {differing[0]}",
            not differing and bool(theirs),
        ),
    ]
    one, other = _rows(unbroken), _rows(broken)
    same_shape = [(r["kind"], r["step"]) for r in one] == [(r["kind"], r["step"]) for r in other]
    worst = max((_difference(a, b) for a, b in zip(one, other, strict=False)), default=math.inf)
    equal_state = _final_state(unbroken) == _final_state(broken)
    # Bit-equal where the machines are: a GPU, or another model of CPU, may add in another order.
    exact = (
        attempts[0].gpus == 0 and len({host for r in (unbroken, broken) for a in r.attempts() for host in a.hosts}) == 1
    )
    findings += [
        Outcome(
            "metric rows", f"{len(one)} and {len(other)}, largest difference {worst:.1e}",
            same_shape and (worst == 0.0 if exact else worst <= TOLERANCE),
        ),
        Outcome(
            "weights, optimizer, statistics, average",
            "bit-equal" if equal_state else "not bit-equal" + ("" if exact else " (different hosts, or a GPU)"),
            equal_state or not exact,
        ),
    ]  # fmt: skip
    return findings


def _submit(runs: Path, job: str, overrides: Sequence[Override], data: Path) -> Run:
    request = Request(job=job, data=str(data), runs=str(runs), overrides=(*CHANGES, *overrides))
    made = plan(SweepFile(name="selftest", grid=(Grid(recipes=(RECIPE,)),)), None, request, is_sweep=False)
    make_missing(planned.data for planned in made.runs if planned.is_to_submit)
    submit(made)
    return made.runs[0].run


def _states(statuses: list[Status]) -> str:
    return ", ".join(f"{s.url}: {s.state} {s.cause}".strip() for s in statuses)


def _sample_lines(run: Run) -> Iterator[dict[str, Any]]:
    for name in run.store.files("samples"):
        for line in run.store.read_bytes(name).decode().splitlines():
            yield json.loads(line)


def _samples(run: Run) -> dict[tuple[int, int], tuple[list[int], int, int]]:
    """Return what each micro-batch held, by step and virtual rank: samples, checksums of pixels and of class shares.

    Raises:
        StorageError: It was computed twice and differs.
    """
    found: dict[tuple[int, int], tuple[list[int], int, int]] = {}
    for line in _sample_lines(run):
        place, content = (line["step"], line["virtual_rank"]), (line["samples"], line["pixels"], line["shares"])
        if found.setdefault(place, content) != content:
            raise StorageError(
                f"{run.url}: two attempts saw other samples, pixels or mixes at (step, virtual rank) {place}."
            )
    return found


def _last_step(run: Run) -> int:
    return max((line["step"] for line in _sample_lines(run)), default=-1)


def _rows(run: Run) -> list[dict[str, Any]]:
    return [row for row in read_rows(run) if row["kind"] in ("train", "eval")]


def _difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the larger of the relative differences of loss and top-1 of two rows."""
    numbers = [(one[key], other[key]) for key in ("loss", "top1") if key in one]
    return max((float(abs(a - b) / max(abs(a), 1e-9)) for a, b in numbers), default=0.0)


def _final_state(run: Run) -> dict[str, str]:
    """Return the checksum of each part of the state in the last checkpoint."""
    store = run.store.child("checkpoints")
    saved = checkpoint.listed(store, {a.number: a.start_step for a in run.attempts()})[-1]
    files = store.read_json(f"{saved.folder}/{checkpoint.MANIFEST}")["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
