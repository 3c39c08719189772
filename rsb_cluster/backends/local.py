"""This machine: a process per submit runs its jobs one after the other."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rsb_cluster.backends.base import Backend, Check, Finding, JobStatus, State, new_submission
from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError, SubmitError
from rsb_cluster.node.exit_codes import CANCELLED, RUNNING
from rsb_cluster.node.processes import Process
from rsb_cluster.node.task import Task
from rsb_cluster.runs.run import Submission
from rsb_cluster.subprocesses.interpreter import interpreter


class Local(Backend):
    """The back end ``local``."""

    name = "local"

    def check_job(self, job: Job) -> None:
        """Refuse more than one node."""
        if job.nodes > 1:
            raise ConfigError(
                f"job '{job.name}': nodes = {job.nodes}: the local back end is only this machine. Use a slurm job."
            )

    def check_available(self, job: Job) -> None:
        """Accept every job: nothing needs to be installed."""

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

        The job id is the process's name, which the process itself passes to the ranks (``local_controller``).
        """
        from submitit.core.utils import DelayedSubmission, JobPaths

        gpus = _gpus(job)
        folder.mkdir(mode=0o700, parents=True)
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
        }
        command = [*interpreter(), "-m", "rsb_cluster.node.local_controller", *map(str, task_folders)]
        if job.setup:
            command = ["bash", "-c", " && ".join([*job.setup, "exec " + shlex.join(command)])]
        with (folder / "controller.log").open("ab") as log:
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

    def query(self, submissions: Sequence[Submission]) -> list[JobStatus]:
        """Return job states. On another machine only files tell: a job of a dead machine may still count as running."""
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
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        return [str(i) for i in range(job.gpus_per_node)]
    # CUDA reads numbers, "GPU-..." and "MIG-..." up to the first entry that is none of these, such as -1.
    entries = (entry.strip() for entry in variable.split(","))
    visible = list(itertools.takewhile(lambda entry: re.fullmatch(r"\d+|(GPU|MIG)-.+", entry), entries))
    if len(visible) < job.gpus_per_node:
        raise ConfigError(
            f"job '{job.name}': gpus_per_node = {job.gpus_per_node}, but with CUDA_VISIBLE_DEVICES='{variable}' this "
            f"shell may use {len(visible) or 'none'}. Use --gpus-per-node {len(visible)}, or change the variable."
        )
    return visible[: job.gpus_per_node]


def _status(submission: Submission) -> JobStatus:
    if not _is_elsewhere(submission):
        return JobStatus(_state(submission) if _is_alive(submission) else "gone")
    state = _state(submission)
    return JobStatus(state, engine="" if state == "gone" else f"on {_host(submission)}")


def _state(submission: Submission) -> State:
    """Return the state of a job from its files, for a live queue; ``gone`` if this machine does not see the folder."""
    folder = Path(submission.folder)
    if (folder / RUNNING).exists():
        return "running"
    was_started = list(folder.glob(f"{submission.job_id}_*_log.out")) or (folder / CANCELLED).exists()
    return "gone" if was_started or not folder.is_dir() else "queued"


def _why_unreachable(submission: Submission) -> str:
    """Return why a running job cannot be signalled, or ""; a queued job is cancelled by a file, on any machine."""
    if not _is_elsewhere(submission) or _state(submission) != "running":
        return ""
    host = _host(submission)
    return (
        f"job {submission.job_id} runs on {host} and cannot be signalled from this machine. Run the command on {host}; "
        f"if that machine no longer exists, remove {Path(submission.folder, RUNNING)} first."
    )


def _send_signal(submission: Submission, number: signal.Signals) -> None:
    """Send a signal to a job if it is running on this machine."""
    if _is_alive(submission) and _state(submission) == "running":
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(_pid(submission), number)


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
