"""What the tests on the real SkyPilot share: EC2 with machines, the store that they reach, and SkyPilot's server."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.ec2 import Ec2
from tests.servers.login import SlurmByLogin
from tests.servers.s3 import S3Server
from tests.servers.sky import Sky

LAB = Path(sys.prefix).parent  # made by setup.sh, which put this Python there
IMAGE = LAB / "image"


@pytest.fixture(scope="session", autouse=True)
def _lab() -> None:
    missing = [*Ec2.unavailable(), *Sky.unavailable(), *SlurmByLogin.unavailable(), *S3Server.unavailable()]
    if not (IMAGE / "installed").exists() or importlib.util.find_spec("sky") is None:
        missing.append("lab here (make cloud-evidence)")
    if missing:
        pytest.skip(f"no {', no '.join(missing)}")


@pytest.fixture(scope="module")
def ec2() -> Iterator[Ec2]:
    with Ec2(IMAGE) as server:
        yield server


@pytest.fixture(scope="module")
def store(ec2: Ec2) -> Iterator[S3Server]:
    """An S3 server that this machine and those of EC2 reach at the same address, where their role lets them in.

    By http, as they do not know the authority of its certificate.
    """
    with S3Server(ec2.switch.gateway) as server:
        ec2.give_role(server.env["AWS_ACCESS_KEY_ID"], server.env["AWS_SECRET_ACCESS_KEY"])
        yield server


@pytest.fixture(scope="module")
def spot(ec2: Ec2, store: S3Server) -> Iterator[Sky]:
    """SkyPilot with an AWS account."""
    keys = {name: store.env[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    sky = Sky(keys | {"AWS_ENDPOINT_URL_S3": store.plain_endpoint})
    sky.use_ec2(ec2)
    with sky:
        yield sky


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmByLogin]:
    """A Slurm whose sessions find uv, and in its cache all that is installed there; there is no internet."""
    env = {
        "UV_OFFLINE": "1", "UV_CACHE": str(IMAGE.parent / "cache"), "UV_PROGRAM": f"{IMAGE}/usr/local/bin/uv",
        "UV_CONSTRAINT": str(Path(__file__).with_name("constraints.txt")),
    }  # fmt: skip
    with SlurmByLogin(IMAGE / "home/ubuntu/.local/bin/uv", env) as server:
        yield server


@pytest.fixture(scope="module")
def cluster_sky(cluster: SlurmByLogin) -> Iterator[Sky]:
    """SkyPilot with a Slurm cluster."""
    sky = Sky({})
    sky.use_slurm(cluster)
    with sky:
        yield sky
