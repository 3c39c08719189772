"""Slurm: all calls of its programs, by this package and through submitit.

submitit's own requeueing is not used, as it counts each preemption of a short job as a time-out and gives up after a
few: the task installs its own signal handlers, and the job script requeues the job.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rsb_cluster.backends.base import Backend, Check, JobStatus, State, new_submission
from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError, SubmitError
from rsb_cluster.node import starts
from rsb_cluster.node.exit_codes import EXIT_FAILED, EXIT_RESTART, EXIT_STOPPED
from rsb_cluster.node.task import Task
from rsb_cluster.runs.run import Submission
from rsb_cluster.subprocesses.interpreter import interpreter

DEFAULT_ARRAY_SIZE = 1001  # slurm.conf(5)
SCANCEL_S = 4.0  # time limit of scancel

# Bash must survive the signals of a preemption, as it requeues the job. The trap is ':' and not '': ranks would inherit
# ignored signals.
# Since Slurm 22.05, srun takes --cpus-per-task not from sbatch but from this variable. Without it, on a site that binds
# tasks to cores, a rank and its loader workers would share one core.
_SETUP = ["trap : TERM USR2", 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"']

# srun reports the highest exit code of all tasks. A job that exits within the grace time has finished for Slurm, so the
# script must requeue it; but not after scancel (the job is no longer RUNNING), and not if Slurm has declared this node
# down and restarted the job elsewhere. Nor if a rank has recorded that this start ended the run permanently: under NCCL
# its peers do not notice, are killed, and have the highest code. Starts that did not become an attempt are counted in a
# file; if that cannot be written, Slurm's count of restarts since the last attempt is used instead.
_TEARDOWN = f"""\
code=$?
job="${{{{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}}}${{{{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}}}"
restart="${{{{SLURM_RESTART_COUNT:-0}}}}"
record={{folder}}/"$job"
recorded() {{{{ [ "$(cat "${{{{record}}}}_$1" 2>/dev/null)" = "$restart" ]; }}}}
if recorded {starts.ENDED}; then exit "$code"; fi
delay=0
if [ "$code" -ne 0 ] && ! recorded {starts.CLAIMED}; then
  if {{{{ echo "$restart $code" >>"${{{{record}}}}_{starts.STARTS}"; }}}} 2>/dev/null
  then failed=$(wc -l <"${{{{record}}}}_{starts.STARTS}")
  else last=$(cat "${{{{record}}}}_{starts.CLAIMED}" 2>/dev/null); failed=$((restart - ${{{{last:--1}}}})); fi
  if [ "$failed" -ge {starts.LIMIT} ]; then
    echo "$failed starts in a row ended before training, the last with code $code; giving up" >&2
    exit {EXIT_FAILED}
  fi
  delay=$(({starts.SLURM_DELAY_S} << (failed - 1)))
fi
if [ "$code" -eq {EXIT_RESTART} ] || {{{{ [ "$code" -gt 128 ] && [ "$code" -ne {EXIT_STOPPED} ]; }}}}; then
  read -r state restarts <<<"$(squeue -h -j "$job" -O State,RestartCnt)"
  if [ "$state $restarts" = "RUNNING $restart" ]; then
    scontrol requeue "$job" || exit "$code"
    [ "$delay" -eq 0 ] || scontrol update "JobId=$job" "StartTime=now+$delay"
    sleep 300
  fi
fi
exit "$code\""""

# srun kills the other ranks this long after the first has exited: a stopped process would block the job forever.
WAIT_FOR_RANKS_S = 90

# Slurm's states of jobs that are not running; empty for a job that is not in the queue.
_STATE_OF: dict[str, State] = {
    "": "gone", "PENDING": "queued", "CONFIGURING": "queued", "REQUEUED": "queued", "SUSPENDED": "queued",
}  # fmt: skip

# Options that the job's own fields set; given twice in one script, the spelling would decide which one applies.
_OWN_OPTIONS = {
    "nodes": "nodes", "ntasks-per-node": "tasks_per_node", "gpus-per-node": "gpus_per_node", "time": "time_min",
    "cpus-per-task": "cpus_per_task", "mem": "mem_gb", "signal": "signal_delay_s", "array": "array_parallelism",
    "output": "submissions", "error": "submissions", "open-mode": None, "job-name": None, "requeue": None,
}  # fmt: skip


