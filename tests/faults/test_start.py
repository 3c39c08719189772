"""A rank that gets a signal while it imports torch, and starts that fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rsb_cluster.monitor.status import read_status
from rsb_cluster.node.exit_codes import EXIT_RESTART
from rsb_cluster.runs.run import Submission
from rsb_cluster.train.causes import EXIT_CODES
from tests.command import ROOT
from tests.faults.lab import Lab, fill
from tests.servers.daemons import GUARD_S

# A rank as submitit starts it on this machine, but for its handlers, which end a run; something happens with the first
# line of torch, whose import takes seconds.
RANK = """
import json, os, sys
from rsb_cluster.node.task import Task
from tests.servers.daemons import GUARD_S
class AtTorch:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.meta_path.remove(self)
            exec(sys.argv[1])
sys.meta_path.insert(0, AtTorch())
Task(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))()
"""


def started(
    lab: Lab, folder: Path, at_torch: str = "", ranks: int = 1, **variables: str
) -> list[subprocess.Popen[str]]:
    """Start ranks of a job of the local back end, whose folder of scripts and logs is given."""
    shared = {"SUBMITIT_EXECUTOR": "local", "PYTHONPATH": str(ROOT), "SUBMITIT_FOLDER": str(folder)} | variables
    found = []
    for rank in range(ranks):
        local = {"JOB_ID": "lab", "NTASKS": str(ranks), "JOB_NUM_NODES": "1", "NODEID": "0"}
        local |= {"GLOBALID": str(rank), "LOCALID": str(rank)}
        env = os.environ | shared | {f"SUBMITIT_LOCAL_{name}": value for name, value in local.items()}
        command = [sys.executable, "-c", RANK, at_torch, lab.run.url, lab.run.run_id, lab.job.model_dump_json()]
        found.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    return found


def ended(ranks: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    """Wait for them, and return their exit codes and what they said."""
    said = "".join(rank.communicate(timeout=GUARD_S)[1] for rank in ranks)
    return [rank.returncode for rank in ranks], said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2], ids=lambda number: number.name)
def test_a_preemption_while_torch_is_imported_saves_and_comes_again(
    tmp_path: Path, tiny_digits: Path, number: signal.Signals
) -> None:
    lab = Lab(tmp_path / "run", tiny_digits)
    codes, said = ended(started(lab, tmp_path, f"os.kill(os.getpid(), {int(number)})"))
    assert codes == [EXIT_RESTART], said
    (attempt,) = lab.run.attempts()
    assert (attempt.cause, attempt.end_step) == ("preempted", 1)
    assert (tmp_path / "lab_claimed").read_text() == "0\n"
    assert lab.attempt().start_step == 1


# --- starts that become no attempt --------------------------------------------------------------------------------


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of scripts and logs of a job; it is not the run's."""
    (tmp_path / "scripts").mkdir()
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path / "scripts"))
    return tmp_path / "scripts"


def why(lab: Lab, scripts: Path, job_id: str) -> str:
    """What status says of a run whose job is over and had no attempt."""
    lab.run.add_submission(Submission(backend="local", job_id=job_id, folder=str(scripts), shape="", time=1.0))
    assert not lab.run.attempts() and not (scripts / f"{job_id}_claimed").exists()
    (status,) = read_status([lab.run])
    assert status.state == "never started"
    return status.cause


def test_a_host_that_cannot_import_torch(tmp_path: Path, tiny_digits: Path, scripts: Path) -> None:
    lab = Lab(tmp_path / "run", tiny_digits)
    codes, said = ended(started(lab, scripts, "raise ImportError('libcudart.so.13: cannot open shared object file')"))
    assert codes == [EXIT_RESTART] and "Traceback" in said
    assert "failed before training: ImportError: libcudart.so.13" in why(lab, scripts, "lab")


def test_an_interface_that_is_not_there(tmp_path: Path, tiny_digits: Path, scripts: Path) -> None:
    """The ranks have met by then, and fail when they connect to each other."""
    lab = Lab(tmp_path / "run", tiny_digits)
    codes, said = ended(started(lab, scripts, ranks=2, GLOO_SOCKET_IFNAME="nonexistent0"))
    assert codes == [EXIT_RESTART, EXIT_RESTART], said
    assert "nonexistent0" in why(lab, scripts, "lab")


def test_gpus_that_are_not_there(tmp_path: Path, tiny_digits: Path, scripts: Path) -> None:
    """Another host may have them; to train on the CPU instead is never what was meant."""
    lab = Lab(tmp_path / "run", tiny_digits)
    lab.job = lab.job.model_copy(update={"gpus_per_node": 2})
    assert EXIT_CODES[lab.start()] == EXIT_RESTART
    reason = why(lab, scripts, "lab0")
    assert "the job requests 2 GPUs per node, and CUDA sees none. torch " in reason
    assert "NVIDIA driver: " in reason and "--gpus-per-node 0" in reason


@pytest.mark.parametrize("problem", ["read-only", "full", "gone"])
def test_a_runs_folder_that_cannot_be_used(small_disk: Path, tiny_digits: Path, scripts: Path, problem: str) -> None:
    """The reason is kept beside the scripts, for as long as the folder is what is broken."""
    lab = Lab(small_disk / "run", tiny_digits)
    if problem == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    elif problem == "full":
        fill(small_disk)
    else:
        (small_disk / "run").rename(small_disk / "elsewhere")
    assert EXIT_CODES[lab.start()] == EXIT_RESTART
    assert (scripts / "lab0_start.json").exists()
    if problem == "read-only":
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    elif problem == "full":
        (small_disk / "filler").unlink()
    else:
        (small_disk / "elsewhere").rename(small_disk / "run")
    said = {"read-only": "Read-only file system", "full": "No space left on device", "gone": "spec.json"}[problem]
    assert said in why(lab, scripts, "lab0")
    assert lab.start() == "finished"
