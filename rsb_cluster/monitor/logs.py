"""The log of a rank: the job's log that the scheduler writes, or an attempt's log in the run's folder."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator

from rsb_cluster.backends import backend_of
from rsb_cluster.errors import ConfigError, MissingError, plural
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store

POLL_S = 0.5
POLL_REMOTE_S = 5.0  # an object store, to which nodes upload logs in pieces
ASK_S = 60.0  # between two questions to an engine, why there is nothing to read


def read_log(
    run: Run, *, rank: int, attempt: int, follow: bool, tell: Callable[[str], None] = lambda text: None
) -> Iterator[str]:
    """Yield a rank's log in pieces.

    Args:
        run: The run.
        rank: The rank.
        attempt: The attempt, from 1; 0 for all attempts of the job that was submitted last.
        follow: Wait for more until the job has ended.
        tell: Called with what the job waits for while there is nothing to read, whenever that changes.

    Raises:
        ConfigError: There is no such log.
    """
    if attempt:
        yield _attempt_log(run, rank, attempt)
        return
    submissions = run.submissions()
    if not submissions:
        raise ConfigError(f"{run.run_id} was never submitted.")
    last = submissions[-1]
    backend = backend_of(last)
    offset, told, asked = 0, "", -ASK_S
    while True:
        ended = not follow or backend.has_ended(run, last)
        piece = backend.read_log(run, last, rank, offset)
        if piece is not None:
            offset += len(piece)
            yield piece.decode(errors="replace")
        elif ended:
            hint = _where_else(run, rank)
            wait = f"{waiting}. " if (waiting := backend.describe_wait(last)) else ""
            raise ConfigError(
                f"there is no log of rank {rank} in {last.folder}. {hint} {wait}{backend.log_hint(last)}".rstrip()
            )
        if ended:
            return
        if not piece and time.monotonic() - asked >= ASK_S:
            asked, before = time.monotonic(), told
            if (told := backend.describe_wait(last)) != before:
                tell(told)
        time.sleep(POLL_S if Store(last.folder).is_local else POLL_REMOTE_S)


def _where_else(run: Run, rank: int) -> str:
    """Return why the log of a run's last job is not there, or where there are others."""
    kept = [int(name[:4]) for name in run.store.names("logs") if name[4:] == f"-rank{rank:05d}.log"]
    if kept:
        return f"The run's folder has that of attempt {', '.join(map(str, kept))}: --attempt {kept[-1]}."
    if run.attempt_numbers():
        return "It was removed, as 'runs prune' does, or this machine does not see that folder."
    return "The job has not started yet."


def last_lines(pieces: Iterator[str], number: int) -> Iterator[str]:
    """Yield the pieces of a log, of the first of them only the last lines; the others come as the log grows."""
    for text in itertools.islice(pieces, 1):
        lines = text.splitlines(keepends=True)
        yield "".join(lines[len(lines) - number :] if number < len(lines) else lines)
    yield from pieces


def _attempt_log(run: Run, rank: int, attempt: int) -> str:
    """Return the log of a rank in an attempt; of one that runs, or was killed, its part of the job's log."""
    name = f"logs/{attempt:04d}-rank{rank:05d}.log"
    try:
        return run.store.read_bytes(name).decode(errors="replace")
    except MissingError:
        pass
    record = next((a for a in run.attempts() if a.number == attempt), None)
    if record is None:
        raise ConfigError(f"{run.run_id} has no attempt {attempt}, but {len(run.attempts())}.")
    for submission in run.submissions():
        if submission.job_id == record.job_id:
            content = backend_of(submission).read_log(run, submission, rank, 0) or b""
            part = _part_of(content.decode(errors="replace"), attempt, rank)
            if part:
                return part
    raise ConfigError(
        f"{run.run_id} has no log of rank {rank} in attempt {attempt}, which had {plural(record.world_size, 'rank')}. "
        "If it was killed, its log is among the scripts and logs of its job, unless these were removed."
    )


def _part_of(log: str, attempt: int, rank: int) -> str:
    """Return the lines of an attempt in the log of a job, which begins each with ``attempt 2, rank 0 of 8 on ...``."""
    begin = re.compile(rf" rank{rank} attempt (\d+), rank {rank} of ")
    lines = log.splitlines(keepends=True)
    starts = [(i, int(match[1])) for i, line in enumerate(lines) if (match := begin.search(line))]
    found = [i for i, number in starts if number == attempt]
    if not found:
        return ""
    end = next((i for i, number in starts if number > attempt), len(lines))
    return "".join(lines[found[-1] : end])
