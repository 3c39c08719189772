"""A run for the tests of SkyPilot."""

from pathlib import Path

import pytest

from rsb_cluster.runs.run import Run
from tests.unit.new_runs import make_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that was never started."""
    return make_run(tmp_path / "runs")
