"""The script of a job, and its submission: what sbatch gets.

submitit pickles the tasks and runs them on the nodes, and makes the script. The rest is done here: submitit's executor
would call sbatch in the user's environment, believe the first number that any wrapper prints, and requeue jobs by rules
of its own, which count each preemption of a short job as a time-out and give up after a few.
"""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsb_cluster.backends.slurm import programs
from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError, RefusedError, SubmitError
from rsb_cluster.node import starts
from rsb_cluster.node.exit_codes import EXIT_FAILED, EXIT_RESTART, EXIT_STOPPED
from rsb_cluster.node.task import Task
from rsb_cluster.runs.sharing import make_submission_folder
from rsb_cluster.subprocesses.interpreter import interpreter

SCRIPT = "job.sh"  # in a job's folder of scripts and logs

# Bash must survive the signals of a preemption, as it requeues the job. The trap is ':' and not '': ranks would inherit
# ignored signals.
# Since Slurm 22.05, srun takes --cpus-per-task not from sbatch but from this variable. Without it, on a site that binds
# tasks to cores, a rank and its loader workers would share one core.
# With an option or a variable of the user's that exports nothing to jobs, srun would export nothing to ranks, either.
_SETUP = [
    "trap : TERM USR2",
    'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
    "export SLURM_EXPORT_ENV=ALL",
]

# With 'set -e' of the setup lines, or of a shell that exports SHELLOPTS, the script would end with srun and requeue
# nothing.
_AFTER_SETUP = "set +eu +o pipefail"

# srun reports the highest exit code of all tasks. A job that exits within the grace time has finished for Slurm, so the
# script must requeue it; but not after scancel (the job is no longer RUNNING), and not if Slurm has declared this node
# down and restarted the job elsewhere. Nor if a rank has recorded that this start ended the run permanently: under NCCL
# its peers do not notice, are killed, and have the highest code. Starts that did not become an attempt are counted in a
# file; if that cannot be written, Slurm's count of restarts since the last attempt is used instead. A controller that
# does not answer, as it is being restarted, is asked again for an hour, or until the grace time ends. The requeue ends
# what the script runs by SIGTERM, which must not reach the command that sets the delay.
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
  unset SLURM_CLUSTERS "${{{{!SQUEUE_@}}}}" "${{{{!SCONTROL_@}}}}"
  for try in {{{{1..720}}}}; do
    if answer="$(squeue -h -j "$job" -O State,RestartCnt 2>&1)"; then
      [[ $'\\n'"$answer"$'\\n' =~ $'\\n'\\ *RUNNING\\ +"$restart"\\ *$'\\n' ]] || break
      if answer="$(scontrol requeue "$job" 2>&1)"; then
        [ "$delay" -eq 0 ] || (trap '' TERM; exec scontrol update "JobId=$job" "StartTime=now+$delay")
        sleep 300
        break
      fi
    fi
    case "$answer" in
      *[Cc]ontact*|*[Cc]onnect*|*[Tt]imed?out*|*transmitted*|*standby*|*[Aa]uthentication*)
        [ "$try" -gt 1 ] || echo "slurmctld does not answer, and is asked again for an hour: $answer" >&2
        sleep 5 ;;
      *) echo "the job does not return to the queue, but 'rsb-cluster retry' resumes the run: $answer" >&2; break ;;
    esac
  done
fi
exit "$code\""""

# srun kills the other ranks this long after the first has exited: a stopped process would block the job forever.
WAIT_FOR_RANKS_S = 90

