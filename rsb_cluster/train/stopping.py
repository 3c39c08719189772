"""Being told to stop. A signal only sets a flag; the training loop acts on it at a step boundary."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType

from rsb_cluster.run import Cause

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


class StopFlag:
    """Set by the first of SIGTERM, SIGUSR2 and SIGINT; later signals change nothing.

    Installing it replaces submitit's handlers, which ignore SIGTERM and save in the middle of whatever runs.

    Args:
        limit_s: Seconds after which SIGUSR2 can announce the time limit. A site may also send SIGUSR2 for a preemption
            (``preempt_send_user_signal``); before this time it is only that.

    Attributes:
        cause: Why to stop, or None.
        since: When the signal came, by the monotonic clock.
    """

    def __init__(self, limit_s: float = 0.0) -> None:
        self.cause: Cause | None = None
        self.since: float | None = None
        self._limit = time.monotonic() + limit_s

    def install(self) -> None:
        """Take over the signals of this process."""
        for number in _CAUSE_OF:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it ahead of SIGTERM

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.cause is None:
            self.since = time.monotonic()
            self.cause = _CAUSE_OF[signal.Signals(number)]
            if self.cause == "timed out" and time.monotonic() < self._limit:
                self.cause = "preempted"

    def supersede(self) -> None:
        """Stop because a later attempt has taken the run over, whatever was asked for before."""
        self.cause = "superseded"

    def left_s(self, budget_s: float) -> float:
        """Return what is left of so many seconds since the signal came; all where another rank got it."""
        return budget_s if self.since is None else max(0.0, budget_s - (time.monotonic() - self.since))

    def counts(self) -> list[float]:
        """Return one number per cause, to be added up over all ranks."""
        return [float(self.cause == cause) for cause in CAUSES]


def agreed(counts: list[float]) -> Cause | None:
    """Return the cause that at least one rank has seen; the first of ``CAUSES`` where ranks differ."""
    return next((cause for cause, count in zip(CAUSES, counts, strict=True) if count), None)
