"""Fixtures of the unit tests."""

from pathlib import Path

import pytest

from rsb_cluster.data.make import make_set
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A folder that does not exist yet, on a local disk and on a real S3 server."""
    if request.param == "local":
        return Store(tmp_path / "a folder")
    server = request.getfixturevalue("s3")
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return Store(f"s3://{request.getfixturevalue('s3_bucket')}/a folder")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of 18 steps with a moving average of its weights: an evaluation after each six."""
    from tests.faults.lab import Lab, few_digits

    folder = tmp_path_factory.mktemp("trained")
    make_set(few_digits(), Store(folder / "data"))
    lab = Lab(folder / "runs" / "digits-test_resnet-s0-12345678", folder / "data", "train.ema_decay=0.9")
    assert lab.attempt().cause == "finished"
    return lab.run
