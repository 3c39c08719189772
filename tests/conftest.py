"""Fixtures for all tests: a clean environment, and real servers that start when a test first asks for one."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from playwright.sync_api import Browser, sync_playwright
from xdist.scheduler import LoadFileScheduling

from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.data.sources.vision import DEBIAN_FASHION_MNIST
from rsb_cluster.storage.store import Store
from tests.command import RsbCluster
from tests.servers.daemons import GUARD_S, poll
from tests.servers.hosts import SlurmHosts
from tests.servers.s3 import S3Server
from tests.servers.slurm import SlurmCluster
from tests.users import Colleague, make_office

# What is compared in these is told apart as in a test. Here, as other folders import them as well.
pytest.register_assert_rewrite(
    "tests.unit.results.collect.made", "tests.unit.train.input.part", "tests.unit.train.input.pixels.images"
)

# Examples are the same in every run, and a slow machine is no failure.
settings.register_profile("steady", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("steady")


# On two cores, trainings of several ranks beside each other starve, and each takes longer than both one by one. So one
# worker does all of them, another all chains of faults, which mostly wait, and the other files are shared out. The
# groups that take long begin.
GROUPS = {
    "trainings": (
        "faults/test_node.py", "integration/test_cloud_run.py", "integration/test_local.py",
        "integration/test_selftest.py", "integration/test_slurm.py", "integration/test_slurm_s3.py",
        "integration/test_sweep.py", "integration/test_tutorial.py",
    ),
    "chains": ("faults/test_cloud_slurm.py", "faults/test_hosts.py", "faults/test_local.py", "faults/test_storm.py"),
}  # fmt: skip


def _group(nodeid: str) -> str:
    """Return the group of a test: one of these, or its file."""
    file = nodeid.partition("::")[0]
    return next((name for name, files in GROUPS.items() if file.removeprefix("tests/") in files), file)


class _Groups(LoadFileScheduling):
    # Not by marks and --dist loadgroup: with pytest 9.2, xdist 3.8 does not see them.
    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Groups:
    return _Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = list(GROUPS)
    items.sort(key=lambda item: order.index(g) if (g := _group(item.nodeid)) in GROUPS else len(GROUPS))


FOREIGN = ("SLURM_", "SUBMITIT_", "AWS_", "MASTER_", "RSB_")


def _strip_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(FOREIGN) and name != "RSB_REQUIRE":
            monkeypatch.delenv(name)


@pytest.fixture(scope="session", autouse=True)
def _clean_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the settings of the shell that runs the tests from session-wide fixtures, and its cache from all."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _strip_environment(monkeypatch)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what an earlier test left in the environment from the next one."""
    _strip_environment(monkeypatch)


@pytest.fixture(autouse=True)
def _clean_log() -> Iterator[None]:
    """Keep the package's logger as it is when Python starts, whatever a command or a worker does to it.

    Not as it was before the test: a fixture of the whole module may have changed it, and pytest adds handlers of its
    own to a logger that a worker has cut off from the root.
    """
    _reset_log()
    yield
    _reset_log()


def _reset_log() -> None:
    logger = logging.getLogger("rsb_cluster")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


def skip_without(server: str, missing: list[str]) -> None:
    """Skip a test that this machine cannot run; fail it where RSB_REQUIRE (``slurm,s3``) says that it must run."""
    if not missing:
        return
    reason = f"this machine cannot run {server}: no {', '.join(missing)} (as root, tests/setup.sh installs programs)"
    if server in os.environ.get("RSB_REQUIRE", "").replace(",", " ").split():
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def needs_root() -> None:
    """Skip where file systems cannot be mounted; the servers need root as well."""
    skip_without("slurm", [] if os.geteuid() == 0 else ["root rights"])


@pytest.fixture
def no_memory(needs_root: None) -> Iterator[Path]:
    """A control group whose processes get no memory but what they have."""
    v1 = Path("/sys/fs/cgroup/memory")
    group = (v1 if v1.exists() else v1.parent) / f"rsb-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if v1.exists() else "memory.max")).write_text(str(1 << 14))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    assert poll(lambda: not (group / "cgroup.procs").read_text(), GUARD_S), "the kernel has killed what was in it"
    group.rmdir()


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """One Slurm cluster for all tests. Take ``slurm`` instead, unless jobs are to outlive a test."""
    skip_without("slurm", SlurmCluster.unavailable())
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """A Slurm cluster without jobs; those of the test are cancelled after it, and lost nodes come back."""
    yield slurm_cluster
    slurm_cluster.cancel_all()


@pytest.fixture(scope="module")
def hosts() -> Iterator[SlurmHosts]:
    """A Slurm of four hosts that can be killed or cut off, for the tests of one module."""
    skip_without("slurm", SlurmHosts.unavailable())
    with SlurmHosts() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """One S3 server for all tests."""
    skip_without("s3", S3Server.unavailable())
    with S3Server() as server:
        yield server


@pytest.fixture
def s3_bucket(s3: S3Server) -> str:
    """Name of a new, empty bucket."""
    return s3.make_bucket(f"test-{uuid.uuid4().hex[:16]}")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium, Debian's."""
    program = shutil.which("chromium")
    skip_without("chromium", [] if program else ["chromium"])
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of scikit-learn's digits: a folder with train/ and val/."""
    folder = tmp_path_factory.mktemp("digits")
    make_set(open_set("digits"), Store(folder), shard_samples=200)
    return folder


@pytest.fixture(scope="session")
def fashion() -> Path:
    """The folder of Debian's package dataset-fashion-mnist."""
    if not DEBIAN_FASHION_MNIST.is_dir():
        skip_without("fashion", [str(DEBIAN_FASHION_MNIST)])
    return DEBIAN_FASHION_MNIST


@pytest.fixture(scope="session")
def fashion_mnist(tmp_path_factory: pytest.TempPathFactory, fashion: Path) -> Path:
    """The shards of FashionMNIST."""
    folder = tmp_path_factory.mktemp("fashion-mnist")
    make_set(open_set("FashionMNIST", root=fashion), Store(folder))
    return folder


@pytest.fixture
def office() -> Iterator[Path]:
    """A folder with the runs that two users share."""
    skip_without("users", Colleague.unavailable())
    folder = make_office()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def ann(office: Path) -> Colleague:
    """One of the two."""
    return Colleague("bin", office)


@pytest.fixture
def bob(office: Path) -> Colleague:
    """The other, with the umask of sites where each user has a group of that name."""
    return Colleague("games", office, umask=0o002)


@pytest.fixture
def unchecked_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision checks the hashes of some files; those of our small copies are others."""
    for module in ("flowers102", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)


@pytest.fixture
def rsb(tmp_path: Path) -> RsbCluster:
    """The command line in a folder of its own, without any server."""
    return RsbCluster(tmp_path, {})
