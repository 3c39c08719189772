"""Fixtures of the unit tests."""

from pathlib import Path

import pytest

from rsb_cluster.storage import Store


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A folder that does not exist yet, on a local disk and on a real S3 server."""
    if request.param == "local":
        return Store(tmp_path / "a folder")
    server = request.getfixturevalue("s3")
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return Store(f"s3://{request.getfixturevalue('s3_bucket')}/a folder")
