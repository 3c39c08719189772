"""A rank that is told to stop before it knows anything."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rsb_cluster.exits import EXIT_AGAIN
from tests.command import ROOT
from tests.faults.lab import Lab

# A rank as submitit starts it on this machine, but for its handlers, which end a run; the signal comes with the first
# line of torch, whose import takes seconds.
RANK = """
import json, os, sys
from rsb_cluster.task import Task
class Preempts:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(sys.argv[1]))
sys.meta_path.insert(0, Preempts())
Task(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))()
"""
LOCAL = {"JOB_ID": "lab", "NTASKS": "1", "JOB_NUM_NODES": "1", "NODEID": "0", "GLOBALID": "0", "LOCALID": "0"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2], ids=lambda number: number.name)
def test_a_preemption_while_torch_is_imported_saves_and_comes_again(
    tmp_path: Path, tiny_digits: Path, number: signal.Signals
) -> None:
    lab = Lab(tmp_path / "run", tiny_digits)
    env = {f"SUBMITIT_LOCAL_{name}": value for name, value in LOCAL.items()}
    env |= {"SUBMITIT_EXECUTOR": "local", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RANK, str(int(number)), lab.run.url, lab.run.run_id, lab.job.model_dump_json()]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == EXIT_AGAIN, done.stderr
    (attempt,) = lab.run.attempts()
    assert (attempt.cause, attempt.end_step) == ("preempted", 1)
    assert lab.attempt().start_step == 1
