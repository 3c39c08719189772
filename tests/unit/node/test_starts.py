"""Starts that became no attempt: who counts them, and what is known of the reason."""

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
        starts.list_failed(folder, "7", number, EXIT_RESTART)
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
    starts.list_failed(folder, "7", 0, EXIT_RESTART)
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
