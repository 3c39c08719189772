"""A job's setup is a script of its own: its lines stand as they are written, and one that fails is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rsb_cluster.monitor.status import read_status
from rsb_cluster.node.local_queue import QueueSpec
from rsb_cluster.runs.run import Submission
from tests.command import ROOT
from tests.servers.daemons import GUARD_S
from tests.unit.new_runs import make_run

# The controller's place takes a program that says what it finds and is done.
QUEUE = """
import os, sys
from pathlib import Path
from rsb_cluster.node import local_queue
from rsb_cluster.node.processes import Process
local_queue.interpreter = lambda: [sys.executable, "-S", "-c", os.environ["CONTROLLER"]]
print(Process.of(os.getpid()))
local_queue.main(sys.argv[1:])
"""
CONTROLLER = """
import os, sys
_, _, _, job_id, folder = sys.argv
open(folder + "/set-up", "w")
print("A =", os.environ.get("A"))
"""


def run_queue(tmp_path: Path, *setup: str, controller: str = CONTROLLER) -> tuple[str, str]:
    """Run a queue of one job; return the cause that status gives, and the log of rank 0."""
    folder = tmp_path / "queue"
    (folder / "0").mkdir(parents=True)
    QueueSpec(run_ids=("digits-s0",), gpus=(), setup=setup).write(folder)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CONTROLLER": controller}
    command = [sys.executable, "-c", QUEUE, str(folder)]
    done = subprocess.run(command, env=environment, check=True, timeout=GUARD_S, stdout=subprocess.PIPE, text=True)
    job_id = done.stdout.strip()
    run = make_run(tmp_path / "runs")
    run.add_submission(Submission(backend="local", job_id=job_id, folder=str(folder / "0"), shape="", time=1))
    (status,) = read_status([run])
    assert status.state == "never started" and not (folder / "0" / "running").exists()
    return status.cause, (folder / "0" / f"{job_id}_0_log.out").read_text()


def test_setup_lines_are_lines(tmp_path: Path) -> None:
    cause, log = run_queue(tmp_path, "export A=1  # one", "if true", "then export A=2", "fi", "# the last line")
    assert (cause, log) == ("", "A = 2\n")


def test_no_setup_is_no_script(tmp_path: Path) -> None:
    assert run_queue(tmp_path) == ("", "A = None\n")
    assert not (tmp_path / "queue" / "0" / "job.sh").exists()


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        (("true", "module() { ls /nowhere; }", "module load cuda"), "line 3 failed with exit code 2: module load cuda"),
        (("nonesuch --version",), "nonesuch: command not found | line 1 failed with exit code 127: nonesuch --version"),
        (("if then",), "syntax error near unexpected token"),
        (("echo no licence", "exit 0"), "ended with exit code 0: no licence ("),
    ],
    ids=["function", "command", "syntax", "exit"],
)
def test_a_setup_line_that_fails_is_a_failed_start(tmp_path: Path, setup: tuple[str, ...], said: str) -> None:
    cause, log = run_queue(tmp_path, *setup)
    assert cause.startswith("the last start failed before training: the setup (job.setup) ended with exit code ")
    assert said in cause and "A =" not in log


def test_a_controller_that_fails_is_a_failed_start(tmp_path: Path) -> None:
    cause, _ = run_queue(tmp_path, controller="raise ImportError('no submitit')")
    assert "ImportError: no submitit" in cause
