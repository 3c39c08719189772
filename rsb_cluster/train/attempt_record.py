"""What the run's folder says of an attempt: how it ended, and which ranks were the cause."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
import traceback
from collections.abc import Sequence
from typing import Any

from rsb_cluster.config.job import Job
from rsb_cluster.errors import StorageError
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.runs.lease import Lease
from rsb_cluster.runs.run import Cause, Run
from rsb_cluster.storage.redact import redact
from rsb_cluster.train.causes import OOM_HINT, oom_kills
from rsb_cluster.train.state import Progress
from rsb_cluster.train.watchdog import StalledRank, Watchdog

log = logging.getLogger(__name__)


class AttemptRecord:
    """The record of an attempt, as one rank writes it.

    Rank 0 writes how the attempt ended; in its place another rank if rank 0 cannot. What is not known when a rank
    starts is set later.

    Args:
        run: The run.
        job: The job.
        ranks: The rank of this process.

    Attributes:
        ranks: The rank of this process.
        lease: The attempt; on rank 0 only.
        number: The attempt's number; 0 before it has one.
        progress: Of the training, once there is one.
        oom_kills: The kernel's OOM kills on this host before the attempt.
    """

    def __init__(self, run: Run, job: Job, ranks: Ranks) -> None:
        self._run, self._job, self.ranks = run, job, ranks
        self.lease: Lease | None = None
        self.number = 0
        self.progress: Progress | None = None
        self.oom_kills = oom_kills()

    def step(self) -> int:
        """Return the step at which this rank is."""
        if self.progress is not None:
            return self.progress.step
        return self.lease.record.start_step if self.lease else 0

    def end(self, cause: Cause, message: str) -> None:
        """Record the end of the attempt, on rank 0."""
        if self.lease is None or self.lease.record.cause not in ("", "finished") or self.lease.record.cause == cause:
            return  # "finished" is overwritten if result.json could not be written
        self.lease.release()
        if cause in ("lost peer", "stuck", "superseded") and self._run.attempt(self.number).cause:
            return  # a peer has recorded it while this rank was unreachable or suspended, and knows more
        if cause == "lost peer":
            # The lost peer's own report explains more.
            for failure in self._run.rank_failures(self.number).values():
                cause, message = failure["cause"], failure["message"]
        cause, message = self._with_notices(cause, message)
        self.update(ended=time.time(), end_step=self.step(), cause=cause, message=message)

    def _with_notices(self, cause: Cause, message: str) -> tuple[Cause, str]:
        """Add the interruption notices of this attempt to its end; a peer lost after a notice was preempted."""
        if not self._job.notice or cause not in ("preempted", "lost peer"):
            return cause, message
        notices = [
            f"{notice['source']} reclaims {host} at {time.strftime('%H:%M:%S UTC', time.gmtime(notice['deadline']))}"
            for host, notice in self._run.notices(self.number).items()
        ]
        return ("preempted" if notices else cause), "; ".join([*notices, *filter(None, [message])])

    def update(self, **values: Any) -> None:
        """Change fields of the attempt's record, on rank 0."""
        assert self.lease is not None
        self.lease.record = self.lease.record.model_copy(update=values)
        self._run.check_exists()
        self._run.write_attempt(self.lease.record)

    def end_for_rank_0(self, cause: Cause, message: str) -> None:
        """Record the end of the attempt in place of rank 0, which cannot."""
        record = self._run.attempt(self.number)  # raises if the folder is gone
        if not record.cause:
            cause, message = self._with_notices(cause, message)
            # This rank's step, as all ranks are at the same step and rank 0's last heartbeat may be some steps old.
            values = {
                "ended": time.time(),
                "end_step": max(record.start_step, self.step()),
                "cause": cause,
                "message": message,
            }
            self._run.write_attempt(record.model_copy(update=values))

    def resolve_lost_peer(self) -> Cause:
        """Return the cause with which another rank ended the attempt permanently, if one did; else "lost peer".

        Otherwise this rank's exit code would request a restart, which counts if each node has its own exit code.
        """
        with contextlib.suppress(StorageError):
            causes = [self._run.attempt(self.number).cause] if self.number else []
            causes += [failure["cause"] for failure in self._run.rank_failures(self.number).values()]
            return next((cause for cause in causes if cause in ("failed", "stopped")), "lost peer")
        return "lost peer"

    def report_lost_peers(self, watchdog: Watchdog) -> None:
        """Report the lost ranks that could not report their failure themselves."""
        if self._run.rank_failures(self.number):
            return
        if self.ranks.rank and (watchdog.reaches_rank_0() or self._run.attempt(self.number).cause):
            return  # rank 0 reports it
        lost = watchdog.find_lost()
        self._record_suspects("lost peer", lost)
        if any(suspect.rank == 0 for suspect in lost):
            self.end_for_rank_0("lost peer", "; ".join(self._describe(suspect) for suspect in lost))

    def _record_suspects(self, cause: Cause, suspects: Sequence[StalledRank]) -> None:
        """Record the ranks that are the cause of an end, if they could not do so themselves."""
        known = self._run.rank_failures(self.number)
        for suspect in suspects:
            if suspect.rank not in known:
                message = self._describe(suspect)
                log.error("%s", message)
                failure = {"cause": cause, "message": message, "host": suspect.host, "traceback": redact(suspect.stack)}
                self._run.check_exists()
                self._run.write_rank_failure(self.number, suspect.rank, failure)

    def _describe(self, suspect: StalledRank) -> str:
        if suspect.host == socket.gethostname() and oom_kills() > self.oom_kills:
            return suspect.message + OOM_HINT
        return suspect.message

    def report_suspects(self, cause: Cause, suspects: Sequence[StalledRank]) -> None:
        """Record the ranks that ended the attempt; called by the watchdog on its own thread, as the main one waits."""
        with contextlib.suppress(StorageError):
            self._record_suspects(cause, suspects)
            message = "; ".join(map(self._describe, suspects))
            if self.lease is not None:
                self.end(cause, message)
            else:
                self.end_for_rank_0(cause, message)

    def report_failure(self, cause: Cause, message: str, error: Exception) -> None:
        """Report a failure of this rank."""
        text = "".join(traceback.format_exception(error))
        log.error("%s", text)
        message = f"rank {self.ranks.rank}: {message}"
        failure = {"cause": cause, "message": message, "host": socket.gethostname(), "traceback": redact(text)}
        self._run.check_exists()
        self._run.write_rank_failure(self.number, self.ranks.rank, failure)
        if self.lease is None:
            # Rank 0 may never notice the failure: under NCCL it waits for this rank until it is killed.
            self.end_for_rank_0(cause, message)
