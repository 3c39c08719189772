"""The back ends: handing runs to this machine or to Slurm, and asking how they are. All of submitit and Slurm is here.

A job is never ended by submitit's own count of time-outs (it takes every preemption of a short job for one): the task
installs its own signal handlers, and the script asks Slurm to start the job again.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from rsb_cluster.errors import ConfigError, SubmitError
from rsb_cluster.exits import CANCELLED, EXIT_AGAIN, EXIT_STOPPED, RUNNING
from rsb_cluster.job import Job
from rsb_cluster.run import Submission
from rsb_cluster.task import Task

State = Literal["queued", "running", "gone"]

DEFAULT_ARRAY_SIZE = 1001  # slurm.conf(5)
SCANCEL_S = 4.0  # how long to wait for scancel, s

_COMMAND = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit"

# Bash must outlive the signals of a preemption: it is what puts the job back into the queue. ':' and not '', as ignored
# signals would be inherited by the ranks.
# And since Slurm 22.05 srun takes --cpus-per-task not from sbatch but from this variable: where tasks are bound to
# cores, a rank and its loader workers would share one.
_SETUP = ["trap : TERM USR2", 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"']

# srun reports the highest exit code of all tasks. A job that ends by itself within the grace time counts as finished
# for Slurm, so it must ask to be started again; but not after scancel, when it is no longer RUNNING, and not where
# Slurm has held this host for dead and started the job elsewhere.
_TEARDOWN = f"""\
code=$?
job="${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
if [ "$code" -eq {EXIT_AGAIN} ] || {{ [ "$code" -gt 128 ] && [ "$code" -ne {EXIT_STOPPED} ]; }}; then
  read -r state restarts <<<"$(squeue -h -j "$job" -O State,RestartCnt)"
  if [ "$state $restarts" = "RUNNING ${{SLURM_RESTART_COUNT:-0}}" ]; then scontrol requeue "$job" && sleep 300; fi
fi
exit "$code\"""".splitlines()

# So long after the first rank has ended the others are killed: one that is stopped would keep the job for ever.
WAIT_FOR_RANKS_S = 90

# Options that the job's own fields decide; twice in one script, the loser would depend on the spelling.
_OWN_OPTIONS = {
    "nodes": "nodes", "ntasks-per-node": "tasks_per_node", "gpus-per-node": "gpus_per_node", "time": "time_min",
    "cpus-per-task": "cpus_per_task", "mem": "mem_gb", "signal": "signal_delay_s", "array": "array_parallelism",
    "output": "submissions", "error": "submissions", "open-mode": None, "job-name": None, "requeue": None,
}  # fmt: skip


def default_backend_job(nodes: int) -> str:
    """Return the name of the job to use when the user names none."""
    return "slurm" if nodes > 1 or shutil.which("sbatch") else "local"


def check_available(job: Job) -> None:
    """Refuse a back end that this machine does not have."""
    if job.backend == "slurm" and not shutil.which("sbatch"):
        raise SubmitError(
            "there is no 'sbatch' on this machine. Submit from a login node of the cluster, or use --job local."
        )


def max_array_size() -> int:
    """Return how many runs the site takes in one job array; Slurm's own default where it does not say."""
    try:
        shown = _slurm("scontrol", "show", "config", timeout_s=5)
    except SubmitError:  # a dry run is made on any machine
        return DEFAULT_ARRAY_SIZE
    answer = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    return int(answer[1]) if answer else DEFAULT_ARRAY_SIZE


def sbatch_text(job: Job, folder: Path, name: str, count: int) -> str:
    """Return the script that Slurm gets for ``count`` runs; the one that ``launch`` submits."""
    from submitit.slurm.slurm import _make_sbatch_string

    parameters = _slurm_parameters(job, name) | ({"map_count": count} if count > 1 else {})
    text: str = _make_sbatch_string(command=f"{_COMMAND} {shlex.quote(str(folder))}", folder=folder, **parameters)
    return text


