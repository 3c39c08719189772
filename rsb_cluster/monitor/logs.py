"""The log of a rank: the job's log that the scheduler writes, or an attempt's log in the run's folder."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rsb_cluster.backends import backend_of
from rsb_cluster.errors import ConfigError, MissingError
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store

POLL_S = 0.5
POLL_REMOTE_S = 5.0  # an object store, to which nodes upload logs in pieces


def read_log(run: Run, *, rank: int, attempt: int, follow: bool) -> Iterator[str]:
    """Yield a rank's log in pieces.

    Args:
        run: The run.
        rank: The rank.
        attempt: The attempt, from 1; 0 for all attempts of the job that was submitted last.
        follow: Wait for more until the job has ended.

    Raises:
        ConfigError: There is no such log.
    """
    if attempt:
        name = f"logs/{attempt:04d}-rank{rank:05d}.log"
        try:
            yield run.store.read_bytes(name).decode(errors="replace")
        except MissingError as error:
            raise ConfigError(
                f"{run.run_id} has no log of rank {rank} in attempt {attempt}, or the attempt is still running."
            ) from error
        return
    submissions = run.submissions()
    if not submissions:
        raise ConfigError(f"{run.run_id} was never submitted.")
    last = submissions[-1]
    backend = backend_of(last)
    offset = 0
    while True:
        ended = not follow or backend.has_ended(run, last)
        piece = backend.read_log(run, last, rank, offset)
        if piece is not None:
            offset += len(piece)
            yield piece.decode(errors="replace")
        elif ended:
            kept = run.store.names("logs")
            hint = f"The run's folder holds: {', '.join(kept)}." if kept else "The job has not started yet."
            raise ConfigError(
                f"there is no log of rank {rank} in {last.folder}. {hint} {backend.log_hint(last)}".rstrip()
            )
        if ended:
            return
        time.sleep(POLL_S if Store(last.folder).is_local else POLL_REMOTE_S)
