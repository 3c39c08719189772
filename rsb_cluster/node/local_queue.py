"""The process of a submit to this machine: it runs jobs one after the other, once the GPUs that they need are free.

Each job is a shell script, as on Slurm: the lines of ``job.setup``, then the controller of its ranks. What the setup
prints goes to the log of rank 0.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rsb_cluster.config.schema import Section, read_record
from rsb_cluster.errors import RsbError
from rsb_cluster.node import starts
from rsb_cluster.node.exit_codes import CANCELLED, RUNNING, SET_UP, WAITING
from rsb_cluster.node.gpu_locks import GpuLocks
from rsb_cluster.node.processes import Process
from rsb_cluster.subprocesses.interpreter import interpreter

POLL_S = 0.5
_SAID_LINES, _SAID_BYTES = 5, 4096

# The beginning of a job's script. A setup line often calls a function, such as ``module``: that of the script is named.
_HEAD = r"""set -eE
named() {
  local code=$? line=${BASH_LINENO[-2]}
  ((BASH_SUBSHELL)) || echo "line $((line - HEAD)) failed with exit code $code: $(sed -n "${line}p" "$0")" >&2
}
trap named ERR
"""


class QueueSpec(Section):
    """What a submit asks for; a file in the queue's folder. Job N is in the folder N.

    Attributes:
        run_ids: The run of each job.
        gpus: CUDA devices that the jobs use.
        setup: Shell lines.
    """

    run_ids: tuple[str, ...]
    gpus: tuple[str, ...]
    setup: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Write it into the queue's folder."""
        (folder / "queue.json").write_text(self.model_dump_json(), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> QueueSpec:
        """Read it from the queue's folder."""
        path = folder / "queue.json"
        return read_record(QueueSpec, path.read_bytes(), str(path))


class Queue:
    """Runs the jobs of a submit.

    Args:
        folder: The queue's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._spec = folder, QueueSpec.read(folder)
        self._jobs = [folder / str(number) for number in range(len(self._spec.run_ids))]
        self._job_id = str(Process.of(os.getpid()))
        self._process: subprocess.Popen[bytes] | None = None
        self._current = folder
        self._is_stopped = False

    def run(self) -> None:
        """Wait for the GPUs, then run all jobs that are not cancelled by then."""
        locks = GpuLocks(self._spec.gpus)
        try:
            is_free = self._wait_for_gpus(locks)
        except RsbError as error:
            for job in self._jobs:
                starts.report_beside_logs(job, self._job_id, str(error))
            return
        if not is_free:
            return
        signal.signal(signal.SIGTERM, self._forward)
        signal.signal(signal.SIGUSR2, self._forward)
        signal.signal(signal.SIGINT, self._stop)
        for job, run_id in zip(self._jobs, self._spec.run_ids, strict=True):
            if not (job / CANCELLED).exists():
                locks.name_run(run_id)
                self._run_job(job)

    def _wait_for_gpus(self, locks: GpuLocks) -> bool:
        """Return whether the GPUs are locked; if not, all jobs have been cancelled."""
        note, said = self._folder / WAITING, ""
        while why := locks.try_acquire():
            if not self._folder.is_dir() or all((job / CANCELLED).exists() for job in self._jobs):
                return False
            if why != said:
                note.write_text(why, encoding="utf-8")
                said = why
            time.sleep(POLL_S)
        note.unlink(missing_ok=True)
        return True

    def _run_job(self, job: Path) -> None:
        self._current, self._is_stopped = job, False
        (job / RUNNING).touch()
        log = job / f"{self._job_id}_0_log.out"
        with log.open("ab") as output:
            printed = output.tell()
            self._process = subprocess.Popen(self._command(job), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            code = self._process.wait()
        self._process = None
        if (code or not self._is_set_up) and not self._is_stopped:
            what = "the controller of its ranks" if self._is_set_up else "the setup (job.setup)"
            message = f"{what} ended with exit code {code}: {_last_lines(log, printed)}"
            starts.report_beside_logs(job, self._job_id, message)
        (job / RUNNING).unlink(missing_ok=True)

    def _command(self, job: Path) -> list[str]:
        controller = [*interpreter(), "-m", "rsb_cluster.node.local_controller", self._job_id, str(job)]
        if not self._spec.setup:
            return controller
        script = job / "job.sh"
        head = _HEAD.replace("HEAD", str(_HEAD.count("\n")))
        lines = [*self._spec.setup, "trap - ERR", f"exec {shlex.join(controller)}", ""]
        script.write_text(head + "\n".join(lines), encoding="utf-8")
        return ["bash", str(script)]

    @property
    def _is_set_up(self) -> bool:
        return (self._current / SET_UP).exists()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Forward a preemption to the controller; before there is one, nothing needs to be saved."""
        if self._process is not None and self._is_set_up:
            self._process.send_signal(number)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Forward Ctrl-C to the controller, or end the setup; the second one kills it."""
        if self._process is None:
            return
        if self._is_set_up:
            self._process.send_signal(number)
        elif self._is_stopped:
            self._process.kill()
        else:
            # The setup's programs are in the process group of this process.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.killpg(0, signal.SIGINT)
            signal.signal(signal.SIGINT, self._stop)
        self._is_stopped = True


def _last_lines(log: Path, start: int) -> str:
    """Return the last lines that were written to a log from a byte offset on."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - _SAID_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return " | ".join(said[-_SAID_LINES:]) or "it printed nothing"


def main(arguments: Sequence[str]) -> None:
    """Run the queue in a folder."""
    (folder,) = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until a job runs; which are cancelled by then, files say
    Queue(Path(folder)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
