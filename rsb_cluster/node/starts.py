"""Failed starts: starts of a job that end before they become an attempt, such as a failed import of torch.

A failed start has no number, so the rules for attempts (`rsb_cluster.runs.lease`) do not apply to it. What starts the
ranks counts it: the job script on Slurm, the controller on this machine, SkyPilot in a cloud. ``LIMIT`` failed starts
in a row end the job. The ranks write the reason into the run's folder or, if that cannot be written, into the job's
folder of scripts and logs, which has these files of a job:

- ``<job id>_claimed``: the number of the last start that became an attempt
- ``<job id>_ended``: the number of the start that ended the run permanently
- ``<job id>_starts``: a line for each failed start in a row: its number and its exit code
- ``<job id>_start.json``: why the last start failed
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
from rsb_cluster.errors import AccessError, MissingError, StorageError
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.runs.run import Attempt, Run, Submission
from rsb_cluster.storage.redact import redact
from rsb_cluster.storage.store import Store

LIMIT = 5
# Delay before the second start; it doubles with each further one.
SLURM_DELAY_S = 30
LOCAL_DELAY_S = 5

CLAIMED, ENDED, STARTS = "claimed", "ended", "starts"


class FailedStart(Section):
    """A rank's report of a failed start."""

    job_id: str
    restart: int = Field(description="how often the scheduler had started the job again")
    host: str
    time: float
    message: str
    host_fault: bool = Field(False, description="whether the host is to blame: another may do")


def record(event: str, ranks: Ranks) -> None:
    """Record for the parent of the ranks that this start became an attempt (CLAIMED) or ended the run (ENDED)."""
    with contextlib.suppress(OSError):
        if (path := _path(ranks.job_id, event)) is not None:
            path.write_text(f"{ranks.restart}\n")
            if event == CLAIMED:
                path.with_name(f"{ranks.job_id}_{STARTS}").unlink(missing_ok=True)


def is_recorded(folder: Path, job_id: str, event: str, restart: int) -> bool:
    """Whether an event of a start is recorded."""
    with contextlib.suppress(OSError):
        return (folder / f"{job_id}_{event}").read_text().strip() == str(restart)
    return False


def report(run: Run, ranks: Ranks, message: str, *, is_cause: bool = True, host_fault: bool = False) -> None:
    """Report why a start failed.

    Args:
        run: The run.
        ranks: The reporting rank.
        message: What happened.
        is_cause: False for a rank that only lost its peers: the report of another rank explains more, and is kept.
        host_fault: Whether this host is to blame. Such a report may also be of a start that became an attempt.
    """
    failed = FailedStart(
        job_id=ranks.job_id, restart=ranks.restart, host=socket.gethostname(), time=time.time(),
        message=redact(message), host_fault=host_fault,
    )  # fmt: skip
    keep = Store.write_json if is_cause else Store.create_json
    with contextlib.suppress(StorageError):
        if run.exists():  # a deleted folder must not be created again
            keep(
                run.store,
                f"attempts/start-{failed.job_id}-{failed.restart:04d}.json",
                failed.model_dump(mode="json", exclude_defaults=True),
            )
            return
    if (path := _path(ranks.job_id, "start.json")) is not None:
        with contextlib.suppress(StorageError):
            keep(Store(path.parent), path.name, failed.model_dump(mode="json"))


def report_beside_logs(folder: Path, job_id: str, message: str) -> None:
    """Report why no rank of a job was started, in the job's folder of scripts and logs."""
    failed = FailedStart(job_id=job_id, restart=0, host=socket.gethostname(), time=time.time(), message=redact(message))
    with contextlib.suppress(StorageError):
        Store(folder).write_json(f"{job_id}_start.json", failed.model_dump(mode="json"))


def list_failed(folder: Path, job_id: str, restart: int, code: int) -> None:
    """Append a failed start to the list in the job's folder of scripts and logs, for ``status``."""
    with contextlib.suppress(OSError), (folder / f"{job_id}_{STARTS}").open("a") as file:
        file.write(f"{restart} {code}\n")


def is_last(ranks: Ranks) -> bool:
    """Whether no other start follows this failed one, as what starts the ranks has counted ``LIMIT - 1`` before it."""
    path = _path(ranks.job_id, STARTS)
    return path is not None and len(_read_failed(path)) >= LIMIT - 1


def describe(run: Run, attempts: Sequence[Attempt], submissions: Sequence[Submission]) -> str:
    """Return why the last start of a run's last job failed; empty if it became an attempt, or nothing is known."""
    if not submissions:
        return ""
    job, last = submissions[-1], attempts[-1] if attempts else None
    last_restart = last.restart if last is not None and last.job_id == job.job_id else -1
    if last is not None and last.job_id != job.job_id and last.started > job.time:
        return ""  # an earlier job still runs
    folder = Path(job.folder) if Store(job.folder).is_local else None
    names = [name for name in run.store.files("attempts") if name.startswith(f"attempts/start-{job.job_id}-")]
    reports = [_read_report(run.store, name) for name in names[-1:]]
    if folder is not None:
        reports.append(_read_report(Store(folder), f"{job.job_id}_start.json"))
    newer = (report for report in reports if report is not None and report.restart > last_restart)
    failed = max(newer, key=lambda report: report.restart, default=None)
    listed = _read_failed(folder / f"{job.job_id}_{STARTS}") if folder is not None else []
    codes = [code for restart, code in listed if restart > last_restart]
    if failed is None and not codes:
        return ""
    which = f"{len(codes)} starts in a row" if len(codes) > 1 else "the last start"
    why = f"{failed.message} ({failed.host})" if failed else f"exit code {codes[-1]}; see its log"
    return f"{which} failed before training: {why}"


def _path(job_id: str, what: str) -> Path | None:
    """Return the path of a job's file in its folder of scripts and logs; None if submitit names no such folder."""
    folder = os.environ.get("SUBMITIT_FOLDER")
    return Path(folder) / f"{job_id}_{what}" if folder else None


def _read_report(store: Store, name: str) -> FailedStart | None:
    try:
        return read_record(FailedStart, store.read_json(name), store.locate(name))
    except (MissingError, AccessError):  # scripts and logs may be private where the run is shared
        return None


def _read_failed(path: Path) -> list[tuple[int, int]]:
    """Return the number and the exit code of each listed start."""
    with contextlib.suppress(OSError):
        words: list[Any] = [line.split() for line in path.read_text().splitlines()]
        return [(int(number), int(code)) for number, code in words]
    return []
