"""This machine: a process per submit runs its jobs one after the other."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rsb_cluster.backends.base import (
    STARTED,
    Backend,
    Check,
    Finding,
    JobStatus,
    State,
    new_submission,
    refuse_fields,
)
from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError, SubmitError
from rsb_cluster.node.exit_codes import CANCELLED, RUNNING, WAITING
from rsb_cluster.node.gpu_locks import visible_gpus
from rsb_cluster.node.local_queue import QueueSpec
from rsb_cluster.node.processes import Process
from rsb_cluster.node.task import Task
from rsb_cluster.runs.run import Submission
from rsb_cluster.runs.sharing import make_submission_folder
from rsb_cluster.subprocesses.interpreter import interpreter

GPUS = Path("/proc/driver/nvidia/gpus")  # one folder for each, made by NVIDIA's driver


class Local(Backend):
    """The back end ``local``."""

    name = "local"

    def check_job(self, job: Job) -> None:
        """Refuse more than one node, and what only Slurm has."""
        refuse_fields(job, "gpu_type", "python")
        if job.nodes > 1:
            raise ConfigError(
                f"job '{job.name}': nodes = {job.nodes}: the local back end is only this machine. Use a slurm job."
            )

    def check_available(self, job: Job) -> None:
        """Accept every job: nothing needs to be installed."""

    def memory_bytes(self, job: Job) -> int:
        """Return this machine's memory."""
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def doctor_checks(self) -> Mapping[str, Check]:
        """Check the number of GPUs."""
        return {"GPUs": _check_gpus}

    def concurrent_runs(self, job: Job, runs: int) -> int:
        """Return one: jobs run one after the other."""
        return 1

    def max_array_size(self) -> int:
        """Return no limit."""
        return sys.maxsize

    def script(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> str:
        """Return nothing, as there is no script. Raises ConfigError if this shell may not use that many GPUs."""
        _gpus(job)
        return ""

    def submit(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> list[Submission]:
        """Start the process that runs the tasks one after the other, with a new folder for logs.

        The job id is the process's name, which the process itself passes to the ranks (``local_queue``).
        """
        from submitit.core.utils import DelayedSubmission, JobPaths

        gpus = _gpus(job)
        make_submission_folder(folder, job)
        task_folders = [folder / str(i) for i in range(len(tasks))]
        for task_folder in task_folders:
            task_folder.mkdir()
        environment = os.environ | {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_NTASKS": str(job.ranks_per_node),
            "SUBMITIT_LOCAL_COMMAND": "",
            "SUBMITIT_LOCAL_TIMEOUT_S": "0",
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            "CUDA_VISIBLE_DEVICES": ",".join(gpus),
            # CUDA's own order is by speed, which is not that of nvidia-smi and of the locks.
            "CUDA_DEVICE_ORDER": os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
        }
        QueueSpec(run_ids=tuple(task.run_id for task in tasks), gpus=tuple(gpus), setup=job.setup).write(folder)
        queue = [*interpreter(), "-m", "rsb_cluster.node.local_queue", str(folder)]
        # A SIGINT that cancels some of its jobs must not end it, not even while Python starts.
        command = ["sh", "-c", "trap '' INT; exec " + shlex.join(queue)]
        with (folder / "queue.log").open("ab") as log:
            # A session of its own: it outlives this terminal, and Ctrl-C does not reach it directly.
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        job_id = str(Process.of(process.pid))
        for task_folder, task in zip(task_folders, tasks, strict=True):
            temporary = task_folder / "submitted.tmp"
            DelayedSubmission(task).dump(temporary)
            temporary.replace(JobPaths(task_folder, job_id).submitted_pickle)
        return [new_submission(job, job_id, f, task.data) for f, task in zip(task_folders, tasks, strict=True)]

    def ends_with_terminal(self, submission: Submission) -> bool:
        """Whether a job runs on this machine: then it behaves like a program in the foreground."""
        return not _is_elsewhere(submission)

    def query(self, submissions: Sequence[Submission], *, fresh: bool = True) -> list[JobStatus]:
        """Return job states. Of a job on another machine only files tell, and it may be dead: ask there."""
        return [_status(submission) for submission in submissions]

    def cancel(self, submissions: Sequence[Submission]) -> list[str]:
        """Cancel jobs: a running one saves and stops, a queued one leaves the queue. Return why not, for each."""
        problems = [_why_unreachable(submission) for submission in submissions]
        reachable = [submission for submission, why in zip(submissions, problems, strict=True) if not why]
        for submission in reachable:
            Path(submission.folder, CANCELLED).touch()
        for submission in reachable:
            _send_signal(submission, signal.SIGINT)
        return problems

    def cancel_queued(self, submissions: Sequence[Submission]) -> list[str]:
        """Cancel jobs that wait in their queue; a controller that has just been started reads the same file."""
        problems = []
        for submission in submissions:
            state, cancelled = _state(submission), Path(submission.folder, CANCELLED)
            if state != "queued":
                problems.append("" if state == "gone" else STARTED)
                continue
            cancelled.touch()
            is_running = Path(submission.folder, RUNNING).exists()
            if is_running:
                cancelled.unlink()
            problems.append(STARTED if is_running else "")
        return problems

    def preempt(self, submissions: Sequence[Submission]) -> None:
        """Preempt running jobs: they save and start again.

        Raises:
            SubmitError: A job runs on another machine; all others were signalled.
        """
        problems = [_why_unreachable(submission) for submission in submissions]
        for submission, why in zip(submissions, problems, strict=True):
            if not why:
                _send_signal(submission, signal.SIGTERM)
        if any(problems):
            raise SubmitError("\n".join(filter(None, problems)))

    def cancel_command(self, submissions: Sequence[Submission]) -> str:
        """Return a shell command that cancels jobs: queued ones leave the queue, a running one saves and stops."""
        files = shlex.join(str(Path(submission.folder, CANCELLED)) for submission in submissions)
        return f"touch {files}; kill -INT {' '.join(str(pid) for pid in dict.fromkeys(map(_pid, submissions)))}"


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU that this shell may use; nothing is loaded to find out."""
    return any(GPUS.glob("*")) and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1")


def _check_gpus(job: Job) -> Finding | str:
    if not job.gpus_per_node:
        return "none requested"
    if not shutil.which("nvidia-smi"):
        return Finding("GPUs", "nvidia-smi is not installed", "Use --gpus-per-node 0, or install NVIDIA's driver.")
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")
    if found < job.gpus_per_node:
        return Finding("GPUs", f"{found} of {job.gpus_per_node}", f"Use --gpus-per-node {found}.")
    return f"{found}"


def _gpus(job: Job) -> list[str]:
    """Return the GPUs of a job as CUDA device ids: the first of those that this shell may use."""
    what = f"job '{job.name}': gpus_per_node = {job.gpus_per_node}"
    return visible_gpus(job.gpus_per_node, what, "--gpus-per-node")


def _status(submission: Submission) -> JobStatus:
    state = _state(submission)
    waits_for = _waits_for(submission) if state == "queued" else ""
    if not _is_elsewhere(submission):
        is_here = state != "unknown" and _is_alive(submission)
        return JobStatus(state, reason=waits_for) if is_here else JobStatus("gone")
    if state == "gone":
        return JobStatus("gone")
    where = f"runs on {_host(submission)}; ask there"
    return JobStatus(state, engine=f"on {_host(submission)}", reason=f"{waits_for}; {where}" if waits_for else where)


def _state(submission: Submission) -> State:
    """Return the state of a job from its files, for a live queue; ``unknown`` if this machine does not see them."""
    folder = Path(submission.folder)
    try:
        names = {path.name for path in folder.iterdir()}
    except PermissionError:  # another user's, who does not share it: only the process tells
        return "unknown" if _is_elsewhere(submission) else "running"
    except OSError:
        return "unknown"
    if RUNNING in names:
        return "running"
    is_log = re.compile(rf"{re.escape(submission.job_id)}_\d+_log\.out").fullmatch
    return "gone" if CANCELLED in names or any(map(is_log, names)) else "queued"


def _waits_for(submission: Submission) -> str:
    try:
        return Path(submission.folder).with_name(WAITING).read_text(encoding="utf-8")
    except OSError:
        return ""


def _why_unreachable(submission: Submission) -> str:
    """Return why a job cannot be signalled, or ""; a queued job is cancelled by a file, on any machine."""
    if not _is_elsewhere(submission) or (state := _state(submission)) not in ("running", "unknown"):
        return ""
    host, first = _host(submission), f"remove {Path(submission.folder, RUNNING)} first"
    return (
        f"job {submission.job_id} runs on {host} and cannot be signalled from this machine. Run the command on {host}; "
        f"if that machine no longer exists, {first if state == 'running' else 'submit the run again'}."
    )


def _send_signal(submission: Submission, number: signal.Signals) -> None:
    """Send a signal to a job if it is running on this machine."""
    if _is_alive(submission) and _state(submission) == "running":
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            try:
                os.kill(_pid(submission), number)
            except PermissionError as error:
                raise SubmitError(f"job {submission.job_id} is another user's, who must do it.") from error


def _host(submission: Submission) -> str:
    process = Process.parse(submission.job_id)
    return process.host if process is not None else ""


def _pid(submission: Submission) -> int:
    process = Process.parse(submission.job_id)
    return process.pid if process is not None else int(submission.job_id)


def _is_elsewhere(submission: Submission) -> bool:
    process = Process.parse(submission.job_id)
    return process is not None and process.is_elsewhere


def _is_alive(submission: Submission) -> bool:
    """Whether the queue's process runs on this machine."""
    process = Process.parse(submission.job_id)
    if process is not None:
        return process.is_alive
    try:  # earlier versions recorded only the PID, which another process may have by now
        command = Path(f"/proc/{int(submission.job_id)}/cmdline").read_bytes().decode(errors="replace")
    except (OSError, ValueError):
        return False
    return "rsb_cluster.local_controller" in command and submission.folder in command.split("\0")
