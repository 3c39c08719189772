"""The lease of a run: an attempt claims a number that no other attempt has, and the highest number owns the run.

Two attempts of one run can be alive at once: it was submitted twice, or the scheduler presumes an attempt dead that is
only unreachable. The number is a fencing token, claimed by creating the attempt's record exclusively. An attempt that
finds a higher number is fenced off: it writes no more checkpoints and exits. Its earlier checkpoints are in folders of
their own (``checkpoint``).

A job that the scheduler restarts takes over at once, as the scheduler has declared its processes dead. Another job
waits until the holder has sent no heartbeat for a while, and gives up if the holder is alive.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from rsb_cluster.config.job import Job
from rsb_cluster.errors import RsbError, StorageError
from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.run import Attempt, Cause, Heartbeat, Run, RunGoneError
from rsb_cluster.runs.snapshot import write_summary

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
# Heartbeats in a row that find no folder until the attempt gives up: a file system may be away for a moment.
GONE_BEATS = 3
# Heartbeats from one summary to the next: a minute.
SUMMARY_BEATS = 6
# An attempt of another job is presumed dead after this time without a heartbeat; if it is alive, it is fenced off. How
# old its last heartbeat is says nothing: the clocks of two machines may differ by any time.
STALE_S = 40.0

# Causes that usually repeat until the user fixes something.
CRASHES: tuple[Cause | Literal[""], ...] = ("crashed", "stuck")
CRASHES_IN_A_ROW = 2
# Causes of an attempt that was killed, in whole or one rank of it: preempted without grace, on a failed node, or out of
# memory. Some of that is bad luck, so more are allowed. A finished attempt without a result was killed at its end.
KILLS: tuple[Cause | Literal[""], ...] = ("", "lost peer", "finished")
KILLS_IN_A_ROW = 5


class LeaseHeldError(RsbError):
    """Another job is running the run."""


class SupersededError(RsbError):
    """A later attempt has taken the run over."""


class HistoryError(RsbError):
    """The earlier attempts show that another one would fail, too."""


class EndedError(RsbError):
    """This job has ended the run permanently.

    Attributes:
        cause: The cause of its last attempt's end.
    """

    def __init__(self, message: str, cause: Cause) -> None:
        super().__init__(message)
        self.cause = cause


class Lease:
    """A claimed attempt; a thread sends its heartbeats.

    Attributes:
        record: The attempt's record.
        earlier: The earlier attempts, oldest first.
    """

    def __init__(self, run: Run, record: Attempt, earlier: Sequence[Attempt]) -> None:
        self.record, self.earlier = record, earlier
        self._run = run
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def starts(self) -> dict[int, int]:
        """The start step of each earlier attempt, by its number."""
        return {attempt.number: attempt.start_step for attempt in self.earlier}

    def check(self) -> None:
        """Raise SupersededError if a later attempt has taken the run over."""
        later = [number for number in self._run.attempt_numbers() if number > self.record.number]
        if later:
            raise SupersededError(
                f"attempt {later[-1]} has taken this run over; attempt {self.record.number} is fenced off and exits. "
                "The scheduler presumed it dead, or the run was submitted twice."
            )

    def check_exists(self) -> None:
        """Raise RunGoneError if the run's folder is gone."""
        self._run.check_exists()

    def keep_alive(
        self, step: Callable[[], int], superseded: Callable[[], None], gone: Callable[[str], None] = lambda why: None
    ) -> None:
        """Start to send heartbeats.

        Args:
            step: Returns the optimizer steps done; called from the heartbeat's thread.
            superseded: Called once from that thread, when a later attempt has taken the run over.
            gone: Called once from that thread with a message, when the run's folder is gone.
        """
        target = self._send_heartbeats
        self._thread = threading.Thread(target=target, args=(step, superseded, gone), name="heartbeat", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop sending heartbeats."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=HEARTBEAT_S)

    def _send_heartbeats(
        self, step: Callable[[], int], superseded: Callable[[], None], gone: Callable[[str], None]
    ) -> None:
        beats, missed, is_stopping = 0, 0, False
        while True:
            try:
                self.check()
                self._run.check_exists()
                beats += 1
                self._run.write_heartbeat(self.record.number, Heartbeat(beats=beats, step=step(), time=time.time()))
                missed = 0
                if beats % SUMMARY_BEATS == 1:
                    self._write_summary()
                if not is_stopping and self._run.is_stop_requested(self.record.number):
                    is_stopping = True
                    log.info("the user requested that this attempt save and exit")
                    os.kill(os.getpid(), signal.SIGTERM)  # the signal that a scheduler on the node would send
            except SupersededError as error:
                log.error("%s", error)
                superseded()
                return
            except RunGoneError as error:
                missed += 1
                log.warning("%s", error)
                if missed == GONE_BEATS:
                    gone(str(error))
            except StorageError as error:
                log.warning("the heartbeat could not be written: %s", error)
            if self._ended.wait(HEARTBEAT_S):
                return

    def _write_summary(self) -> None:
        """Write the summary, which only saves requests: no failure of it may end the heartbeats."""
        try:
            write_summary(self._run)
        except Exception as error:
            log.warning("the run's summary could not be written: %s", error)


def check_not_ended(run: Run, job_id: str, restart: int) -> None:
    """Refuse another attempt in a job whose last attempt ended permanently.

    The exit code that the scheduler reports may not show this: under NCCL the peers of a failed rank notice nothing
    until they are killed or abort, and the scheduler reports the highest code of all. Every rank calls this, as
    otherwise each would wait for the others.

    Args:
        run: The run.
        job_id: The scheduler's id of the job.
        restart: How often the scheduler has restarted it.

    Raises:
        EndedError: The last attempt of this job ended permanently.
    """
    if not restart:
        return
    for number in reversed(run.attempt_numbers()):
        last = run.attempt(number)
        if last.job_id == job_id:
            break
    else:
        return
    ends: list[tuple[Cause | Literal[""], str]] = [(last.cause, last.message)]
    if not last.cause:  # rank 0 was killed before it recorded the cause
        ends += [(failure["cause"], failure["message"]) for failure in run.rank_failures(number).values()]
    for cause, message in ends:
        if cause in ("failed", "stopped"):
            raise EndedError(
                f"attempt {number} of this job ended the run ({cause}{f': {message}' if message else ''}). This job "
                "makes no further attempt; submit the run again to resume.",
                cause,
            )


def acquire(run: Run, draft: Attempt) -> Lease:
    """Claim the next attempt of a run.

    Args:
        run: The run.
        draft: The attempt's record; its number and start step are set here.

    Raises:
        LeaseHeldError: Another job is running the run.
    """
    while True:
        earlier = run.attempts()
        if earlier:
            _wait_until_dead(run, earlier[-1], draft.job_id)
        starts = {attempt.number: attempt.start_step for attempt in earlier}
        saved = checkpoint.list_checkpoints(run.store.child("checkpoints"), starts)
        record = draft.model_copy(
            update={
                "number": earlier[-1].number + 1 if earlier else 1,
                "start_step": saved[-1].step if saved else 0,
            }
        )
        if run.claim_attempt(record):
            return Lease(run, record, earlier)


def _wait_until_dead(run: Run, last: Attempt, job_id: str) -> None:
    """Return when the last attempt has ended or is presumed dead; at once if it is of the same job."""
    if last.cause or last.job_id == job_id:
        return
    first = run.heartbeat(last.number)
    log.info(
        "attempt %d (job %s) has not recorded its end; waiting %.0f s for a heartbeat",
        last.number, last.job_id, STALE_S,
    )  # fmt: skip
    interval_s = HEARTBEAT_S / 4
    # Counted and not timed: while this process is stopped it sees no heartbeat either.
    for _ in range(math.ceil(STALE_S / interval_s)):
        time.sleep(interval_s)
        if run.attempt(last.number).cause:
            return
        now = run.heartbeat(last.number)
        if now is not None and now != first:
            raise LeaseHeldError(
                f"job {last.job_id} is running this run (attempt {last.number} on {', '.join(last.hosts)}, "
                f"step {now.step}). This job exits and changes nothing; 'rsb-cluster cancel' ends the other."
            )


def check_history(lease: Lease, job: Job) -> None:
    """Refuse an attempt if the earlier ones made no progress.

    Raises:
        HistoryError: The last attempts crashed, or were killed, without a new checkpoint; or the job was preempted more
            than ``job.max_preemptions`` times.
    """
    start, earlier = lease.record.start_step, lease.earlier
    for causes, limit in ((CRASHES, CRASHES_IN_A_ROW), (CRASHES + KILLS, KILLS_IN_A_ROW)):
        last = earlier[-limit:]
        if len(last) == limit and all(a.cause in causes and a.start_step == start for a in last):
            crashed = any(a.cause in CRASHES for a in last)
            killed = any(a.cause in KILLS for a in last)
            what = " or ".join(["crashed"] * crashed + ["were killed (out of memory? a failing node?)"] * killed)
            reason = f" ({last[-1].message})" if last[-1].message else ""
            raise HistoryError(
                f"the last {limit} attempts {what} without a new checkpoint after step {start}{reason}. "
                "Fix the cause (see 'rsb-cluster logs'), then submit the run again."
            )
    preempted = sum(a.cause == "preempted" and a.job_id == lease.record.job_id for a in earlier)
    if job.max_preemptions and preempted > job.max_preemptions:
        raise HistoryError(
            f"job {lease.record.job_id} was preempted {preempted} times, job.max_preemptions allows "
            f"{job.max_preemptions}. Its state is saved; submit the run again to resume."
        )
