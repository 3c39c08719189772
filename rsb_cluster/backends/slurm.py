"""Slurm. All of it is here, and what submitit does for it.

A job is never ended by submitit's own count of time-outs (it takes every preemption of a short job for one): the task
installs its own signal handlers, and the script asks Slurm to start the job again.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
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
# Slurm has held this host for dead and started the job elsewhere. Nor where a rank has noted that this start ended the
# run for good: under NCCL its peers notice nothing, are killed, and theirs is the highest code. A start that became no
# attempt is counted in a file; where that cannot be written, Slurm's count of restarts since the last attempt must do.
_TEARDOWN = f"""\
code=$?
job="${{{{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}}}${{{{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}}}"
restart="${{{{SLURM_RESTART_COUNT:-0}}}}"
notes={{folder}}/"$job"
said() {{{{ [ "$(cat "${{{{notes}}}}_$1" 2>/dev/null)" = "$restart" ]; }}}}
if said {starts.ENDED}; then exit "$code"; fi
later=0
if [ "$code" -ne 0 ] && ! said {starts.CLAIMED}; then
  if {{{{ echo "$restart $code" >>"${{{{notes}}}}_{starts.STARTS}"; }}}} 2>/dev/null
  then failed=$(wc -l <"${{{{notes}}}}_{starts.STARTS}")
  else last=$(cat "${{{{notes}}}}_{starts.CLAIMED}" 2>/dev/null); failed=$((restart - ${{{{last:--1}}}})); fi
  if [ "$failed" -ge {starts.LIMIT} ]; then
    echo "$failed starts in a row ended before training, the last with code $code; giving up" >&2
    exit {EXIT_FAILED}
  fi
  later=$(({starts.SLURM_DELAY_S} << (failed - 1)))
fi
if [ "$code" -eq {EXIT_RESTART} ] || {{{{ [ "$code" -gt 128 ] && [ "$code" -ne {EXIT_STOPPED} ]; }}}}; then
  read -r state restarts <<<"$(squeue -h -j "$job" -O State,RestartCnt)"
  if [ "$state $restarts" = "RUNNING $restart" ]; then
    scontrol requeue "$job" || exit "$code"
    [ "$later" -eq 0 ] || scontrol update "JobId=$job" "StartTime=now+$later"
    sleep 300
  fi
fi
exit "$code\""""

# So long after the first rank has ended the others are killed: one that is stopped would keep the job for ever.
WAIT_FOR_RANKS_S = 90

# Slurm's words for jobs that do not run; one that is not in its queue has none.
_STATE_OF: dict[str, State] = {
    "": "gone", "PENDING": "queued", "CONFIGURING": "queued", "REQUEUED": "queued", "SUSPENDED": "queued",
}  # fmt: skip

# Options that the job's own fields decide; twice in one script, the loser would depend on the spelling.
_OWN_OPTIONS = {
    "nodes": "nodes", "ntasks-per-node": "tasks_per_node", "gpus-per-node": "gpus_per_node", "time": "time_min",
    "cpus-per-task": "cpus_per_task", "mem": "mem_gb", "signal": "signal_delay_s", "array": "array_parallelism",
    "output": "submissions", "error": "submissions", "open-mode": None, "job-name": None, "requeue": None,
}  # fmt: skip


