"""Starts of a job that end before they are an attempt: torch cannot be imported, there is no GPU, a disk is full.

Such a start has no number, so the rules for attempts (`rsb_cluster.runs.lease`) do not see it. Whoever starts the ranks
counts it: the job script on Slurm, the controller on this machine, the engine in a cloud. After ``LIMIT`` in a row that
is the end. What the ranks know of the reason goes into the run's folder or, where that is what is broken, into the
job's folder of scripts and logs. There lie, of a job:

- ``<job id>_claimed``: the number of the last start that became an attempt
- ``<job id>_ended``: the number of the start that ended the run for good
- ``<job id>_starts``: a line for each start in a row that became no attempt: its number, and its exit code
- ``<job id>_start.json``: why the last of them failed
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from rsb_cluster.config.schema import Section, read_record
from rsb_cluster.errors import MissingError, StorageError
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.runs.run import Attempt, Run, Submission
from rsb_cluster.storage.redact import redact
from rsb_cluster.storage.store import Store

LIMIT = 5
# Waiting before the second start; each further one waits twice as long.
SLURM_DELAY_S = 30
LOCAL_DELAY_S = 5

CLAIMED, ENDED, STARTS = "claimed", "ended", "starts"


class FailedStart(Section):
    """What a rank said of a start that became no attempt."""

    job_id: str
    restart: int = Field(description="how often the scheduler had started the job again")
    host: str
    time: float
    message: str


def note(what: str, ranks: Ranks) -> None:
    """Leave word for who started the ranks that this start was claimed, or has ended the run for good."""
    with contextlib.suppress(OSError):
        if (path := _path(ranks.job_id, what)) is not None:
            path.write_text(f"{ranks.restart}\n")
            if what == CLAIMED:
                path.with_name(f"{ranks.job_id}_{STARTS}").unlink(missing_ok=True)


def is_noted(folder: Path, job_id: str, what: str, restart: int) -> bool:
    """Whether such a word of a start is there."""
    with contextlib.suppress(OSError):
        return (folder / f"{job_id}_{what}").read_text().strip() == str(restart)
    return False


def report(run: Run, ranks: Ranks, message: str, *, is_cause: bool = True) -> None:
    """Say why a start became no attempt.

    Args:
        run: The run.
        ranks: Who says so.
        message: What happened.
        is_cause: False for a rank that only misses its peers: what another said is the better explanation, and stays.
    """
    failed = FailedStart(
        job_id=ranks.job_id, restart=ranks.restart, host=socket.gethostname(), time=time.time(), message=redact(message)
    )
    keep = Store.write_json if is_cause else Store.create_json
    with contextlib.suppress(StorageError):
        if run.exists():  # a folder that is gone is not to come back as one that holds nothing else
            keep(run.store, f"attempts/start-{failed.job_id}-{failed.restart:04d}.json", failed.model_dump(mode="json"))
            return
    if (path := _path(ranks.job_id, "start.json")) is not None:
        with contextlib.suppress(StorageError):
            keep(Store(path.parent), path.name, failed.model_dump(mode="json"))


def list_failed(folder: Path, job_id: str, restart: int, code: int) -> None:
    """List a start that became no attempt for ``status``, in the job's folder of scripts and logs."""
    with contextlib.suppress(OSError), (folder / f"{job_id}_{STARTS}").open("a") as file:
        file.write(f"{restart} {code}\n")


def describe(run: Run, attempts: Sequence[Attempt], submissions: Sequence[Submission]) -> str:
    """Return why the last start of a run's last job became no attempt; empty where it did, or nothing is known."""
    if not submissions:
        return ""
    job, last = submissions[-1], attempts[-1] if attempts else None
    began = last.restart if last is not None and last.job_id == job.job_id else -1
    if last is not None and last.job_id != job.job_id and last.started > job.time:
        return ""  # an earlier job is still at work
    folder = Path(job.folder) if Store(job.folder).is_local else None
    said = [name for name in run.store.files("attempts") if name.startswith(f"attempts/start-{job.job_id}-")]
    found = [_read(run.store, name) for name in said[-1:]]
    if folder is not None:
        found.append(_read(Store(folder), f"{job.job_id}_start.json"))
    failed = max((f for f in found if f is not None and f.restart > began), key=lambda f: f.restart, default=None)
    lines = _lines(folder / f"{job.job_id}_{STARTS}") if folder is not None else []
    lines = [line for line in lines if line[0] > began]
    if failed is None and not lines:
        return ""
    times = f"{len(lines)} starts in a row" if len(lines) > 1 else "the last start"
    why = f"{failed.message} ({failed.host})" if failed else f"exit code {lines[-1][1]}; see its log"
    return f"{times} failed before training: {why}"


def _path(job_id: str, what: str) -> Path | None:
    """Return a file of a job in its folder of scripts and logs, which submitit names; None where it has none."""
    folder = os.environ.get("SUBMITIT_FOLDER")
    return Path(folder) / f"{job_id}_{what}" if folder else None


def _read(store: Store, name: str) -> FailedStart | None:
    try:
        return read_record(FailedStart, store.read_json(name), store.locate(name))
    except MissingError:
        return None


def _lines(path: Path) -> list[tuple[int, int]]:
    """Return number and exit code of each start that a job's file lists."""
    with contextlib.suppress(OSError):
        words: list[Any] = [line.split() for line in path.read_text().splitlines()]
        return [(int(number), int(code)) for number, code in words]
    return []
