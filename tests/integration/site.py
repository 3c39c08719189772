"""What may surround a Slurm elsewhere: a shell inside an allocation, variables of profiles, and wrappers that talk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from tests.command import RsbCluster
from tests.servers.daemons import GUARD_S
from tests.servers.slurm import SlurmCluster

# Each of these, in the shell that submits, has made a job that could not run, another job, or a job that looked gone.
SHELL = {
    "SLURM_JOB_ID": "4000000", "SLURM_MEM_PER_CPU": "100", "SLURM_ARRAY_JOB_ID": "4000000",
    "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "9", "SLURM_EXPORT_ENV": "NONE", "SBATCH_EXPORT": "NONE",
    "SBATCH_NO_REQUEUE": "1", "SBATCH_TIMELIMIT": "1", "SBATCH_ARRAY_INX": "0-3", "SBATCH_MEM_PER_CPU": "1",
    "SQUEUE_STATES": "PENDING", "SQUEUE_USERS": "nobody", "SQUEUE_FORMAT": "%A", "SQUEUE_PARTITION": "spot",
    "SUBMITIT_EXECUTOR": "local", "RSB_LOCAL_RESTART": "7", "SLURM_TIME_FORMAT": "relative",
}  # fmt: skip

TALKS = """\
#!/bin/bash
echo 'Welcome. Each user may have'
echo 1
{real} "$@"
code=$?
echo "Your quota: 400 hours."
exit $code
"""

# So that a test can do something when the job's script is about to ask.
WAITS = """\
#!/bin/bash
while [ -e {gate} ]; do sleep 0.1; done
exec {real} "$@"
"""

# A wrapper that is not replaced by what it starts, as a container's is not: the signals of a preemption would end it.
FORKS = """\
#!/bin/bash
"$@"
exit $?
"""


class Site:
    """Wrappers of Slurm's programs, and a wrapper of Python, for the commands of a test."""

    def __init__(self, rsb: RsbCluster, slurm: SlurmCluster) -> None:
        self._rsb, self._slurm = rsb, slurm
        self._gate = rsb.cwd / "gate"
        folder = rsb.cwd / "site"
        folder.mkdir()
        self.python = f"{folder}/container-of {sys.executable}"
        for name, text in (("sbatch", TALKS), ("squeue", WAITS), ("container-of", FORKS)):
            (folder / name).write_text(text.format(real=shutil.which(name), gate=self._gate))
            (folder / name).chmod(0o755)
        rsb.env["PATH"] = f"{folder}:{os.environ['PATH']}"

    def submit_inside_an_allocation(self, *args: str) -> str:
        """Submit from a shell that a job has opened, in which a profile sets what profiles set; return the output."""
        inside = ["env", *(f"{name}={value}" for name, value in SHELL.items() if name not in self._rsb.env)]
        command = ["salloc", "-Q", "-n1", "--mem=100", *inside, sys.executable, "-m", "rsb_cluster", "submit", *args]
        done = subprocess.run(
            command, cwd=self._rsb.cwd, env=self._rsb.env, capture_output=True, text=True, timeout=GUARD_S
        )
        assert done.returncode == 0, done.stderr
        self.said = done.stderr
        return done.stdout.strip()

    def hold_squeue(self) -> None:
        """Have squeue wait, on nodes as well."""
        self._gate.touch()

    def restart_controller(self) -> None:
        """Stop slurmctld, let squeue go on until the job's script has noticed, and start slurmctld again."""
        self._slurm.stop_controller()
        self._gate.unlink()
        self._slurm.wait_for("the script asks", lambda: "slurmctld does not answer" in self._rsb.logs() or None)
        self._slurm.start_controller()
