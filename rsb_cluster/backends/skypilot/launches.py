"""Launches that fail again and again: SkyPilot says why only in its controller's log.

It repeats them without a limit, one to five minutes apart, whatever fails: no capacity, or nodes on which its runtime
cannot be installed (``_launch`` and ``recover`` in sky/jobs/recovery_strategy.py of 0.14). ``max_restarts_on_errors``
counts only failures of our own set-up and program.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PREFIX = re.compile(r"^\(?[^)]*\)?\s*[DIWEC] \d\d-\d\d \d\d:\d\d:\d\d[^]]*\] ")
_FAILED = "Failed to launch a cluster with error: "
_LOST = "Failed to successfully submit the job to the launched cluster"
_CRASHED = "User program crashed "  # our set-up or program; not with a code after which the job is to be restarted
_MEANT = "matched recover_on_exit_codes"
_STARTED = ("Job started.", "==== Recovered. ====")
_MAX_REASON = 300  # characters

# States in which a launch is made, or made again later.
LAUNCHING = ("PENDING", "STARTING", "RECOVERING")


@dataclass(frozen=True)
class FailedLaunches:
    """The launches of a managed job that have failed since its last start.

    Attributes:
        count: How many.
        reason: Why the last of them failed, or why the job had to be launched again; empty if neither is known.
    """

    count: int = 0
    reason: str = ""

    def __str__(self) -> str:
        if not self.count:
            return self.reason
        launches = "1 launch has" if self.count == 1 else f"{self.count} launches have"
        return f"{launches} failed, the last with: {self.reason}"


def failed_launches(controller_log: str) -> FailedLaunches:
    """Return the failed launches in the log of SkyPilot's controller."""
    count, reason = 0, ""
    for line in controller_log.splitlines():
        text = _PREFIX.sub("", _COLOUR.sub("", line)).strip()
        if text.startswith(_STARTED):
            count, reason = 0, ""
        elif text.startswith((_FAILED, _LOST)):
            count, reason = count + 1, text.removeprefix(_FAILED)
        elif text.startswith(_CRASHED) and _MEANT not in text:
            reason = text
    if reason.count("(") < reason.count(")"):  # SkyPilot closes a parenthesis that it has not opened
        reason = reason.removesuffix(")")
    return FailedLaunches(count, reason[:_MAX_REASON])
