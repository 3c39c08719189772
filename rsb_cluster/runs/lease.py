"""The right to work on a run: an attempt's number, which no other attempt can have.

Two attempts of one run can be alive at once: it was submitted twice, or the scheduler holds one for dead that is only
cut off. The number is claimed by creating the attempt's record where none is, and a higher number wins: who holds a
lower one writes no more checkpoints and ends. What it wrote meanwhile lies in folders of its own (``checkpoint``).

A job that the scheduler starts again takes over at once, as the scheduler's word is that its processes are dead.
Another job waits until the holder has been silent for a while, and gives up where it is not.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from rsb_cluster.config.job import Job
from rsb_cluster.errors import RsbError, StorageError
from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.run import Attempt, Cause, Heartbeat, Run

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
# So long an attempt of another job must be silent before it is held for dead. Should it live, its number gives it away.
STALE_S = 40.0
# Older signs of life than this are not waited for; clocks of two machines may differ by less.
OLD_S = 600.0

# Ends of an attempt that come again where nothing is mended.
CRASHES: tuple[Cause | Literal[""], ...] = ("crashed", "stuck")
CRASHES_IN_A_ROW = 2
# An attempt that ends without a word, all of it or one rank, was preempted without grace, or a node failed, or it ran
# out of memory: of these, some are bad luck. One that finished a run without a result was killed just then.
KILLS: tuple[Cause | Literal[""], ...] = ("", "lost peer", "finished")
KILLS_IN_A_ROW = 5


class LeaseHeldError(RsbError):
    """Another job is at work on the run."""


class SupersededError(RsbError):
    """A later attempt has taken the run over."""


class HistoryError(RsbError):
    """The attempts so far give no hope for another."""


class EndedError(RsbError):
    """This job has ended the run for good.

    Attributes:
        cause: How its last attempt ended.
    """

    def __init__(self, message: str, cause: Cause) -> None:
        super().__init__(message)
        self.cause = cause


class Lease:
    """A claimed attempt. Its heartbeat is a thread.

    Attributes:
        record: The attempt's record as it was claimed.
        earlier: The attempts before it, oldest first.
    """

    def __init__(self, run: Run, record: Attempt, earlier: Sequence[Attempt]) -> None:
        self.record, self.earlier = record, earlier
        self._run = run
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def starts(self) -> dict[int, int]:
        """The step at which each earlier attempt started, by its number."""
        return {attempt.number: attempt.start_step for attempt in self.earlier}

    def check(self) -> None:
        """Raise SupersededError where a later attempt has begun."""
        later = [number for number in self._run.attempt_numbers() if number > self.record.number]
        if later:
            raise SupersededError(
                f"attempt {later[-1]} has taken this run over; attempt {self.record.number} ends and writes nothing "
                "more. The scheduler held it for dead, or the run was submitted twice."
            )

    def keep_alive(self, step: Callable[[], int], superseded: Callable[[], None]) -> None:
        """Give signs of life from now on.

        Args:
            step: Tells the optimizer steps done; called from another thread.
            superseded: Called once from there, when a later attempt has begun.
        """
        self._thread = threading.Thread(target=self._beat, args=(step, superseded), name="heartbeat", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give no more signs of life."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=HEARTBEAT_S)

    def _beat(self, step: Callable[[], int], superseded: Callable[[], None]) -> None:
        beats, asked = 0, False
        while True:
            try:
                self.check()
                beats += 1
                self._run.write_heartbeat(self.record.number, Heartbeat(beats=beats, step=step(), time=time.time()))
                if not asked and self._run.is_stop_requested(self.record.number):
                    asked = True
                    log.info("the user asks this attempt to save and end")
                    os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler says it, where there is one on the node
            except SupersededError as error:
                log.error("%s", error)
                superseded()
                return
            except StorageError as error:
                log.warning("no sign of life could be written: %s", error)
            if self._ended.wait(HEARTBEAT_S):
                return


def check_not_ended(run: Run, job_id: str, restart: int) -> None:
    """Refuse to go on in a job whose last attempt ended for good.

    The exit codes of its ranks need not say so. A rank that has failed ends with its code; but under NCCL its peers
    notice nothing, and are killed or abort, and of all codes a scheduler reports the highest. Called by every rank, as
    each waits for the others otherwise.

    Args:
        run: The run.
        job_id: The scheduler's id of the job.
        restart: How often the scheduler has started it again.

    Raises:
        EndedError: It did.
    """
    if not restart:
        return
    for number in reversed(run.attempt_numbers()):
        last = run.attempt(number)
        if last.job_id == job_id:
            break
    else:
        return
    said: list[tuple[Cause | Literal[""], str]] = [(last.cause, last.message)]
    if not last.cause:  # rank 0 was killed before it could say why
        said += [(failure["cause"], failure["message"]) for failure in run.rank_failures(number).values()]
    for cause, message in said:
        if cause in ("failed", "stopped"):
            raise EndedError(
                f"attempt {number} of this job ended the run ({cause}{f': {message}' if message else ''}). This job "
                "does not train again; submit the run again to go on.",
                cause,
            )


def acquire(run: Run, draft: Attempt) -> Lease:
    """Claim the next attempt of a run.

    Args:
        run: The run.
        draft: The attempt's record; its number and first step are set here.

    Raises:
        LeaseHeldError: Another job is at work on the run.
    """
    while True:
        earlier = run.attempts()
        if earlier:
            _wait_for_silence(run, earlier[-1], draft.job_id)
        starts = {attempt.number: attempt.start_step for attempt in earlier}
        saved = checkpoint.listed(run.store.child("checkpoints"), starts)
        record = draft.model_copy(
            update={
                "number": earlier[-1].number + 1 if earlier else 1,
                "start_step": saved[-1].step if saved else 0,
            }
        )
        if run.claim_attempt(record):
            return Lease(run, record, earlier)


def _wait_for_silence(run: Run, last: Attempt, job_id: str) -> None:
    """Return when the last attempt is over, or gives no sign of life; at once where its own job asks."""
    if last.cause or last.job_id == job_id:
        return
    first = run.heartbeat(last.number)
    if time.time() - (first.time if first else last.started) > OLD_S:
        return
    log.info("attempt %d (job %s) has not said that it ended; listening for it", last.number, last.job_id)
    deadline = time.monotonic() + STALE_S
    while time.monotonic() < deadline:
        time.sleep(HEARTBEAT_S / 4)
        if run.attempt(last.number).cause:
            return
        now = run.heartbeat(last.number)
        if now is not None and now != first:
            raise LeaseHeldError(
                f"job {last.job_id} is at work on this run (attempt {last.number} on {', '.join(last.hosts)}, "
                f"step {now.step}). This job ends and changes nothing; 'rsb-cluster cancel' ends the other."
            )


def check_history(claim: Lease, job: Job) -> None:
    """Refuse an attempt after which nothing would be better than before.

    Raises:
        HistoryError: The last attempts crashed, or were killed, without a new checkpoint; or the job was preempted more
            often than it may be.
    """
    start, earlier = claim.record.start_step, claim.earlier
    for causes, limit in ((CRASHES, CRASHES_IN_A_ROW), (CRASHES + KILLS, KILLS_IN_A_ROW)):
        last = earlier[-limit:]
        if len(last) == limit and all(a.cause in causes and a.start_step == start for a in last):
            crashed = any(a.cause in CRASHES for a in last)
            killed = any(a.cause in KILLS for a in last)
            what = " or ".join(["crashed"] * crashed + ["were killed (out of memory? a failing node?)"] * killed)
            reason = f" ({last[-1].message})" if last[-1].message else ""
            raise HistoryError(
                f"the last {limit} attempts {what} without a new checkpoint after step {start}{reason}. "
                "Mend the cause ('rsb-cluster logs'), then submit the run again."
            )
    preempted = sum(a.cause == "preempted" and a.job_id == claim.record.job_id for a in earlier)
    if job.max_preemptions and preempted > job.max_preemptions:
        raise HistoryError(
            f"job {claim.record.job_id} was preempted {preempted} times, job.max_preemptions allows "
            f"{job.max_preemptions}. Its state is saved; submit the run again to go on."
        )
