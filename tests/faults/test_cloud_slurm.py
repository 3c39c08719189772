"""A Slurm in a cloud that takes its machines back, done to one run of two ranks on two of four machines.

The tests are stations of that run and stand in its order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsb_cluster.node.interruption import STALE_S
from rsb_cluster.runs.run import Run
from tests.command import RsbCluster
from tests.conftest import skip_without
from tests.faults.victim import EVERY_STEPS, Victim, on_slurm, submit
from tests.servers.cloud_hosts import CloudHosts

pytestmark = pytest.mark.slurm

ON_CPUS = (
    "--gpus-per-node", "0", "--set", "job.tasks_per_node=1", "--set", "job.cpus_per_task=1",
    "--set", "job.loader_workers=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def hosts() -> Iterator[CloudHosts]:
    skip_without("slurm", CloudHosts.unavailable())
    with CloudHosts() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def victim(hosts: CloudHosts, tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Victim:
    rsb = RsbCluster(tmp_path_factory.mktemp("cloud-slurm"), hosts.env)
    rsb.hold()
    return on_slurm(rsb, submit(rsb, digits, "--job", "slurm-spot", "--nodes", "2", *ON_CPUS), hosts)


def test_a_notice_on_the_machine_without_rank_0_loses_nothing(victim: Victim, hosts: CloudHosts) -> None:
    reached = victim.wait_for_steps(1)
    _, doomed = victim.attempt(1).hosts
    hosts.announce(doomed, goes=time.time() + 120)
    ended = victim.wait_for_end(1, one_rank_knows=True)
    assert ended.cause == "preempted" and ended.end_step >= reached
    assert ended.message.startswith(f"aws reclaims {doomed} at ")
    hosts.take_back(doomed)
    # As it may still have done, if it could.
    victim.run.write_notice(1, doomed, victim.run.notices(1)[doomed])
    victim.wait_for_steps(2)
    assert doomed not in victim.attempt(2).hosts
    assert victim.steps_lost(1, ended.end_step) == 0


def test_a_stale_notice_stops_no_later_attempt(victim: Victim, hosts: CloudHosts) -> None:
    """Neither the one of the attempt before, nor that of a machine that has outlived its time."""
    start = victim.attempt(2).start_step
    for host in victim.attempt(2).hosts:
        hosts.announce(host, goes=time.time() - STALE_S - 60)
    victim.wait_for_steps(2, 4 * EVERY_STEPS)
    assert victim.attempt(2).start_step == start and victim.attempt(2).cause == ""
    assert victim.run.notices(2) == {}


def test_a_machine_that_goes_without_a_word_costs_the_steps_since_the_last_checkpoint(
    victim: Victim, hosts: CloudHosts
) -> None:
    """The one with rank 0, and with the job's script."""
    reached, lost = victim.progress()[1], victim.attempt(2).hosts[0]
    hosts.take_back(lost)
    victim.rsb.go_on()
    victim.wait_for_steps(3)
    assert lost not in victim.attempt(3).hosts
    assert victim.steps_lost(2, reached) <= EVERY_STEPS


def test_in_the_end_nothing_has_happened(victim: Victim, unbroken: Run) -> None:
    victim.rsb.allow()
    victim.wait_for_state("finished")
    assert len(victim.run.attempts()) == 3
    result = victim.run.result()
    assert result is not None and result["preemptions"] == 1
    victim.assert_as_if_nothing_had_been(unbroken)
