"""A test on the user's own cluster that a preempted run has the same result as an uninterrupted one.

Two runs train the same recipe with the same seed. One is left alone, the other is preempted after one third and after
two thirds of its steps. Then all that they wrote is compared.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsb_cluster.config.schema import Override
from rsb_cluster.config.sweep_file import Grid, SweepFile
from rsb_cluster.errors import ConfigError, RsbError, StorageError, expand_home
from rsb_cluster.monitor import actions
from rsb_cluster.monitor.status import Status, has_ended, read_status
from rsb_cluster.runs import checkpoint, sample_log
from rsb_cluster.runs.metrics import read_rows
from rsb_cluster.runs.run import Run
from rsb_cluster.runs.sample_log import MicroBatch
from rsb_cluster.submission.data_location import make_missing_shards
from rsb_cluster.submission.plan import plan
from rsb_cluster.submission.request import Request
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
)
# When to preempt, as fractions of all steps.
PREEMPT_AT = (1 / 3, 2 / 3)
POLL_S = 0.5
PROGRESS_EVERY_S = 5.0
# Largest relative difference of a loss between different machines, or on a GPU.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Outcome:
    """One line of the comparison.

    Attributes:
        what: What was compared.
        found: The result, as text.
        passed: Whether the result is as required.
    """

    what: str
    found: str
    passed: bool


def resume(
    folder: Path, *, job: str, gpus: int, overrides: Sequence[Override], log: Callable[[str], None], timeout_s: float
) -> list[Outcome]:
    """Run the test.

    Args:
        folder: New folder for data and runs, on a file system that all nodes share.
        job: Where to train: name of a job, or empty for the default.
        gpus: GPUs per node, with deterministic kernels; 0: on CPUs.
        overrides: Fields of the job, such as ``("job.nodes", 2)``.
        log: Called with each progress message.
        timeout_s: Time limit of the two runs together, including queueing.

    Raises:
        RsbError: A run did not finish.
    """
    uninterrupted, preempted = (
        _submit(folder / name, job, (*_on(gpus), *overrides), folder / "data") for name in ("unbroken", "preempted")
    )
    log(f"uninterrupted run: {uninterrupted.url}\npreempted run:     {preempted.url}")
    total = preempted.recipe().total_steps
    due = [math.ceil(fraction * total) for fraction in PREEMPT_AT]
    deadline = time.monotonic() + timeout_s
    said, said_at = "", -math.inf
    while not all(map(has_ended, statuses := read_status([uninterrupted, preempted]))):
        if time.monotonic() > deadline:
            raise RsbError(f"the runs did not end within {timeout_s:.0f} s ({_states(statuses)}); see {folder}.")
        how_far = f"uninterrupted: {_how_far(statuses[0])}; preempted: {_how_far(statuses[1])}"
        if how_far != said and time.monotonic() - said_at >= PROGRESS_EVERY_S:
            log(how_far)
            said, said_at = how_far, time.monotonic()
        if due and statuses[1].state == "running" and _last_step(preempted) >= due[0]:
            log(f"preempting after step {due.pop(0)} of {total}")
            actions.preempt([preempted])
        time.sleep(POLL_S)
    if any(s.state != "finished" for s in statuses):
        raise RsbError(f"a run did not finish ({_states(statuses)}); see its log in {folder}.")
    return compare(uninterrupted, preempted)


def _how_far(status: Status) -> str:
    return f"{status.state}, step {status.step} of {status.total_steps}"


def new_folder(folder: Path) -> Path:
    """Return the folder's absolute path; it must be empty: finished runs of an earlier test would not train again."""
    path = expand_home(folder).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} is not empty. Give another --folder.")
    return path


