"""The logs of cloud runs are read without the engine."""

import pytest

from rsb_cluster.backends.skypilot.backend import SkyPilot
from rsb_cluster.errors import ConfigError
from rsb_cluster.monitor import logs
from tests.unit.sky_jobs import attempt, launch


def test_logs_come_from_the_runs_folder_without_the_engine(sky, run, tmp_path):
    sent = launch(run, tmp_path)
    attempt(run, "rsb-earlier", 1, "failed")
    run.store.write_bytes("logs/0001-rank00000.log", b"another job\n")
    with pytest.raises(ConfigError, match="there is no log of rank 0"):
        list(logs.read_log(run, rank=0, attempt=0, follow=False))
    sky.calls = 0  # it was asked why there is none
    attempt(run, sent.job_id, 2, "preempted")
    run.store.write_bytes("logs/0002-rank00000.log", b"first\n")
    assert "".join(logs.read_log(run, rank=0, attempt=0, follow=False)) == "first\n"
    attempt(run, sent.job_id, 3, "finished")
    run.store.write_bytes("logs/0003-rank00000.log", b"second\n")
    assert "".join(logs.read_log(run, rank=0, attempt=0, follow=True)) == "first\nsecond\n"
    assert SkyPilot().read_log(run, sent, 0, 6) == b"second\n"
    assert sky.calls == 0
