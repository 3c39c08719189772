"""What the fault tests share."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsb_cluster.data.make import make_set
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from tests.command import RsbCluster
from tests.faults.lab import Lab, few_digits
from tests.faults.victim import submit


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Run:
    """The run that nothing happens to, on two processes of this machine."""
    rsb = RsbCluster(tmp_path_factory.mktemp("unbroken"), {})
    run = submit(rsb, digits, "--job", "local", "--wait")
    assert [a.cause for a in run.attempts()] == ["finished"]
    return run


@pytest.fixture(scope="session")
def tiny_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 of the digits to train on, 32 to evaluate."""
    folder = tmp_path_factory.mktemp("tiny-digits")
    make_set(few_digits(), Store(folder), shard_samples=20)
    return folder


@pytest.fixture(scope="session")
def tiny_unbroken(tmp_path_factory: pytest.TempPathFactory, tiny_digits: Path) -> Run:
    """The run of them that nothing happens to."""
    lab = Lab(tmp_path_factory.mktemp("tiny-unbroken") / "run", tiny_digits)
    assert lab.attempt().cause == "finished"
    return lab.run


@pytest.fixture
def small_disk(tmp_path: Path, needs_root: None) -> Iterator[Path]:
    """A file system of its own, of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "small", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
