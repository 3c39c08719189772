"""The last lines of a log, and the log of one attempt of a job that restarted."""

import pytest

from rsb_cluster.errors import ConfigError
from rsb_cluster.monitor.logs import last_lines, read_log
from rsb_cluster.runs.run import Attempt, Submission
from tests.unit.new_runs import make_run

LOG = """\
importing
2026-11-30 10:00:00Z I rank0 attempt 1, rank 0 of 2 on n1 (cpu)
step 1
killed
2026-11-30 10:05:00Z I rank0 attempt 2, rank 0 of 2 on n1 (cpu)
step 2
"""


@pytest.mark.parametrize(
    ("number", "expected"), [(0, "later\n"), (1, "c\nlater\n"), (2, "b\nc\nlater\n"), (9, "a\nb\nc\nlater\n")]
)
def test_the_last_lines_and_what_comes_after(number, expected):
    assert "".join(last_lines(iter(["a\nb\nc\n", "later\n"]), number)) == expected


def test_the_log_of_an_attempt_that_was_killed_or_still_runs_is_in_that_of_its_job(tmp_path):
    run = make_run(tmp_path / "runs")
    (tmp_path / "7_0_log.out").write_text(LOG)
    run.add_submission(Submission(backend="slurm", job_id="7", folder=str(tmp_path), shape="", time=1))
    for number in (1, 2):
        run.write_attempt(Attempt(number=number, job_id="7", world_size=2, hosts=(), started=1, start_step=0))

    def log(attempt: int, rank: int = 0) -> str:
        return "".join(read_log(run, rank=rank, attempt=attempt, follow=False))

    assert log(1) == "".join(LOG.splitlines(keepends=True)[1:4])
    assert log(2) == "".join(LOG.splitlines(keepends=True)[4:])
    run.store.write_bytes("logs/0001-rank00000.log", b"its own\n")
    assert log(1) == "its own\n"
    with pytest.raises(ConfigError, match="no log of rank 1 in attempt 2, which had 2 ranks"):
        log(2, rank=1)
    with pytest.raises(ConfigError, match="has no attempt 3, but 2"):
        log(3)


def test_where_the_log_of_the_last_job_is_gone_it_says_why_and_which_there_are(tmp_path):
    run = make_run(tmp_path / "runs")
    run.add_submission(Submission(backend="slurm", job_id="7", folder=str(tmp_path / "x"), shape="", time=1))

    def refusal() -> str:
        with pytest.raises(ConfigError) as caught:
            list(read_log(run, rank=0, attempt=0, follow=False))
        return str(caught.value)

    assert "The job has not started yet." in refusal()
    run.write_attempt(Attempt(number=1, job_id="7", world_size=2, hosts=(), started=1, start_step=0, cause="finished"))
    assert "It was removed, as 'runs prune' does, or" in refusal()
    for name in ("0001-rank00000", "0003-rank00000", "0004-rank00001"):
        run.store.write_bytes(f"logs/{name}.log", b"x")
    assert "The run's folder has that of attempt 1, 3: --attempt 3." in refusal()
