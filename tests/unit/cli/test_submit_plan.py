"""What is said of runs that were waited for."""

from types import SimpleNamespace

import click
import pytest

from rsb_cluster.cli.submit_plan import wait_for
from rsb_cluster.monitor import watch
from rsb_cluster.monitor.status import Status


def test_a_stop_by_the_user_is_no_error(monkeypatch):
    """It is said in a sentence; the exit code tells scripts that the run has not finished."""
    stopped = Status("r", "/runs/r", "stopped", cause="stopped")
    monkeypatch.setattr(watch, "follow", lambda runs, console: [stopped])
    with pytest.raises(click.exceptions.Exit) as ended:
        wait_for(SimpleNamespace(runs=()))
    assert ended.value.exit_code == 1