def compare(uninterrupted: Run, preempted: Run) -> list[Outcome]:
    """Compare what two runs wrote: attempts, samples, pixels, metric rows and final state."""
    attempts = preempted.attempts()
    preemptions = sum(a.cause == "preempted" for a in attempts)
    gaps = [(a.end_step, b.start_step) for a, b in itertools.pairwise(attempts) if a.end_step != b.start_step]
    (expected, _), (actual, repeated) = _micro_batches(uninterrupted), _micro_batches(preempted)
    differing = sorted(key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key))
    expected_rows, actual_rows = _rows(uninterrupted), _rows(preempted)
    same_steps = [(r["kind"], r["step"]) for r in expected_rows] == [(r["kind"], r["step"]) for r in actual_rows]
    worst = max((_difference(a, b) for a, b in zip(expected_rows, actual_rows, strict=False)), default=math.inf)
    equal_state = _final_state(uninterrupted) == _final_state(preempted)
    # Different CPU models, and GPUs without deterministic kernels, may sum in a different order: then the results need
    # not be bit-equal. Nor on GPUs of several hosts: the runs may get others, with other links between them.
    hosts = {host for run in (uninterrupted, preempted) for a in run.attempts() for host in a.hosts}
    exact = (attempts[0].gpus == 0 or preempted.recipe().train.deterministic) and len(hosts) == 1
    return [
        Outcome("preemptions", f"{preemptions} in {len(attempts)} attempts", preemptions > 0),
        Outcome("resumed at the next step", "always" if not gaps else f"no: {gaps}", not gaps),
        Outcome("micro-batches computed twice", str(repeated), repeated == 0),
        Outcome(
            "samples, pixels and mix of each micro-batch",
            f"{len(expected)} equal" if not differing else f"{len(differing)} differ, first at {differing[0]}",
            not differing and bool(expected),
        ),
        Outcome(
            "metric rows",
            f"{len(expected_rows)} and {len(actual_rows)}, largest difference {worst:.1e}",
            same_steps and (worst == 0.0 if exact else worst <= TOLERANCE),
        ),
        Outcome(
            "weights, optimizer state, BatchNorm, EMA",
            "bit-equal" if equal_state else "not bit-equal" + ("" if exact else " (different hosts, or GPUs)"),
            equal_state or not exact,
        ),
    ]


def _on(gpus: int) -> tuple[Override, ...]:
    return (("job.gpus_per_node", gpus), ("train.deterministic", bool(gpus)))


def _submit(runs: Path, job: str, overrides: Sequence[Override], data: Path) -> Run:
    request = Request(job=job, data=str(data), runs=str(runs), overrides=(*CHANGES, *overrides))
    submitted = plan(SweepFile(name="selftest", grid=(Grid(recipes=(RECIPE,)),)), None, request, is_sweep=False)
    make_missing_shards(planned.data for planned in submitted.runs if planned.should_submit)
    submit(submitted)
    return submitted.runs[0].run


def _states(statuses: list[Status]) -> str:
    return ", ".join(f"{s.url}: {s.state} {s.cause}".strip() for s in statuses)


def _micro_batches(run: Run) -> tuple[dict[tuple[int, int], MicroBatch], int]:
    """Return each micro-batch by step and virtual rank, and how many were computed more than once.

    Raises:
        StorageError: Two attempts computed the same micro-batch with different content.
    """
    found: dict[tuple[int, int], MicroBatch] = {}
    computed = 0
    for attempt in run.attempt_numbers():
        theirs = sample_log.micro_batches(run, attempt)
        computed += len(theirs)
        for key, content in theirs.items():
            if found.setdefault(key, content) != content:
                raise StorageError(
                    f"{run.url}: two attempts had different samples, pixels or mixes at (step, virtual rank) {key}."
                )
    return found, computed - len(found)


def _last_step(run: Run) -> int:
    return max((line["step"] for line in sample_log.lines(run)), default=-1)


def _rows(run: Run) -> list[dict[str, Any]]:
    return [row for row in read_rows(run) if row["kind"] in ("train", "eval")]


def _difference(expected: dict[str, Any], actual: dict[str, Any]) -> float:
    """Return the larger of the relative differences of loss and top-1 of two rows."""
    pairs = [(expected[key], actual[key]) for key in ("loss", "top1") if key in expected]
    return max((float(abs(a - b) / max(abs(a), 1e-9)) for a, b in pairs), default=0.0)


def _final_state(run: Run) -> dict[str, str]:
    """Return the checksum of each part of the state in the last checkpoint."""
    store = run.store.child("checkpoints")
    saved = checkpoint.list_checkpoints(store, {a.number: a.start_step for a in run.attempts()})[-1]
    files = store.read_json(f"{saved.folder}/{checkpoint.MANIFEST}")["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
