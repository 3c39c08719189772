"""A node on which the sbatch script runs, with replacements of Slurm's programs that record their calls."""

import os
import subprocess
from pathlib import Path

from rsb_cluster.backends.slurm.script import make_script
from rsb_cluster.config.job import Job
from tests.servers.daemons import GUARD_S

STUBS = {
    # Its rank 0 notes that this start became an attempt.
    "srun": 'touch "$OUT/srun"; echo "$SRUN_CPUS_PER_TASK" >"$OUT/cpus"; echo "$SLURM_EXPORT_ENV" >"$OUT/export"; '
    'echo "${SLURM_RESTART_COUNT:-0}" | tee "$OUT/7_claimed" >"$OUT/5_0_claimed"; eval "$SRUN_DOES"; exit "$CODE"',
    "squeue": 'echo "$@" >>"$OUT/squeue"; env | grep SQUEUE_ >>"$OUT/squeue_env"; eval "$DOES_SQUEUE"; '
    'printf "%-20s%-20s\\n" $STATE "${RESTARTS:-0}"',
    "scontrol": 'echo "$@" >>"$OUT/scontrol"; eval "$DOES_SCONTROL"',
    "sleep": 'echo "$@" >>"$OUT/sleep"',
}


class Node:
    """A node on which the script runs."""

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, body in STUBS.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / "bin" / name).chmod(0o755)
        (folder / "script").write_text(make_script(job, folder, "a1", 1))

    def start(self, code: int, state: str, **env: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}", "OUT": str(self.folder), "CODE": str(code),
            "STATE": state, "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8",
        } | env  # fmt: skip
        command = ["bash", str(self.folder / "script")]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def run(self, code: int, state: str, **env: str) -> int:
        process = self.start(code, state, **env)
        _, said = process.communicate(timeout=GUARD_S)
        assert said == ""
        return process.returncode

    def calls(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []
