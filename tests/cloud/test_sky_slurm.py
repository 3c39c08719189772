"""A run by the real SkyPilot on a real Slurm that it reaches by ssh: a host dies, and the run goes on on others.

``make cloud-evidence`` runs it; some eight minutes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cloud.journey import Journey, make_data
from tests.command import RsbCluster
from tests.servers.login import SlurmByLogin
from tests.servers.s3 import S3Server
from tests.servers.sky import Sky

pytestmark = [pytest.mark.slurm, pytest.mark.s3, pytest.mark.long, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def bucket(cluster: SlurmByLogin) -> Iterator[S3Server]:
    """An S3 server that the hosts reach as well, by http: they do not know the authority of its certificate."""
    with S3Server(cluster.switch.gateway) as server:
        yield server


@pytest.fixture
def journey(cluster_sky: Sky, bucket: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journey:
    for name, value in bucket.plain_env.items():
        monkeypatch.setenv(name, value)
    bucket.make_bucket("lab")
    make_data("s3://lab/digits")
    return Journey(cluster_sky, RsbCluster(tmp_path, cluster_sky.env), "s3://lab/runs", "s3://lab/digits")


def test_a_host_that_dies_costs_the_steps_since_the_last_checkpoint(
    journey: Journey, cluster: SlurmByLogin, tmp_path: Path
) -> None:
    secrets = '["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]'
    journey.submit("--job", "cloud-slurm", "--set", f"job.cloud.secrets={secrets}")
    first = journey.wait_for_steps(1, 220)
    lost = first.hosts[1]
    cluster.kill_node(lost)
    journey.times["host killed"] = time.time()

    second = journey.wait_for_steps(2)
    assert second.start_step >= 200, "from the last checkpoint"
    assert lost not in second.hosts
    journey.wait_for_result()
    print(journey.report())
    journey.assert_as_if_nothing_had_been(tmp_path / "unbroken")
