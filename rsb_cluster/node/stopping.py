"""The stop flag of a rank, set by a signal, an interruption notice or a budget; training reads it after each step."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType

from rsb_cluster.runs.run import Cause

log = logging.getLogger(__name__)

# The order is that of the causes in the vector that ranks exchange, and their priority where ranks differ.
CAUSES: tuple[Cause, ...] = ("superseded", "preempted", "timed out", "stopped")

_SIGNAL_CAUSES: dict[signal.Signals, Cause] = {
    signal.SIGTERM: "preempted",  # Slurm's preemption and requeue; also 'rsb-cluster preempt' on a local run
    signal.SIGUSR2: "timed out",  # ahead of the time limit, as requested in the job script
    signal.SIGINT: "stopped",  # Ctrl-C: save, and do not restart
}


# Slurm may send the signal ahead of a time limit up to 60 s early (sbatch --signal); the rest is for Python's start.
SIGNAL_SLACK_S = 90
# Length of the vector that a rank exchanges: one number per cause, whether it knows a deadline, and the seconds left.
VECTOR_SIZE = len(CAUSES) + 2
# A machine may outlive its deadline a little, so a late save is still worth trying.
MIN_SAVE_S = 5.0


class StopFlag:
    """Set by the first of SIGTERM, SIGUSR2, SIGINT, a notice and an exceeded budget; a later one changes no cause.

    Installing it replaces submitit's handlers, which ignore SIGTERM and save in the middle of a step.

    Args:
        limit_s: Seconds after which SIGUSR2 can announce the time limit. A site may also send SIGUSR2 for a preemption
            (``preempt_send_user_signal``); before this time it can only mean that.

    Attributes:
        cause: Why to stop, or None.
        since: When the flag was set, by the monotonic clock.
        reason: Details of the cause, for the user.
    """

    def __init__(self, limit_s: float = 0.0) -> None:
        self.cause: Cause | None = None
        self.since: float | None = None
        self.reason = ""
        self._deadline: float | None = None
        self._limit = time.monotonic() + limit_s

    def install(self) -> None:
        """Take over the signals of this process."""
        for number in _SIGNAL_CAUSES:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it ahead of SIGTERM

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        cause = _SIGNAL_CAUSES[signal.Signals(number)]
        self.stop("preempted" if cause == "timed out" and time.monotonic() < self._limit else cause)

    def stop(self, cause: Cause, reason: str = "") -> None:
        """Request a stop after the current step; callable from any thread."""
        if self.cause is None:
            self.since, self.reason = time.monotonic(), reason
            self.cause = cause

    def reclaim(self, within_s: float) -> None:
        """Request a stop because a cloud reclaims this machine in so many seconds; callable from any thread."""
        self._deadline = time.monotonic() + within_s
        self.stop("preempted")

    def supersede(self) -> None:
        """Request a stop because a later attempt has taken the run over; overrides any other cause."""
        self.cause = "superseded"

    def save_time_s(self, grace_s: float) -> float | None:
        """Return how long saving may take, in seconds.

        Args:
            grace_s: Time between signal and kill; 0: unknown. If another rank got the signal, all of it is left.

        Returns:
            The time left until the deadline of a notice, if there is one; else the rest of the grace time, or None.
        """
        now = time.monotonic()
        if self._deadline is not None:
            return max(MIN_SAVE_S, self._deadline - now)
        if not grace_s:
            return None
        return grace_s if self.since is None else max(0.0, grace_s - (now - self.since))

    def to_vector(self) -> list[float]:
        """Return ``VECTOR_SIZE`` numbers, to be summed over all ranks."""
        has_deadline = self.cause is not None and self._deadline is not None
        deadline = [1.0, self._deadline - time.monotonic()] if has_deadline else [0.0, 0.0]  # type: ignore[operator]
        return [*(float(self.cause == cause) for cause in CAUSES), *deadline]

    def agree(self, summed: list[float]) -> Cause | None:
        """Return why to stop, from the sum of all ranks' vectors; the same on every rank.

        If machines have a deadline, its mean becomes this rank's own, as the save must end before any of them is
        reclaimed. The notices of one step come within seconds of each other.

        Returns:
            The cause that at least one rank has, the first of ``CAUSES`` if ranks differ; or None.
        """
        *causes, with_deadline, left_s = summed
        if with_deadline:
            self._deadline = time.monotonic() + left_s / with_deadline
        return next((cause for cause, count in zip(CAUSES, causes, strict=True) if count), None)
