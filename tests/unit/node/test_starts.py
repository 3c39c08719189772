"""Starts that became no attempt: who counts them, and what is known of the reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.monitor.status import read_status
from rsb_cluster.node import starts
from rsb_cluster.node.exit_codes import EXIT_AGAIN
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.runs.run import Attempt, Run, Spec, Submission
from tests.command import ROOT
from tests.servers.daemons import GUARD_S


def start(number: int, job_id: str = "7", rank: int = 0) -> Ranks:
    return Ranks(rank, rank, 2, job_id, number, 2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The job's, of scripts and logs."""
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path / "scripts"))
    (tmp_path / "scripts").mkdir()
    return tmp_path / "scripts"


@pytest.fixture
def run(tmp_path: Path, folder: Path) -> Run:
    made = Run.at(tmp_path, "digits-resnet10t-s0-00000000")
    spec = Spec(run_id=made.run_id, seed=0, virtual_ranks=4, data="", train_digest="", val_digest="")
    made.create(load_recipe("digits").recipe, spec)
    # A job of the local back end that is over: nobody has to be asked.
    made.add_submission(Submission(backend="local", job_id="7", folder=str(folder), shape="", time=1.0))
    return made


def last_end(run: Run) -> tuple[str, str]:
    (status,) = read_status([run])
    return status.state, status.cause


def test_status_says_why_a_run_never_started(run: Run, folder: Path) -> None:
    starts.report(run, start(0, rank=1), "rank 0 could not be met", is_cause=False)
    starts.report(run, start(0), "ImportError: libcudart.so.13")
    starts.report(run, start(0, rank=1), "another rank is gone", is_cause=False)
    state, cause = last_end(run)
    assert state == "never started"
    assert cause.startswith("the last start failed before training: ImportError: libcudart.so.13 (")
    for number in range(3):
        starts.list_failed(folder, "7", number, EXIT_AGAIN)
    assert last_end(run)[1].startswith("3 starts in a row failed before training: ImportError")


def test_what_the_runs_folder_cannot_take_is_kept_beside_the_scripts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's folder is a file here, so nothing can be written into it: not even root may."""
    attempts = Path(run.url) / "attempts"
    attempts.write_text("")
    starts.report(run, start(0), "Read-only file system")
    attempts.unlink()
    assert "Read-only file system" in last_end(run)[1]


def test_without_any_word_the_exit_code_is_told(run: Run, folder: Path) -> None:
    starts.list_failed(folder, "7", 0, 127)
    assert last_end(run) == ("never started", "the last start failed before training: exit code 127; see its log")


def test_an_attempt_ends_the_count_and_the_reason_is_no_longer_told(run: Run, folder: Path) -> None:
    starts.report(run, start(0), "no GPU")
    starts.list_failed(folder, "7", 0, EXIT_AGAIN)
    starts.note(starts.CLAIMED, start(1))
    assert starts.is_noted(folder, "7", starts.CLAIMED, 1)
    assert not starts.is_noted(folder, "7", starts.CLAIMED, 2) and not starts.is_noted(folder, "7", starts.ENDED, 1)
    assert not (folder / "7_starts").exists()
    run.write_attempt(
        Attempt(number=1, job_id="7", restart=1, world_size=2, hosts=("n1",), started=2.0, start_step=0, cause="stuck")
    )
    assert last_end(run) == ("stuck", "stuck")
    starts.report(run, start(2), "the disk is full")
    assert "the disk is full" in last_end(run)[1]


# --- the local controller -----------------------------------------------------------------------------------------

CONTROLLER = """
import sys
from pathlib import Path
from rsb_cluster.node import starts
from rsb_cluster.node.local_controller import RestartingController
starts.LOCAL_DELAY_S = 0.01
controller = RestartingController(Path(sys.argv[1]))
controller.command = [sys.executable, "-S", "-c", sys.argv[2]]
controller.run()
"""
LOCAL = {
    "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_COMMAND": "", "SUBMITIT_LOCAL_TIMEOUT_S": "0",
    "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0", "SUBMITIT_STDERR_TO_STDOUT": "1", "SUBMITIT_LOCAL_WITH_SHELL": "",
}  # fmt: skip
# What a rank does, by the start; each adds a letter to the file "ran".
PRELUDE = """
import os, shutil
folder, job, n = os.environ["FOLDER"], os.environ["SUBMITIT_LOCAL_JOB_ID"], int(os.environ["RSB_LOCAL_RESTART"])
open(folder + "-ran", "a").write("x")
def claim():
    open(f"{folder}/{job}_claimed", "w").write(str(n))
"""


def starts_made(folder: Path, rank: str) -> int:
    """Run ranks by the controller until it gives up or they are done; return how many starts there were."""
    environment = os.environ | LOCAL | {"PYTHONPATH": str(ROOT), "FOLDER": str(folder)}
    command = [sys.executable, "-c", CONTROLLER, str(folder), PRELUDE + rank]
    subprocess.run(command, env=environment, check=True, timeout=GUARD_S)
    return len(Path(f"{folder}-ran").read_text()) // 2


@pytest.mark.parametrize(
    ("rank", "count"),
    [
        ("os._exit(75)", starts.LIMIT),
        ("os.abort()", starts.LIMIT),
        ("shutil.rmtree(folder, ignore_errors=True); os._exit(75)", starts.LIMIT),
        ("os._exit(1)", 1),  # not even the rank thinks that another start would be better
        ("claim(); os._exit(75 if n < 9 else 0)", 10),  # attempts are judged elsewhere, and these are preempted
        ("n in (4, 9) and claim(); os._exit(75 if n < 12 else 0)", 13),  # never so many in a row
    ],
    ids=["restart", "abort", "folder-gone", "error", "preempted", "flaky"],
)
def test_the_controller_gives_up_after_some_starts_in_a_row(folder: Path, rank: str, count: int) -> None:
    assert starts_made(folder, rank) == count
