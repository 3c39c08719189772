"""Slurm's programs: every call of one is made here, in an environment that does not depend on the user's shell.

Many of their options are also read from the environment. A shell inside an allocation (JupyterHub, an editor on a node,
``salloc``) has dozens of ``SLURM_*`` variables of that job, which a job submitted from there would inherit; others come
from profiles, such as ``SQUEUE_STATES``, with which a running job looks gone.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Collection, Mapping
from typing import Any

from rsb_cluster.errors import SubmitError

# Where and as whom to talk to Slurm.
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
# What a site sets for its users, by the option of sbatch: it holds where the job file says nothing. sbatch itself would
# prefer it to the job's script.
_SITE_DEFAULTS = {
    "SBATCH_ACCOUNT": "account", "SBATCH_PARTITION": "partition", "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation", "SLURM_CLUSTERS": "clusters",
}  # fmt: skip
_OURS = re.compile(r"(SLURM|SLURMD|SBATCH|SALLOC|SRUN|SQUEUE|SCANCEL|SACCT|SCONTROL|SINFO|SUBMITIT|RSB_LOCAL)_.*")

# A job's times as Unix times, whatever the time zones of the machines.
_FIXED = {"SLURM_TIME_FORMAT": "%s"}

TIMEOUT_S = 60.0
# sbatch itself tries again for two minutes where slurmctld is busy ("sleeping and retrying").
SBATCH_S = 300.0

# sbatch's messages after which slurmctld may have the job all the same (slurm_errno.c), but no "contact support".
_NO_ANSWER = re.compile(
    r"(?i)timed.?out|unable to contact|not respond|communicat|connection|connect failure|(receive|send) failure"
    r"|transmitted"
)
_JOB_ID = re.compile(r"(Submitted batch job )?([1-9]\d*)(?:(?:;| on cluster )([\w.-]+))?")
_HOLD = ("sh", "-c", "trap '' INT TERM HUP; exec \"$@\"", "sh")
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class NoAnswerError(SubmitError):
    """A program did not exit in time."""


def site_defaults(options: Collection[str]) -> dict[str, str]:
    """Return the variables of this shell that sbatch reads and that hold, as the job sets none of these options."""
    return {
        name: os.environ[name]
        for name, option in _SITE_DEFAULTS.items()
        if os.environ.get(name) and option not in options
    }


def ignored_variables(options: Collection[str]) -> dict[str, str]:
    """Return the variables of this shell that would have changed the job, and do not."""
    kept = site_defaults(options)
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("SBATCH_") and name not in kept and value
    }


def environment(options: Collection[str] = ()) -> dict[str, str]:
    """Return the environment of Slurm's programs.

    Args:
        options: The options of sbatch that the job sets; a site's default for one of them is left out.
    """
    kept = {*_KEPT, *site_defaults(options)}
    return {name: value for name, value in os.environ.items() if name in kept or not _OURS.fullmatch(name)} | _FIXED


def on_cluster(cluster: str) -> list[str]:
    """Return the option of Slurm's programs for a cluster; nothing for the default one."""
    return [f"--clusters={cluster}"] if cluster else []


def named_cluster(options: Mapping[str, Any]) -> str:
    """Return the one cluster that the job or this shell names; empty if there is none, or a choice."""
    named = str(options.get("clusters") or os.environ.get("SLURM_CLUSTERS", ""))
    return named if re.fullmatch(r"[\w.-]+", named) and named != "all" else ""


def run(
    *command: str, timeout_s: float = TIMEOUT_S, env: Mapping[str, str] | None = None, is_held: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs.

    Args:
        command: The program and its arguments.
        timeout_s: How long it may take, seconds.
        env: Its environment; default: that of a program that submits nothing.
        is_held: Whether Ctrl-C and the end of the terminal do not end it, as it must say which job it queued.

    Raises:
        SubmitError: The program is not installed, or did not exit in time. The caller checks the exit code.
    """
    try:
        return subprocess.run(
            [*_HOLD, *command] if is_held else command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            # A job whose cluster is not named is on the default one, whatever the shell is set to by now.
            env=environment(("clusters",)) if env is None else env,
        )
    except OSError as error:
        raise SubmitError(f"cannot run {command[0]}: {error}. Is this a login node?") from error
    except subprocess.TimeoutExpired as error:
        raise NoAnswerError(
            f"{command[0]} did not answer within {timeout_s:g} s. Is this a login node, and is slurmctld running?"
        ) from error


def output(*command: str, timeout_s: float = TIMEOUT_S, env: Mapping[str, str] | None = None) -> str:
    """Run one of Slurm's programs and return its output. Raises SubmitError if it fails."""
    done = run(*command, timeout_s=timeout_s, env=env)
    if done.returncode:
        raise failed(done)
    return done.stdout


def failed(done: subprocess.CompletedProcess[str]) -> SubmitError:
    """Return the error for a program that failed."""
    said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
    return SubmitError(f"{shlex.join(done.args)[:200]} failed: {said}")


def why_refused(done: subprocess.CompletedProcess[str]) -> str:
    """Return why sbatch failed, in one line.

    All that it said: what a site's plugin tells the user stands before Slurm's own "Unspecified error", and what a
    wrapper says after it.
    """
    lines = done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
    said = (re.sub(r"^(sbatch: )?(error: )?", "", _COLOURS.sub("", line).strip()) for line in lines)
    return "; ".join(line.rstrip(".") for line in said if line)


def is_unanswered(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether an sbatch that failed may have queued the job: slurmctld did not answer it, or it was killed."""
    return done.returncode < 0 or done.returncode > 128 or bool(_NO_ANSWER.search(done.stderr or done.stdout))


def parse_job_ids(answer: str) -> list[tuple[str, str]]:
    """Return what may be the job id, and its cluster or an empty string, in the answer of ``sbatch --parsable``.

    A site's wrapper may print other lines, before or after, in colours, and the id as sbatch does without the option.

    Returns:
        The likeliest first; several only if there are several lines that are no more than a number.

    Raises:
        SubmitError: There is no job id.
    """
    matches = [_JOB_ID.fullmatch(line.strip()) for line in _COLOURS.sub("", answer).splitlines()]
    found = {(match[2], match[3] or ""): bool(match[1] or match[3]) for match in reversed(matches) if match}
    if not found:
        raise SubmitError(f"sbatch did not say which job it queued: {answer.strip()[-500:]!r}")
    certain = [job for job, is_certain in found.items() if is_certain]
    return certain[:1] or list(found)
