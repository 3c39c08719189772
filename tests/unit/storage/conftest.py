"""Fixtures of the tests of storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsb_cluster.storage.store import Store
from tests.unit.conftest import new_folder


@pytest.fixture(params=["local", *(pytest.param(kind, marks=pytest.mark.s3) for kind in ("s3", "s3-http"))])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A folder that does not exist yet, and by http as well: a client makes other requests there."""
    return new_folder(request.param, request, tmp_path, monkeypatch)