class Slurm(Backend):
    """The back end ``slurm``."""

    name = "slurm"
    script_title = "sbatch script"
    can_run_after = True

    def check_job(self, job: Job) -> None:
        """Accept every job: invalid options are found when the script is made."""

    def doctor_checks(self) -> Mapping[str, Check]:
        """Check with ``sbatch --test-only`` whether Slurm would accept the job, and show its limits."""

        def accepts(job: Job) -> str:
            self.check_available(job)
            return self.test_only(job)

        return {
            "Slurm accepts the job": accepts,
            "job arrays": lambda job: f"up to {self.max_array_size():,} tasks per job array",
        }

    def exclude_hosts(self, job: Job, hosts: Sequence[str]) -> Job:
        """Return a copy of the job with the hosts added to its option ``exclude``."""
        excluded = [str(job.slurm["exclude"])] if "exclude" in job.slurm else []
        return job.model_copy(update={"slurm": {**job.slurm, "exclude": ",".join([*excluded, *hosts])}})

    def check_available(self, job: Job) -> None:
        """Refuse if Slurm's programs are not installed."""
        if not shutil.which("sbatch"):
            raise SubmitError(
                "there is no 'sbatch' on this machine. Submit from a login node of the cluster, or use --job local."
            )

    def max_array_size(self) -> int:
        """Return the site's ``MaxArraySize``, or Slurm's default if it is unknown."""
        try:
            config = _output("scontrol", "show", "config", timeout_s=5)
        except SubmitError:  # a dry run works on any machine
            return DEFAULT_ARRAY_SIZE
        match = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
        return int(match[1]) if match else DEFAULT_ARRAY_SIZE

    def script(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> str:
        """Return the sbatch script that ``submit`` submits."""
        from submitit.slurm.slurm import _make_sbatch_string

        parameters = _parameters(job, folder, name) | ({"map_count": len(tasks)} if len(tasks) > 1 else {})
        command = f"{shlex.join(interpreter())} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        text: str = _make_sbatch_string(command=command, folder=folder, **parameters)
        return text

    def test_only(self, job: Job) -> str:
        """Return the answer of ``sbatch --test-only``, which submits nothing.

        Raises:
            SubmitError: Slurm would refuse the job.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "job.sh"
            path.write_text(self.script(job, [Task("/", "doctor", {})], Path(folder), "doctor"))
            done = _run("sbatch", "--test-only", str(path))
        answer = (done.stderr.strip().splitlines() or [""])[-1].removeprefix("sbatch: ")
        if done.returncode:
            raise SubmitError(f"sbatch would refuse it: {answer}. Check partition, account and limits in the job file.")
        return answer

    def submit(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> list[Submission]:
        """Submit runs as one job or one job array.

        Args:
            job: Where to train.
            tasks: One per run.
            folder: New folder for scripts and logs, on a file system that all nodes share.
            name: Name of the job in Slurm.

        Raises:
            SubmitError: Slurm refused the job.
        """
        folder.mkdir(mode=0o700, parents=True)
        job_ids = _submit(job, tasks, folder, name)
        return [new_submission(job, job_id, folder, t.data) for job_id, t in zip(job_ids, tasks, strict=True)]

    def query(self, submissions: Sequence[Submission]) -> list[JobStatus]:
        """Return the status of jobs; one squeue for all."""
        return [JobStatus(_STATE_OF.get(state, "running")) for state in _states(submissions)]

    def cancel(self, submissions: Sequence[Submission]) -> list[str]:
        """Cancel jobs: a running one saves and stops, a queued one leaves the queue. Return why not, for each.

        scancel fails as a whole if it could not signal one of many jobs; in some versions also if one has already
        ended. Jobs that were signalled all the same are completing, or no longer in the queue.
        """
        try:
            _output("scancel", *(submission.job_id for submission in submissions))
        except SubmitError as error:
            return ["" if state in ("", "COMPLETING") else str(error) for state in _states(submissions)]
        return [""] * len(submissions)

    def preempt(self, submissions: Sequence[Submission]) -> None:
        """Preempt running jobs: they save and return to the queue."""
        with ThreadPoolExecutor(min(32, len(submissions))) as pool:
            list(pool.map(_send_signal, submissions))

    def cancel_command(self, submissions: Sequence[Submission]) -> str:
        """Return a shell command that cancels jobs."""
        return f"scancel {' '.join(submission.job_id for submission in submissions)}"

    def run_after(
        self, job: Job, submissions: Sequence[Submission], command: Sequence[str], folder: Path, name: str
    ) -> str:
        """Submit a job that runs a command when all these jobs have ended, successfully or not; return its id.

        It requests one CPU, with the account and the partition of the job. A requeued job has not ended.

        Raises:
            SubmitError: Slurm refused the job.
        """
        self.check_available(job)
        arrays = dict.fromkeys(submission.job_id.partition("_")[0] for submission in submissions)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        site = [f"--{key}={value}" for key, value in job.slurm.items() if key in ("account", "partition", "qos")]
        options = [*site, f"--job-name={name}", f"--output={folder}/%j.log", "--time=60", "--ntasks=1", "--mem=4G"]
        lines = "\n".join([*job.setup, shlex.join(command)])
        answer = _output("sbatch", "--parsable", f"--dependency=afterany:{':'.join(arrays)}", *options, "--wrap", lines)
        return answer.strip().partition(";")[0]


def _parameters(job: Job, folder: Path, name: str) -> dict[str, Any]:
    options = {key.replace("_", "-"): value for key, value in job.slurm.items()}
    for option in options.keys() & _OWN_OPTIONS.keys():
        field = _OWN_OPTIONS[option]
        hint = f"Set the job's own field '{field}' instead." if field else "rsb-cluster sets it."
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
        "teardown": _TEARDOWN.format(folder=shlex.quote(str(folder))).splitlines(),
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


def _submit(job: Job, tasks: Sequence[Task], folder: Path, name: str) -> list[str]:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder, python=shlex.join(interpreter()))
    executor.update_parameters(**_parameters(job, folder, name))
    try:
        jobs = executor.submit_array(list(tasks))
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        reason = str(error).strip().splitlines()
        raise SubmitError(
            f"sbatch refused the job: {reason[-1] if reason else error!r}. Check partition, account and limits in the "
            f"job file ('rsb-cluster jobs show {job.name}'); the script is in {folder}."
        ) from error
    except OSError as error:
        raise SubmitError(
            f"cannot write into {folder}: {error}. Slurm may have accepted the job all the same: check with "
            f"'squeue --me --name={name}', and cancel it with scancel before you submit again."
        ) from error
    return [str(j.job_id) for j in jobs]


def _states(submissions: Sequence[Submission]) -> list[str]:
    """Return Slurm's state of each job; empty for a job that is no longer in the queue."""
    job_ids = [submission.job_id for submission in submissions]
    parents = sorted({job_id.split("_")[0] for job_id in job_ids})
    done = _run("squeue", "-h", "-r", "-o", "%i|%F_%K|%T", "-j", ",".join(parents))
    # squeue fails if it knows none of the jobs; then all of them have left the queue.
    if done.returncode and "Invalid job id" not in done.stderr:
        raise SubmitError(f"squeue failed: {done.stderr.strip()}. Is slurmctld running?")
    found = dict.fromkeys(job_ids, "")
    for line in done.stdout.splitlines():
        job_id, array_task, state = line.strip().split("|")
        for known in (job_id, array_task):
            if known in found:
                found[known] = state
    return [found[job_id] for job_id in job_ids]


def _send_signal(submission: Submission) -> None:
    """Send SIGTERM to a job.

    While another task of the same array is pending, scancel delivers the signal and then retries for minutes (seen
    with 22.05), the first time after 5 s. A retry would hit the next attempt, so scancel is killed before.
    """
    try:
        done = _run("scancel", "--signal=TERM", submission.job_id, timeout_s=SCANCEL_S)
    except _TimeoutError:
        _states([submission])  # raises if it was slurmctld that did not answer
        return
    if done.returncode and _states([submission]) not in ([""], ["COMPLETING"]):  # else it has just ended
        raise _failed(done)


class _TimeoutError(SubmitError):
    """A program did not exit in time."""


def _run(*command: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs; all calls but submitit's sbatch come through here.

    Raises:
        SubmitError: The program is not installed, or did not exit in time. The caller checks the exit code.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except OSError as error:
        raise SubmitError(f"cannot run {command[0]}: {error}. Is this a login node?") from error
    except subprocess.TimeoutExpired as error:
        raise _TimeoutError(
            f"{command[0]} did not answer within {timeout_s:g} s. Is this a login node, and is slurmctld running?"
        ) from error


def _output(*command: str, timeout_s: float = 60.0) -> str:
    """Run one of Slurm's programs and return its output. Raises SubmitError if it fails."""
    done = _run(*command, timeout_s=timeout_s)
    if done.returncode:
        raise _failed(done)
    return done.stdout


def _failed(done: subprocess.CompletedProcess[str]) -> SubmitError:
    return SubmitError(f"{shlex.join(done.args)[:200]} failed: {done.stderr.strip()}")
