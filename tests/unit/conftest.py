"""Fixtures of the unit tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsb_cluster.backends import BACKENDS
from rsb_cluster.backends.skypilot import engine
from rsb_cluster.backends.slurm.backend import Slurm
from rsb_cluster.data.labels import real_labels
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import DataSource
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from tests.unit.formats import picture
from tests.unit.sky_jobs import Engine
from tests.unit.slurm_programs import Programs


@pytest.fixture(scope="session")
def validation_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards like those of ImageNet's val: a thousand classes, twelve images of which the first has no ReaL label."""
    folder = tmp_path_factory.mktemp("val")
    keys = [f"n01/ILSVRC2012_val_{number:08d}" for number in range(1, 13)]
    names = tuple(f"n{i:08d}" for i in range(1000))
    read = lambda key: (key, picture(int(key[-2:]), px=40), "jpg", int(key[-2:]))  # noqa: E731
    source = DataSource("val", names, keys, read, labels={"real": real_labels(keys)}, data_set="imagenet-1k")
    make_set({"val": source}, Store(folder), shard_samples=5)
    return folder


@pytest.fixture
def here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, in which nothing of the project's own is found."""
    folder = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A folder that does not exist yet, on a local disk and on a real S3 server."""
    return new_folder(request.param, request, tmp_path, monkeypatch)


def new_folder(where: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Return a folder that does not exist yet: ``local``, ``s3``, or ``s3-http`` for the same server by http."""
    if where == "local":
        return Store(tmp_path / "a folder")
    server = request.getfixturevalue("s3")
    for name, value in (server.plain_env if where == "s3-http" else server.env).items():
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


@pytest.fixture
def sky(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """SkyPilot, as far as it says anything: a table of its jobs in its one module's place."""
    made = Engine()
    for name in ("launch", "jobs", "cancel", "controller_log"):
        monkeypatch.setattr(engine, name, getattr(made, name))
    monkeypatch.setattr(engine, "check_installed", lambda: None)
    return made


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing for a minute."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.fixture
def slurm_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Programs in place of Slurm's; a test writes those that it needs."""
    folder = tmp_path / "slurm-programs"
    folder.mkdir()
    monkeypatch.setitem(BACKENDS, "slurm", Slurm())  # that remembers no answer of another test
    return Programs(folder, monkeypatch)