# Options that the job's own fields set; given twice in one script, the spelling would decide which one applies.
_OWN_OPTIONS = {
    "nodes": "nodes", "ntasks": "tasks_per_node", "ntasks-per-node": "tasks_per_node",
    "gpus-per-node": "gpus_per_node", "time": "time_min", "cpus-per-task": "cpus_per_task",
    "signal": "signal_delay_s", "array": "array_parallelism",
    "output": "submissions", "error": "submissions", "no-requeue": "max_preemptions",
    "open-mode": None, "job-name": None, "requeue": None,
    "parsable": None, "wait": None, "wrap": None, "test-only": None,
}  # fmt: skip
# Other ways to request what a field requests, as some sites demand: the option is used instead of the field.
_GPU_OPTIONS = ("gres", "gpus", "gpus-per-task", "gpus-per-socket", "tres-per-task", "tres-per-node")
_MEMORY_OPTIONS = ("mem", "mem-per-cpu", "mem-per-gpu")
# sbatch's one-letter options: in a script they would be written with two dashes, which sbatch refuses, or takes for the
# beginning of another option.
_SHORT_OPTIONS = {
    "a": "array", "A": "account", "b": "begin", "B": "extra-node-info", "c": "cpus-per-task", "C": "constraint",
    "d": "dependency", "D": "chdir", "e": "error", "F": "nodefile", "G": "gpus", "H": "hold", "i": "input",
    "J": "job-name", "k": "no-kill", "L": "licenses", "m": "distribution", "M": "clusters", "n": "ntasks", "N": "nodes",
    "o": "output", "O": "overcommit", "p": "partition", "q": "qos", "s": "oversubscribe", "S": "core-spec", "t": "time",
    "w": "nodelist", "W": "wait", "x": "exclude",
}  # fmt: skip
# Options of srun: given to sbatch, the script itself would run in the container, where there is no Slurm.
_SRUN_OPTIONS = "container"


def sbatch_options(job: Job) -> dict[str, Any]:
    """Return the options of a job file's ``[slurm]``, in Slurm's spelling."""
    return {key.replace("_", "-"): value for key, value in job.slurm.items()}


def make_script(job: Job, folder: Path, name: str, tasks: int) -> str:
    """Return the sbatch script of a job, or of a job array with several tasks.

    Args:
        job: Where to train.
        folder: Folder of scripts and logs.
        name: Name of the job in Slurm.
        tasks: Number of array tasks.

    Raises:
        ConfigError: An option is invalid, or two contradict each other; or sbatch would change the folder's name.
    """
    if "\\" in str(folder):
        raise ConfigError(
            f"job '{job.name}': the scripts and logs cannot be written to {folder}: sbatch drops a '\\' in a path. Use "
            "other --runs, or --set job.submissions=FOLDER."
        )
    from submitit.slurm.slurm import _make_sbatch_string

    parameters = _parameters(job, name) | ({"map_count": tasks} if tasks > 1 else {})
    teardown = _TEARDOWN.format(folder=shlex.quote(str(folder))).splitlines()
    command = f"{_python(job)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    text: str = _make_sbatch_string(command=command, folder=folder, teardown=teardown, **parameters)
    return text


def submit(job: Job, tasks: Sequence[Task], folder: Path, name: str) -> tuple[list[str], str]:
    """Submit tasks as a job, or as a job array if there are several.

    Returns:
        The job id of each task, and the cluster that took the job; empty if neither sbatch nor the user names one.

    Raises:
        RefusedError: Slurm refused the job.
        SubmitError: It may have taken one that is not known.
    """
    from submitit.core.utils import DelayedSubmission, JobPaths

    script = folder / SCRIPT
    pickles = [folder / f"{uuid.uuid4().hex}.pkl" for _ in tasks]
    try:
        make_submission_folder(folder, job)
        script.write_text(make_script(job, folder, name, len(tasks)), encoding="utf-8")
        for task, path in zip(tasks, pickles, strict=True):
            DelayedSubmission(task).dump(path)
    except OSError as error:
        raise SubmitError(f"cannot write into {folder}: {error}. Nothing was submitted.") from error
    options = sbatch_options(job)
    asks = shlex.join(["squeue", *programs.on_cluster(programs.named_cluster(options)), "--me", f"--name={name}"])
    unclear = (
        f"Slurm may have accepted the job all the same: check with '{asks}', and cancel it with scancel before you "
        "submit again."
    )
    try:
        done = programs.run(
            "sbatch", "--parsable", str(script),
            timeout_s=programs.SBATCH_S, env=programs.environment(options), is_held=True,
        )  # fmt: skip
    except programs.NoAnswerError as error:
        raise SubmitError(f"{error}\n{unclear}") from error
    if done.returncode:
        why = programs.why_refused(done)
        if programs.is_unanswered(done):
            raise SubmitError(f"sbatch had no answer: {why}. The script is {script}.\n{unclear}")
        raise RefusedError(
            f"sbatch refused the job: {why}. Check partition, account and limits in the job file; --dry-run shows the "
            "script."
        )
    try:
        number, cluster = _ours(programs.parse_job_ids(done.stdout), script)
        job_ids = [number] if len(tasks) == 1 else [f"{number}_{i}" for i in range(len(tasks))]
        for path, job_id in zip(pickles, job_ids, strict=True):
            path.rename(JobPaths(folder, job_id).submitted_pickle)
    except (OSError, SubmitError) as error:
        raise SubmitError(f"{error}\n{unclear}") from error
    return job_ids, cluster or programs.named_cluster(options)


