"""The local controller gives up after some failed starts in a row."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rsb_cluster.node import starts
from tests.command import ROOT
from tests.servers.daemons import GUARD_S

CONTROLLER = """
import sys
from pathlib import Path
from rsb_cluster.node import starts
from rsb_cluster.node.local_controller import RestartingController
starts.LOCAL_DELAY_S = 0.01
controller = RestartingController(Path(sys.argv[1]), "job")
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
        ("os._exit(1)", 1),  # a code that asks for no restart
        ("claim(); os._exit(75 if n < 9 else 0)", 10),  # preempted attempts, which the lease limits
        ("n in (4, 9) and claim(); os._exit(75 if n < 12 else 0)", 13),  # never so many in a row
    ],
    ids=["restart", "abort", "folder-gone", "error", "preempted", "flaky"],
)
def test_the_controller_gives_up_after_some_starts_in_a_row(folder: Path, rank: str, count: int) -> None:
    assert starts_made(folder, rank) == count
