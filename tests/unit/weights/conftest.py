"""A run that is given away."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsb_cluster.runs.run import Run
from rsb_cluster.weights.export import export


@pytest.fixture(scope="module")
def for_hub(tmp_path_factory: pytest.TempPathFactory, trained: Run) -> Path:
    """The folder of an export for the hub."""
    folder = tmp_path_factory.mktemp("export") / "model"
    found = export(trained, "hf", str(folder))
    assert found.is_ema and found.step == 18
    return folder
