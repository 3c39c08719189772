"""The logs of a cloud run. They are in its folder, and can be read without SkyPilot and after the nodes are gone."""

from __future__ import annotations

from rsb_cluster.errors import MissingError
from rsb_cluster.runs.run import Run


def read_log(run: Run, job_id: str, rank: int, start: int) -> bytes | None:
    """Return a rank's log from a byte offset, all attempts of a submission in a row; None if there is none."""
    found = []
    for attempt in run.attempts():
        if attempt.job_id == job_id:
            try:
                found.append(run.store.read_bytes(f"logs/{attempt.number:04d}-rank{rank:05d}.log"))
            except MissingError:
                continue  # its node had no time to upload it
    return b"".join(found)[start:] if found else None
