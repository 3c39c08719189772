"""A spot run on EC2 by the real SkyPilot: announced, saved, taken back, recovered, finished as if nothing had been.

``make cloud-evidence`` runs it; some ten minutes.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.cloud.journey import Journey, make_data
from tests.command import RsbCluster
from tests.servers.ec2 import Ec2
from tests.servers.s3 import S3Server
from tests.servers.sky import Sky

pytestmark = [pytest.mark.slurm, pytest.mark.s3, pytest.mark.long, pytest.mark.timeout(3600)]


@pytest.fixture
def journey(spot: Sky, store: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journey:
    """Everything reaches the bucket, and only the command line SkyPilot."""
    for name, value in store.plain_env.items():
        monkeypatch.setenv(name, value)
    store.make_bucket("lab")
    make_data("s3://lab/digits")
    return Journey(spot, RsbCluster(tmp_path, spot.env), "s3://lab/runs", "s3://lab/digits")


def test_a_spot_machine_that_is_taken_back_costs_no_step(journey: Journey, ec2: Ec2, tmp_path: Path) -> None:
    journey.submit("--job", "cloud-spot")
    first = journey.wait_for_steps(1)
    machines = ec2.instances("running")
    assert len(machines) == len(first.hosts) == first.world_size == 2
    assert all(machine["InstanceLifecycle"] == "spot" for machine in machines)

    doomed = ec2.named(first.hosts[1])
    ec2.announce_interruption(doomed)
    journey.times["notice"] = time.time()
    ended = journey.wait_for_end(1)
    assert ended.cause == "preempted", ended
    ec2.terminate(doomed)
    journey.times["terminated"] = time.time()

    second = journey.wait_for_steps(2)
    assert second.start_step == ended.end_step, "no step was lost"
    assert first.hosts[1] not in second.hosts
    journey.wait_for_result()
    print(journey.report())

    (group,) = journey.rsb.json("collect", "--runs", "s3://lab/runs", "--format", "json")["groups"]
    (row,) = group["runs"]
    assert (row["attempts"], row["preemptions"], row["steps_repeated"]) == (2, 1, 0)
    journey.assert_as_if_nothing_had_been(tmp_path / "unbroken")
