"""The controller process of a local job: submitit's controller, which also restarts the ranks.

submitit's own controller gives up after six restarts and hangs when one rank dies; a scheduler does neither.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from submitit.local.local import Controller

from rsb_cluster.node import processes, starts
from rsb_cluster.node.exit_codes import CANCELLED, EXIT_RESTART, SET_UP, combine_exit_codes
from rsb_cluster.subprocesses.interpreter import interpreter


class RestartingController(Controller):
    """Starts the ranks, forwards signals to them, and restarts them after a preemption or a lost rank.

    Args:
        folder: The job's folder.
        job_id: The job's id.
    """

    def __init__(self, folder: Path, job_id: str) -> None:
        super().__init__(folder)
        self.pid = job_id  # the base class takes it for the job's id, in file names and for ranks
        self.command = [*interpreter(), "-u", "-m", "submitit.core._submit", str(folder)]
        # The base class forwards SIGTERM.
        signal.signal(signal.SIGUSR2, self._forward)
        signal.signal(signal.SIGINT, self._stop)
        self._stopped = False

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._forward_signal(signal.Signals(number))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Forward Ctrl-C; kill the ranks at the second one, as a user who presses it twice does not want to wait."""
        self._forward_signal(signal.SIGKILL if self._stopped else signal.SIGINT)
        self._stopped = True

    def wait(self, freq: int = 24) -> list[int]:
        """Wait for all ranks to exit."""
        return processes.wait_for_all(self.tasks)

    def run(self, max_retry: int = 0) -> None:
        """Run the job until it ends."""
        restart = failed = 0
        while not self._stopped:
            os.environ["RSB_LOCAL_RESTART"] = str(restart)
            try:
                self.start_tasks()
                code = combine_exit_codes(self.wait())
            finally:
                self.kill_tasks()
            if code and not starts.is_recorded(self.folder, self.pid, starts.CLAIMED, restart):
                failed += 1  # counted in memory, as the folder may be what is broken
                starts.list_failed(self.folder, self.pid, restart, code)
            else:
                failed = 0
            if code != EXIT_RESTART or failed >= starts.LIMIT:
                break
            if failed:
                self._sleep(starts.LOCAL_DELAY_S * 2 ** (failed - 1))
            restart += 1

    def _sleep(self, seconds: float) -> None:
        """Sleep until the user stops the job."""
        deadline = time.monotonic() + seconds
        while not self._stopped and time.monotonic() < deadline:
            time.sleep(0.1)


def main(arguments: Sequence[str]) -> None:
    """Run the ranks of a job until it ends, unless it was cancelled during its setup."""
    job_id, folder = arguments[0], Path(arguments[1])
    controller = RestartingController(folder, job_id)
    (folder / SET_UP).touch()
    if not (folder / CANCELLED).exists():
        controller.run()


if __name__ == "__main__":
    main(sys.argv[1:])
