"""Being told to stop, by a signal, a cloud's notice or a budget. That only sets a flag; training acts after a step."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType

from rsb_cluster.runs.run import Cause

log = logging.getLogger(__name__)

# The order is the code by which ranks tell each other the cause.
CAUSES: tuple[Cause, ...] = ("superseded", "preempted", "timed out", "stopped")

_CAUSE_OF: dict[signal.Signals, Cause] = {
    signal.SIGTERM: "preempted",  # Slurm's preemption and requeue; also 'rsb-cluster preempt' on a local run
    signal.SIGUSR2: "timed out",  # ahead of the time limit, as asked for in the job script
    signal.SIGINT: "stopped",  # Ctrl-C: save, and do not start again
}


# Slurm may send the signal ahead of a time limit up to 60 s early (sbatch --signal); the rest is for Python's start.
SIGNAL_SLACK_S = 90
# Numbers by which a rank tells the others: one per cause; whether it knows when its machine goes, and in how many s.
COUNTS = len(CAUSES) + 2
# A machine may outlive its time a little; a save that is not tried fails for certain.
LEAST_SAVE_S = 5.0


class StopFlag:
    """Set by the first of SIGTERM, SIGUSR2, SIGINT, a notice and a spent budget; what comes later changes no cause.

    Installing it replaces submitit's handlers, which ignore SIGTERM and save in the middle of whatever runs.

    Args:
        limit_s: Seconds after which SIGUSR2 can announce the time limit. A site may also send SIGUSR2 for a preemption
            (``preempt_send_user_signal``); before this time it is only that.

    Attributes:
        cause: Why to stop, or None.
        since: When that was said, by the monotonic clock.
        reason: More of the cause, for the user.
    """

    def __init__(self, limit_s: float = 0.0) -> None:
        self.cause: Cause | None = None
        self.since: float | None = None
        self.reason = ""
        self._deadline: float | None = None
        self._limit = time.monotonic() + limit_s

    def install(self) -> None:
        """Take over the signals of this process."""
        for number in _CAUSE_OF:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it ahead of SIGTERM

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        cause = _CAUSE_OF[signal.Signals(number)]
        self.stop("preempted" if cause == "timed out" and time.monotonic() < self._limit else cause)

    def stop(self, cause: Cause, reason: str = "") -> None:
        """Ask for a stop after the present step; from any thread."""
        if self.cause is None:
            self.since, self.reason = time.monotonic(), reason
            self.cause = cause

    def reclaim(self, within_s: float) -> None:
        """Ask for a stop because a cloud takes this machine back in so many seconds; from any thread."""
        self._deadline = time.monotonic() + within_s
        self.stop("preempted")

    def supersede(self) -> None:
        """Stop because a later attempt has taken the run over, whatever was asked for before."""
        self.cause = "superseded"

    def left_s(self, budget_s: float) -> float | None:
        """Return how long saving may take, in seconds.

        Args:
            budget_s: What the cause leaves from its signal on; all of it where another rank got the signal. 0: unknown.

        Returns:
            What is left before a machine goes where that was announced; else what is left of the budget, or None.
        """
        now = time.monotonic()
        if self._deadline is not None:
            return max(LEAST_SAVE_S, self._deadline - now)
        if not budget_s:
            return None
        return budget_s if self.since is None else max(0.0, budget_s - (now - self.since))

    def counts(self) -> list[float]:
        """Return ``COUNTS`` numbers, to be added up over all ranks."""
        is_told = self.cause is not None and self._deadline is not None
        goes = [1.0, self._deadline - time.monotonic()] if is_told else [0.0, 0.0]  # type: ignore[operator]
        return [*(float(self.cause == cause) for cause in CAUSES), *goes]

    def agreed(self, counts: list[float]) -> Cause | None:
        """Return why to stop, after numbers that were added up; all ranks find the same.

        Where machines are announced to go, their mean time becomes this rank's own: it is not its machine alone that
        the save must be ahead of. Those of one step were announced within seconds.

        Returns:
            The cause that at least one rank has seen, the first of ``CAUSES`` where ranks differ; or None.
        """
        *causes, told, left = counts
        if told:
            self._deadline = time.monotonic() + left / told
        return next((cause for cause, count in zip(CAUSES, causes, strict=True) if count), None)