class Slurm(Backend):
    """The back end ``slurm``."""

    name = "slurm"
    script_title = "sbatch script"
    can_exclude_hosts = True
    can_run_after = True

    def check_job(self, job: Job) -> None:
        """Nothing is refused here: what cannot be is found when the script is made."""

    def doctor_checks(self) -> Mapping[str, Check]:
        """Ask Slurm for its opinion of the job, and for its limits."""

        def takes_it(job: Job) -> str:
            self.check_available(job)
            return self.test_only(job)

        return {
            "Slurm takes the job": takes_it,
            "job arrays": lambda job: f"up to {self.max_array_size():,} runs in a job array",
        }

    def exclude_hosts(self, job: Job, hosts: Sequence[str]) -> Job:
        """Return the job with more hosts in its option ``exclude``."""
        already = [str(job.slurm["exclude"])] if "exclude" in job.slurm else []
        return job.model_copy(update={"slurm": {**job.slurm, "exclude": ",".join([*already, *hosts])}})

    def check_available(self, job: Job) -> None:
        """Refuse where Slurm's programs are missing."""
        if not shutil.which("sbatch"):
            raise SubmitError(
                "there is no 'sbatch' on this machine. Submit from a login node of the cluster, or use --job local."
            )

    def max_array_size(self) -> int:
        """Return how many runs the site takes in one job array; Slurm's own default where it does not say."""
        try:
            shown = _output("scontrol", "show", "config", timeout_s=5)
        except SubmitError:  # a dry run is made on any machine
            return DEFAULT_ARRAY_SIZE
        answer = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
        return int(answer[1]) if answer else DEFAULT_ARRAY_SIZE

    def script(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> str:
        """Return the sbatch script; the one that ``submit`` hands over."""
        from submitit.slurm.slurm import _make_sbatch_string

        parameters = _parameters(job, folder, name) | ({"map_count": len(tasks)} if len(tasks) > 1 else {})
        text: str = _make_sbatch_string(command=f"{_COMMAND} {shlex.quote(str(folder))}", folder=folder, **parameters)
        return text

    def test_only(self, job: Job) -> str:
        """Ask Slurm whether it would take the job, without sending it; return its answer.

        Raises:
            SubmitError: It would not.
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
        """Hand runs over as one job, or one array.

        Args:
            job: Where.
            tasks: One per run.
            folder: New folder for scripts and logs, on a file system that all nodes share.
            name: What Slurm shows.

        Raises:
            SubmitError: Slurm refused.
        """
        folder.mkdir(mode=0o700, parents=True)
        return [new_submission(job, job_id, folder) for job_id in _submit(job, tasks, folder, name)]

    def query(self, submissions: Sequence[Submission]) -> list[JobStatus]:
        """Return how jobs are; one query for all."""
        return [JobStatus(_STATE_OF.get(word, "running")) for word in _states(submissions)]

    def cancel(self, submissions: Sequence[Submission]) -> list[str]:
        """End jobs: a running one saves and stops, a queued one leaves the queue. Return why not, for each.

        scancel fails as a whole where it could not signal one of many; in some versions also where one has ended by
        itself. The queue tells which were told: they are out of it, or completing.
        """
        try:
            _output("scancel", *(submission.job_id for submission in submissions))
        except SubmitError as error:
            return ["" if word in ("", "COMPLETING") else str(error) for word in _states(submissions)]
        return [""] * len(submissions)

    def preempt(self, submissions: Sequence[Submission]) -> None:
        """Tell running jobs to save and go back to the queue, as a preemption would."""
        with ThreadPoolExecutor(min(32, len(submissions))) as pool:
            list(pool.map(_send_signal, submissions))

    def cancel_command(self, submissions: Sequence[Submission]) -> str:
        """Return the command that ends jobs without us."""
        return f"scancel {' '.join(submission.job_id for submission in submissions)}"

    def run_after(
        self, job: Job, submissions: Sequence[Submission], command: Sequence[str], folder: Path, name: str
    ) -> str:
        """Have Slurm run a command once when all these jobs have ended, however they did; return its job's id.

        It asks for one CPU, with the account and the partition of the job. A requeue is no end.

        Raises:
            SubmitError: The scheduler refused.
        """
        self.check_available(job)
        arrays = dict.fromkeys(submission.job_id.partition("_")[0] for submission in submissions)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        where = [f"--{key}={value}" for key, value in job.slurm.items() if key in ("account", "partition", "qos")]
        options = [*where, f"--job-name={name}", f"--output={folder}/%j.log", "--time=60", "--ntasks=1", "--mem=4G"]
        lines = "\n".join([*job.setup, shlex.join(command)])
        answer = _output("sbatch", "--parsable", f"--dependency=afterany:{':'.join(arrays)}", *options, "--wrap", lines)
        return answer.strip().partition(";")[0]


def _parameters(job: Job, folder: Path, name: str) -> dict[str, Any]:
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

    executor = submitit.SlurmExecutor(folder)
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
            f"cannot write into {folder}: {error}. Slurm may have taken the job all the same: look with "
            f"'squeue --me --name={name}', and end it with scancel before you submit again."
        ) from error
    return [str(j.job_id) for j in jobs]


def _states(submissions: Sequence[Submission]) -> list[str]:
    """Return Slurm's own word for the state of each job; empty for one that is not in its queue any more."""
    job_ids = [submission.job_id for submission in submissions]
    parents = sorted({job_id.split("_")[0] for job_id in job_ids})
    done = _run("squeue", "-h", "-r", "-o", "%i|%F_%K|%T", "-j", ",".join(parents))
    # Jobs that left the queue make squeue fail when it knows none of them; that is an answer, too.
    if done.returncode and "Invalid job id" not in done.stderr:
        raise SubmitError(f"squeue failed: {done.stderr.strip()}. Is the controller up?")
    found = dict.fromkeys(job_ids, "")
    for line in done.stdout.splitlines():
        job_id, array_task, word = line.strip().split("|")
        for known in (job_id, array_task):
            if known in found:
                found[known] = word
    return [found[job_id] for job_id in job_ids]


def _send_signal(submission: Submission) -> None:
    """Send SIGTERM to a job of Slurm's.

    While a task of an array waits in the queue, scancel delivers a signal to another task of it and then goes on
    trying for minutes (seen with 22.05), the first time after 5 s; it would hit the next attempt: it is ended before.
    """
    try:
        done = _run("scancel", "--signal=TERM", submission.job_id, timeout_s=SCANCEL_S)
    except _SlowError:
        _states([submission])  # which fails where it is the controller that does not answer
        return
    if done.returncode and _states([submission]) not in ([""], ["COMPLETING"]):  # it has just ended
        raise _failed(done)


class _SlowError(SubmitError):
    """A program did not end in time."""


def _run(*command: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs; all are run here, but the sbatch of submitit.

    Raises:
        SubmitError: It is not here, or did not end in time. An exit code is for the caller to judge.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except OSError as error:
        raise SubmitError(f"cannot run {command[0]}: {error}. Is this a login node?") from error
    except subprocess.TimeoutExpired as error:
        raise _SlowError(
            f"{command[0]} did not answer within {timeout_s:g} s. Is this a login node, and is the controller up?"
        ) from error


def _output(*command: str, timeout_s: float = 60.0) -> str:
    """Run one of Slurm's programs that must succeed, and return what it printed."""
    done = _run(*command, timeout_s=timeout_s)
    if done.returncode:
        raise _failed(done)
    return done.stdout


def _failed(done: subprocess.CompletedProcess[str]) -> SubmitError:
    return SubmitError(f"{shlex.join(done.args)[:200]} failed: {done.stderr.strip()}")
