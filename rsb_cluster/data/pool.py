"""Maps a function over many shards, in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from rsb_cluster.errors import RsbError

Result = TypeVar("Result")

_ROWS_PER_PROCESS = 4  # at least: starting a process takes seconds if it imports torchvision


def parallel_map(function: Callable[..., Result], *columns: Sequence[Any], workers: int | None) -> Iterator[Result]:
    """Yield ``function(*row)`` for each row of the columns, in their order, whatever the number of processes.

    Args:
        function: The function; it and its arguments can be pickled.
        columns: Its arguments, of equal length.
        workers: Maximum number of processes; 1 calls the function in this one. None: one per core, fewer for few rows.
            They are spawned, so a script that uses them needs the usual ``if __name__ == "__main__"``.

    Raises:
        RsbError: A process was killed (most likely out of memory). Errors of the function are raised as well.
    """
    rows = len(columns[0])
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), rows // _ROWS_PER_PROCESS)
    if min(workers, rows) <= 1:
        yield from map(function, *columns)
        return
    # Spawned, not forked: the S3 client's threads and connections do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, rows), context, initializer=_live_and_die_with_the_parent) as pool:
        try:
            yield from pool.map(function, *columns)
        except BrokenProcessPool as error:
            raise RsbError(
                "a worker process was killed, most likely because it ran out of memory. Try again with fewer --workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _live_and_die_with_the_parent() -> None:
    """Ignore Ctrl-C, which the parent handles, and exit with the parent even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
