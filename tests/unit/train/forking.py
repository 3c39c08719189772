"""Processes that a program forks after it has imported torch once."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def fork(processes: int, work: Callable[[int], None]) -> bool:
    """Do the work of each rank in a process of its own; return whether none of them failed."""
    children = []
    for rank in range(processes):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                work(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    return not any(statuses)
