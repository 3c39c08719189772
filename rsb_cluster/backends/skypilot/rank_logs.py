"""The logs of a cloud run lie in its folder: they can be read without the engine, and when the nodes are gone."""

from __future__ import annotations

from rsb_cluster.errors import MissingError
from rsb_cluster.runs.run import Run


def read_log(run: Run, job_id: str, rank: int, start: int) -> bytes | None:
    """Return a rank's log from a byte on, all attempts of a submission in a row; None where there is none."""
    found = []
    for attempt in run.attempts():
        if attempt.job_id == job_id:
            try:
                found.append(run.store.read_bytes(f"logs/{attempt.number:04d}-rank{rank:05d}.log"))
            except MissingError:
                continue  # its node had no time to keep it
    return b"".join(found)[start:] if found else None
