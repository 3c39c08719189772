"""Failed starts: who counts them, and the reason that is reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsb_cluster.monitor.status import read_status
from rsb_cluster.node import starts
from rsb_cluster.node.exit_codes import EXIT_RESTART
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.runs.run import Attempt, Run, Submission
from tests.unit.new_runs import make_run


def start(number: int, job_id: str = "7", rank: int = 0) -> Ranks:
    return Ranks(rank, rank, 2, job_id, number, 2)


@pytest.fixture
def run(tmp_path: Path, folder: Path) -> Run:
    made = make_run(tmp_path)
    # A finished job of the local back end: no scheduler is queried.
    made.add_submission(Submission(backend="local", job_id="7", folder=str(folder), shape="", time=1.0))
    return made


def last_end(run: Run) -> tuple[str, str]:
    (status,) = read_status([run])
    return status.state, status.cause


def test_status_says_why_a_run_never_started(run: Run, folder: Path) -> None:
    starts.report(run, start(0, rank=1), "no rendezvous with rank 0", is_cause=False)
    starts.report(run, start(0), "ImportError: libcudart.so.13")
    starts.report(run, start(0, rank=1), "lost a peer rank", is_cause=False)
    state, cause = last_end(run)
    assert state == "never started"
    assert cause.startswith("the last start failed before training: ImportError: libcudart.so.13 (")
    for number in range(3):
        starts.list_failed(folder, "7", number, EXIT_RESTART)
    assert last_end(run)[1].startswith("3 starts in a row failed before training: ImportError")


def test_what_the_runs_folder_cannot_take_is_kept_beside_the_scripts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's folder is a file here, so nothing can be written into it: not even root may."""
    attempts = Path(run.url) / "attempts"
    attempts.write_text("")
    starts.report(run, start(0), "Read-only file system")
    attempts.unlink()
    assert "Read-only file system" in last_end(run)[1]


def test_without_a_report_the_exit_code_is_shown(run: Run, folder: Path) -> None:
    starts.list_failed(folder, "7", 0, 127)
    assert last_end(run) == ("never started", "the last start failed before training: exit code 127; see its log")


def test_an_attempt_ends_the_count_and_the_reason_is_no_longer_shown(run: Run, folder: Path) -> None:
    starts.report(run, start(0), "no GPU")
    starts.list_failed(folder, "7", 0, EXIT_RESTART)
    starts.record(starts.CLAIMED, start(1))
    assert starts.is_recorded(folder, "7", starts.CLAIMED, 1)
    assert not starts.is_recorded(folder, "7", starts.CLAIMED, 2)
    assert not starts.is_recorded(folder, "7", starts.ENDED, 1)
    assert not (folder / "7_starts").exists()
    run.write_attempt(
        Attempt(number=1, job_id="7", restart=1, world_size=2, hosts=("n1",), started=2.0, start_step=0, cause="stuck")
    )
    assert last_end(run) == ("stuck", "stuck")
    starts.report(run, start(2), "the disk is full")
    assert "the disk is full" in last_end(run)[1]