def _slurm_parameters(job: Job, name: str) -> dict[str, Any]:
    options = {key.replace("_", "-"): value for key, value in job.slurm.items()}
    for option in options.keys() & _OWN_OPTIONS.keys():
        instead = _OWN_OPTIONS[option]
        hint = f"Set the job's own field '{instead}' instead." if instead else "It is decided by rsb-cluster."
        raise ConfigError(f"job '{job.name}': slurm.{option} cannot be set. {hint}")
    parameters: dict[str, Any] = {
        "job_name": name,
        "time": job.time_min,
        "nodes": job.nodes,
        "ntasks_per_node": job.ranks_per_node,
        "cpus_per_task": job.cpus_per_task,
        "signal_delay_s": job.signal_delay_s,
        "stderr_to_stdout": True,
        "array_parallelism": job.array_parallelism,
        "srun_args": [f"--wait={WAIT_FOR_RANKS_S}"],
        "setup": [*_SETUP, *job.setup],
        "teardown": _TEARDOWN,
        "additional_parameters": {"requeue": True, **options},
        "wckey": None,
    }
    if job.gpus_per_node:
        parameters["gpus_per_node"] = job.gpus_per_node
    if job.is_elastic:
        parameters["additional_parameters"]["nodes"] = f"{job.min_nodes}-{job.nodes}"
    if job.mem_gb:
        parameters["mem"] = f"{int(job.mem_gb * 1024)}MB"
    return parameters


def launch(job: Job, tasks: Sequence[Task], folder: Path, name: str) -> list[Submission]:
    """Hand runs to the job's back end: as one array to Slurm, as a queue of one to this machine.

    Args:
        job: Where.
        tasks: One per run.
        folder: New folder for scripts and logs, on a file system that all nodes share.
        name: What the scheduler shows.

    Returns:
        One submission per task.

    Raises:
        SubmitError: The scheduler refused.
    """
    check_available(job)
    folder.mkdir(mode=0o700, parents=True)
    ids = _launch_slurm(job, tasks, folder, name) if job.backend == "slurm" else _launch_local(job, tasks, folder)
    folders = [folder] * len(tasks) if job.backend == "slurm" else [folder / str(i) for i in range(len(tasks))]
    fields = job.model_dump(mode="json")
    return [
        Submission(backend=job.backend, job_id=job_id, folder=str(where), shape=job.shape, time=time.time(), job=fields)
        for job_id, where in zip(ids, folders, strict=True)
    ]


def launch_after(job: Job, submissions: Sequence[Submission], command: Sequence[str], folder: Path, name: str) -> str:
    """Have Slurm run a command once when all these jobs have ended, however they did; return its job's id.

    It asks for one CPU, with the account and the partition of the job. A requeue is no end.

    Raises:
        SubmitError: The scheduler refused.
    """
    check_available(job)
    arrays = dict.fromkeys(submission.job_id.partition("_")[0] for submission in submissions)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    where = [f"--{key}={value}" for key, value in job.slurm.items() if key in ("account", "partition", "qos")]
    options = [*where, f"--job-name={name}", f"--output={folder}/%j.log", "--time=60", "--ntasks=1", "--mem=4G"]
    lines = "\n".join([*job.setup, shlex.join(command)])
    answer = _slurm("sbatch", "--parsable", f"--dependency=afterany:{':'.join(arrays)}", *options, "--wrap", lines)
    return answer.strip().partition(";")[0]


def _launch_slurm(job: Job, tasks: Sequence[Task], folder: Path, name: str) -> list[str]:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder)
    executor.update_parameters(**_slurm_parameters(job, name))
    try:
        jobs = executor.submit_array(list(tasks))
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        reason = str(error).strip().splitlines()
        raise SubmitError(
            f"sbatch refused the job: {reason[-1] if reason else error!r}. Check partition, account and limits in the "
            f"job file ('rsb-cluster jobs show {job.name}'); the script is in {folder}."
        ) from error
    return [str(j.job_id) for j in jobs]


def _launch_local(job: Job, tasks: Sequence[Task], folder: Path) -> list[str]:
    from submitit.core.utils import DelayedSubmission, JobPaths

    folders = [folder / str(i) for i in range(len(tasks))]
    for where in folders:
        where.mkdir()
    gpus = ",".join(str(i) for i in range(job.gpus_per_node))
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
        "CUDA_VISIBLE_DEVICES": gpus if job.gpus_per_node else "",
    }
    command = [sys.executable, "-m", "rsb_cluster.local_controller", *map(str, folders)]
    if job.setup:
        command = ["bash", "-c", " && ".join([*job.setup, "exec " + shlex.join(command)])]
    with (folder / "controller.log").open("ab") as log:
        # A session of its own: it outlives this terminal, and Ctrl-C reaches it only through us.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    for where, task in zip(folders, tasks, strict=True):
        paths = JobPaths(where, str(process.pid))
        temporary = where / "submitted.tmp"
        DelayedSubmission(task).dump(temporary)
        temporary.replace(paths.submitted_pickle)
    return [str(process.pid)] * len(tasks)


