"""The folder of a job's scripts."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The job's, of scripts and logs."""
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path / "scripts"))
    (tmp_path / "scripts").mkdir()
    return tmp_path / "scripts"
