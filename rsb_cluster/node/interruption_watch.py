"""Watches for the cloud's interruption notice, on one rank of each node.

The watch is a thread of the rank and not a process of the node, so it works on Slurm, where srun starts the ranks, as
well as in a cloud, where our node process does. It only sets the rank's stop flag, which reaches the other ranks in the
collective of every step. No rank stops because of a file, so neither a notice of an earlier attempt nor anything that a
reclaimed machine still writes can stop a later attempt.

An attempt that starts on a machine with a pending notice (the scheduler may not know of it) stops after one step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from rsb_cluster.node import interruption
from rsb_cluster.node.interruption import Notice
from rsb_cluster.node.stopping import StopFlag

log = logging.getLogger(__name__)

# Amazon recommends five seconds; that is too long for Google's notices of 30 seconds.
POLL_S = 2.0
# The metadata service of a machine that has just booted may not answer at once.
TRIES = 5


class NoticeWatch(threading.Thread):
    """Polls the metadata service until there is a notice.

    Args:
        source: ``job.notice``: the cloud, or ``auto``.
        flag: The stop flag that a notice sets.
        on_notice: Called with the notice after the flag is set, on this thread.
    """

    def __init__(self, source: str, flag: StopFlag, on_notice: Callable[[Notice], None]) -> None:
        super().__init__(name="notices", daemon=True)
        self._name, self._flag, self._on_notice = source, flag, on_notice

    def run(self) -> None:
        """Poll until there is a notice; return at once if no metadata service answers."""
        source = self._find()
        if source is None:
            log.warning(
                "job.notice = %s: no such metadata service answers, so preemptions will come without notice",
                self._name,
            )
            return
        log.info("watching for %s's interruption notices", source.name)
        while (notice := source.poll()) is None:
            time.sleep(POLL_S)
        left_s = notice.deadline - time.time()
        log.warning("%s reclaims this machine in %.0f s: %s", notice.source, left_s, notice.text.strip())
        self._flag.reclaim(left_s)
        self._on_notice(notice)

    def _find(self) -> interruption.NoticeSource | None:
        for _ in range(TRIES):
            if (source := interruption.find_source(self._name)) is not None:
                return source
            time.sleep(POLL_S)
        return None
