"""The exit codes of ranks and nodes, and the files that mark the state of a local job in its queue."""

from collections.abc import Sequence

# sysexits.h's EX_TEMPFAIL: the state is saved, or a peer was lost; restart the job.
EXIT_RESTART = 75
# A permanent failure. It is above EXIT_RESTART because srun reports the highest code of all tasks, and the peers of a
# failed rank exit with EXIT_RESTART.
EXIT_FAILED = 100
# Stopped by the user: the state is saved, and the job must not be restarted.
EXIT_STOPPED = 130
# In a cloud, EXIT_RESTART of a start that did not become an attempt. SkyPilot restarts a job after EXIT_RESTART without
# a limit, and after any other code at most cloud.max_restarts times.
EXIT_NO_ATTEMPT = 76

# A file of this name in a local job's folder takes the job out of the queue.
CANCELLED = "cancelled"
# A file of this name is in a local job's folder while the job runs, its setup included.
RUNNING = "running"
# A file of this name in a local job's folder: its setup is done, and its controller takes signals.
SET_UP = "set-up"
# A file of this name is in a queue's folder, beside those of its jobs, while it waits, and says for what.
WAITING = "waiting"


def should_restart(code: int) -> bool:
    """Whether to restart a job whose highest exit code is ``code``.

    The exit code of a killed rank (negative, or above 128 in a shell) says nothing about the run: the next attempt
    counts crashes, and ends the run if there is no progress.
    """
    return code == EXIT_RESTART or code < 0 or (code > 128 and code != EXIT_STOPPED)


def combine_exit_codes(codes: Sequence[int]) -> int:
    """Return the exit code of all ranks together: 0, EXIT_RESTART, or the highest code that ends a job."""
    return max((code for code in codes if code and not should_restart(code)), default=EXIT_RESTART if any(codes) else 0)
