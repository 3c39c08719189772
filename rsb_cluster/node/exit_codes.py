"""The exit codes by which a rank speaks to whoever started it, and the files by which a local job's queue is kept."""

from collections.abc import Sequence

# sysexits.h's EX_TEMPFAIL: state is saved, or a peer was lost; start this job again.
EXIT_RESTART = 75
# A failure that another attempt would repeat. It is above EXIT_AGAIN because srun reports the highest code of all
# tasks, and the peers of a failed rank end with EXIT_AGAIN.
EXIT_FAILED = 100
# Stopped by the user: saved, not to be started again.
EXIT_STOPPED = 130
# In a cloud, as EXIT_AGAIN where no attempt was made of this start: SkyPilot starts the job again after EXIT_AGAIN as
# often as it comes, and after any other code so often as cloud.max_restarts says.
EXIT_NO_ATTEMPT = 76

# A file of this name in a local job's folder takes it out of the queue.
CANCELLED = "cancelled"
# Stands in a local job's folder while its turn lasts.
RUNNING = "running"


def should_restart(code: int) -> bool:
    """Whether a job whose worst exit code this is should be started again.

    A rank that was killed (negative, or above 128 in a shell) says nothing of the run; the next attempt counts crashes
    and ends the run where there is no progress.
    """
    return code == EXIT_RESTART or code < 0 or (code > 128 and code != EXIT_STOPPED)


def combine_exit_codes(codes: Sequence[int]) -> int:
    """Return the code that ranks stand for together: 0, EXIT_AGAIN, or the highest of those that end a job."""
    return max((code for code in codes if code and not should_restart(code)), default=EXIT_RESTART if any(codes) else 0)