def states(submissions: Sequence[Submission]) -> list[State]:
    """Return how the scheduler sees each submission; one query for all that Slurm has."""
    slurm = _slurm_states([s.job_id for s in submissions if s.backend == "slurm"])
    return [slurm[s.job_id] if s.backend == "slurm" else _local_state(s) for s in submissions]


def _local_state(submission: Submission) -> State:
    if not _is_controller(submission):
        return "gone"
    folder = Path(submission.folder)
    if (folder / RUNNING).exists():
        return "running"
    return "gone" if log_paths(submission) or (folder / CANCELLED).exists() else "queued"


def _slurm_states(job_ids: Sequence[str]) -> dict[str, State]:
    if not job_ids:
        return {}
    parents = sorted({job_id.split("_")[0] for job_id in job_ids})
    command = ["squeue", "-h", "-r", "-o", "%i|%F_%K|%T", "-j", ",".join(parents)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SubmitError(f"cannot ask Slurm: {error}. Is this a login node, and is the controller up?") from error
    # Jobs that left the queue make squeue fail when it knows none of them; that is an answer, too.
    if done.returncode and "Invalid job id" not in done.stderr:
        raise SubmitError(f"squeue failed: {done.stderr.strip()}. Is the controller up?")
    found: dict[str, State] = dict.fromkeys(job_ids, "gone")
    for line in done.stdout.splitlines():
        job_id, element, state = line.strip().split("|")
        for known in (job_id, element):
            if known in found:
                found[known] = "queued" if state in ("PENDING", "CONFIGURING", "REQUEUED", "SUSPENDED") else "running"
    return found


def cancel(submissions: Sequence[Submission]) -> None:
    """End jobs: a running one saves and stops, a queued one leaves the queue."""
    ids = [s.job_id for s in submissions if s.backend == "slurm"]
    if ids:
        _slurm("scancel", *ids)
    local = [s for s in submissions if s.backend == "local"]
    for submission in local:
        Path(submission.folder, CANCELLED).touch()
    for submission in local:
        if _local_state(submission) == "running":
            os.kill(int(submission.job_id), signal.SIGINT)


def preempt(submissions: Sequence[Submission]) -> None:
    """Tell running jobs to save and go back to the queue, as a preemption would."""
    slurm = [s for s in submissions if s.backend == "slurm"]
    if slurm:
        with ThreadPoolExecutor(min(32, len(slurm))) as pool:
            list(pool.map(_signal, slurm))
    for submission in submissions:
        if submission.backend == "local" and _local_state(submission) == "running":
            os.kill(int(submission.job_id), signal.SIGTERM)


def _signal(submission: Submission) -> None:
    """Send SIGTERM to a job of Slurm's.

    While an element of an array waits in the queue, scancel delivers a signal to another element and then goes on
    trying for minutes (seen with 22.05), the first time after 5 s; it would hit the next attempt: it is ended before.
    """
    command = ["scancel", "--signal=TERM", submission.job_id]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SCANCEL_S)
    except subprocess.TimeoutExpired:
        states([submission])  # which fails where it is the controller that does not answer
        return
    if done.returncode:
        raise SubmitError(f"{shlex.join(command)} failed: {done.stderr.strip()}")


def log_paths(submission: Submission) -> list[Path]:
    """Return the files into which the ranks of a job write, by rank."""
    found = Path(submission.folder).glob(f"{submission.job_id}_*_log.out")
    return sorted(found, key=lambda path: int(path.name.removesuffix("_log.out").rsplit("_", 1)[-1]))


def _slurm(*command: str, timeout_s: float = 60) -> str:
    """Run one of Slurm's programs and return what it printed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SubmitError(f"cannot run {command[0]}: {error}. Is this a login node?") from error
    if done.returncode:
        raise SubmitError(f"{shlex.join(command)[:200]} failed: {done.stderr.strip()}")
    return done.stdout


def _is_controller(submission: Submission) -> bool:
    """Whether the process of that number is still the one that was started, and not a later one."""
    try:
        command = Path(f"/proc/{int(submission.job_id)}/cmdline").read_bytes().decode(errors="replace")
    except (OSError, ValueError):
        return False
    return "rsb_cluster.local_controller" in command and submission.folder in command.split("\0")