def _ours(candidates: Sequence[tuple[str, str]], script: Path) -> tuple[str, str]:
    """Return which of several numbers that sbatch printed is our job: the one with our script, or else the last."""
    if len(candidates) == 1:
        return candidates[0]
    job_ids = ",".join(job_id for job_id, _ in candidates)
    try:
        lines = programs.output("squeue", "-h", "-o", "%F|%o", "-j", job_ids).splitlines()
    except SubmitError:
        return candidates[0]
    return next((job for job in candidates if f"{job[0]}|{script}" in lines), candidates[0])


def _parameters(job: Job, name: str) -> dict[str, Any]:
    """Return the arguments of submitit's function that makes the script."""
    options = sbatch_options(job)
    for option in options:
        if len(option) == 1:
            name = f": slurm.{_SHORT_OPTIONS[option]}" if option in _SHORT_OPTIONS else ""
            raise ConfigError(f"job '{job.name}': slurm.{option} is a short option. Use the long name{name}.")
    for option in options.keys() & _OWN_OPTIONS.keys():
        field = _OWN_OPTIONS[option]
        hint = f"Set the job's own field '{field}' instead." if field else "rsb-cluster sets it."
        raise ConfigError(f"job '{job.name}': slurm.{option} cannot be set. {hint}")
    _check_contradictions(job, options)
    parameters: dict[str, Any] = {
        "job_name": name,
        "time": job.time_min,
        "nodes": job.nodes,
        "ntasks_per_node": job.ranks_per_node,
        "cpus_per_task": job.cpus_per_task,
        "signal_delay_s": job.signal_delay_s,
        "stderr_to_stdout": True,
        "array_parallelism": job.array_parallelism,
        "srun_args": [f"--wait={WAIT_FOR_RANKS_S}", *_srun_options(options)],
        "setup": [*_SETUP, *job.setup, _AFTER_SETUP],
        "additional_parameters": {"requeue": True} | _batch_options(options),
        "wckey": None,
    }
    if job.gpus_per_node and not any(option in options for option in _GPU_OPTIONS):
        parameters["gpus_per_node"] = f"{job.gpu_type}:{job.gpus_per_node}" if job.gpu_type else job.gpus_per_node
    if job.is_elastic:
        parameters["additional_parameters"]["nodes"] = f"{job.min_nodes}-{job.nodes}"
    if job.mem_gb:
        parameters["mem"] = f"{int(job.mem_gb * 1024)}MB"
    return parameters


def _check_contradictions(job: Job, options: dict[str, Any]) -> None:
    memory = [*["mem_gb"] * bool(job.mem_gb), *(f"slurm.{option}" for option in _MEMORY_OPTIONS if option in options)]
    if len(memory) > 1:
        raise ConfigError(f"job '{job.name}': {' and '.join(memory)} contradict each other. Keep one of them.")
    other = next((option for option in _GPU_OPTIONS if option in options), "")
    if job.gpu_type and other:
        raise ConfigError(f"job '{job.name}': gpu_type and slurm.{other} both request GPUs. Keep one of them.")


def _batch_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options for sbatch; ``true`` is an option without a value, ``false`` one that is not given."""
    return {key: value for key, value in options.items() if not key.startswith(_SRUN_OPTIONS) and value is not False}


def _srun_options(options: dict[str, Any]) -> list[str]:
    return [
        f"--{key}" if value is True else f"--{key}={value}"
        for key, value in options.items()
        if key.startswith(_SRUN_OPTIONS) and value is not False
    ]


def _python(job: Job) -> str:
    """Return the shell words that start Python on a node.

    A wrapper, such as a container's, gets the signals of a preemption, too; if it does not pass them on but dies of
    them, Slurm kills the rank with it. So it ignores them; a rank has handlers of its own.
    """
    if not job.python:
        return shlex.join(interpreter())
    return f"""sh -c 'trap "" TERM USR2; exec "$@"' sh {job.python} -P"""
