"""Metrics: rows keyed by step, written in chunks by each attempt, and read without duplicate steps."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from rsb_cluster.errors import StorageError
from rsb_cluster.runs.run import Attempt, Run
from rsb_cluster.storage.store import Store

MetricsRow = dict[str, Any]

# Object stores cannot append, so a chunk is rewritten at each flush, up to this size; one object per flush would leave
# a hundred thousand small objects.
CHUNK_BYTES = 256 * 1024

_CHUNK = re.compile(r"metrics/(\d+)-\d+\.jsonl")

# Values of a row that are numbers where it has them.
_NUMBERS = ("step", "epoch", "time", "loss", "images_per_s", "data_wait_s", "top1", "top5")


class MetricsWriter:
    """Writes the rows of one attempt. The training loop adds rows while another thread flushes them.

    Args:
        store: The run's folder.
        attempt: Number of the attempt, from 1.

    Attributes:
        forward: Called with the rows of each flush, if it is set.
    """

    def __init__(self, store: Store, attempt: int) -> None:
        self._store = store
        self._attempt = attempt
        self._chunk = 0
        self._lock = threading.Lock()
        self._lines: list[str] = []  # of the current chunk, written lines first
        self._new: list[MetricsRow] = []  # not written yet
        self.forward: Callable[[list[MetricsRow]], None] | None = None

    def add(self, row: MetricsRow) -> None:
        """Add a row, which the next flush writes."""
        line = json.dumps(row)
        with self._lock:
            self._lines.append(line)
            self._new.append(row)

    def flush(self) -> None:
        """Write the rows that were added since the last successful flush."""
        with self._lock:
            new, lines = self._new[:], self._lines[:]
        if not new:
            return
        name = f"metrics/{self._attempt:04d}-{self._chunk:06d}.jsonl"
        content = ("\n".join(lines) + "\n").encode()
        self._store.write_bytes(name, content)
        del self._new[: len(new)]
        if self.forward is not None:
            self.forward(new)
        if len(content) >= CHUNK_BYTES:
            self._chunk += 1
            del self._lines[: len(lines)]


def chunks(run: Run) -> list[tuple[str, int]]:
    """Return a run's files of metrics, oldest first, and the number of the attempt that wrote each."""
    found = ((name, _CHUNK.fullmatch(name)) for name in run.store.files("metrics"))
    return [(name, int(match[1])) for name, match in found if match]


def read_chunk(run: Run, name: str) -> Iterator[MetricsRow]:
    """Yield the rows of a file of metrics. Raises StorageError at a line that is none."""
    for number, line in enumerate(run.store.read_bytes(name).splitlines(), 1):
        yield _parse(line, run.store.locate(name), number)


def _parse(line: bytes, where: str, number: int) -> MetricsRow:
    """Return the row in a line, which is none where the file was cut off as it was copied, or edited by hand."""
    row: Any = None
    with suppress(ValueError, RecursionError):
        row = json.loads(line)
    if not (
        isinstance(row, dict)
        and {"kind", "step"} <= row.keys()
        and all(isinstance(row.get(name, 0), int | float) for name in _NUMBERS)
    ):
        raise StorageError(
            f"line {number} of {where} is no row of metrics: the file was cut off or edited. Restore it, or delete the "
            "line: only 'status', curves and 'compare' need it."
        )
    return row


def read_rows(run: Run, attempts: Sequence[Attempt] | None = None) -> list[MetricsRow]:
    """Return a run's rows in order of step, without those that a later attempt repeated.

    An attempt that was killed may have logged steps after its last checkpoint; the next attempt resumes from that
    checkpoint, and its rows replace the later rows of the killed one. If both logged the step of the checkpoint itself,
    such as an evaluation, the row of the later attempt counts.

    Raises:
        StorageError: A file cannot be read, or has a line that is no row.
    """
    attempts = run.attempts() if attempts is None else attempts
    rows_of: dict[int, list[MetricsRow]] = {}
    for name, number in chunks(run):
        rows_of.setdefault(number, []).extend(row | {"attempt": number} for row in read_chunk(run, name))
    kept: list[MetricsRow] = []
    limit: float = float("inf")
    seen: set[tuple[Any, int]] = set()
    for attempt in sorted(attempts, key=lambda a: -a.number):
        rows = [row for row in rows_of.get(attempt.number, []) if row["step"] <= limit]
        kept = [row for row in rows if (row.get("kind"), row["step"]) not in seen] + kept
        seen |= {(row.get("kind"), row["step"]) for row in rows}
        limit = min(limit, attempt.start_step)
    return kept


def last_rows(run: Run, attempts: Sequence[Attempt]) -> dict[str, MetricsRow]:
    """Return the last training row and the last evaluation row of ``read_rows``, by kind.

    Reads from the end and stops when it has both, as the status of a thousand runs must not read all their metrics.

    Raises:
        StorageError: As `read_rows`.
    """
    names = chunks(run)
    found: dict[str, MetricsRow] = {}
    limit: float = float("inf")
    for attempt in sorted(attempts, key=lambda a: -a.number):
        for name in reversed([name for name, number in names if number == attempt.number]):
            lines = enumerate(run.store.read_bytes(name).splitlines(), 1)
            for i, line in reversed(list(lines)):
                row = _parse(line, run.store.locate(name), i) | {"attempt": attempt.number}
                if row["step"] <= limit:
                    found.setdefault(row["kind"], row)
                if found.keys() >= {"train", "eval"}:
                    return found
        limit = min(limit, attempt.start_step)
    return found
