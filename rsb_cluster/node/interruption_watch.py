"""Watches for the cloud's word that it takes this machine back, on one rank of each node.

It is a thread of the rank and not a process of the node: so it is the same on Slurm, where srun starts the ranks, as in
a cloud, where our own node process does. The rank's stop flag is all that it needs, and travels to the other ranks in
the collective that every step has. No rank stops because of a file, so no notice of an earlier attempt,
and nothing that a doomed machine still writes, can stop a later one.

An attempt that starts on a machine that is announced to go (the scheduler may know nothing of it) stops after one step.
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

# Amazon advises five seconds; of Google's thirty that would be much.
POLL_S = 2.0
# The metadata service of a machine that has just started may not answer at once.
TRIES = 5


class NoticeWatch(threading.Thread):
    """Asks the metadata service until there is a notice.

    Args:
        source: ``job.notice``: which cloud, or ``auto``.
        flag: Is set by a notice.
        on_notice: Called with it afterwards, on this thread.
    """

    def __init__(self, source: str, flag: StopFlag, on_notice: Callable[[Notice], None]) -> None:
        super().__init__(name="notices", daemon=True)
        self._name, self._flag, self._on_notice = source, flag, on_notice

    def run(self) -> None:
        """Watch until there is a notice, or it is clear that there can be none."""
        source = self._find()
        if source is None:
            log.warning(
                "job.notice = %s: no metadata service of that kind answers; a preemption will come unannounced",
                self._name,
            )
            return
        log.info("watching for %s's interruption notices", source.name)
        while (notice := source.poll()) is None:
            time.sleep(POLL_S)
        left_s = notice.deadline - time.time()
        log.warning("%s takes this machine back in %.0f s: %s", notice.source, left_s, notice.text.strip())
        self._flag.reclaim(left_s)
        self._on_notice(notice)

    def _find(self) -> interruption.NoticeSource | None:
        for _ in range(TRIES):
            if (source := interruption.find_source(self._name)) is not None:
                return source
            time.sleep(POLL_S)
        return None
