"""Faults on Slurm, one after the other, to one run of two ranks on one of four hosts.

The tests are stations of that run and stand in its order: each waits for the attempt that the one before left behind.
Preemption without a user's signal, the time limit and scancel are in tests/integration/test_slurm*.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsb_cluster.run import Run
from tests.command import RsbCluster
from tests.faults.victim import EVERY_STEPS, Victim, on_slurm, submit
from tests.servers.hosts import SlurmHosts

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def victim(hosts: SlurmHosts, tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Iterator[Victim]:
    rsb = RsbCluster(tmp_path_factory.mktemp("hosts"), hosts.env)
    yield on_slurm(rsb, submit(rsb, digits, "--job", "slurm-cpu", "--set", "job.slurm.partition=spot"))
    hosts.cancel_all()


def where(victim: Victim) -> str:
    """The host that the run is on."""
    (host,) = victim.run.attempts()[-1].hosts
    return host


def test_a_preemption_by_the_users_signal_loses_nothing(victim: Victim, hosts: SlurmHosts) -> None:
    """Under preempt_send_user_signal Slurm says SIGUSR2, which elsewhere announces the time limit."""
    reached = victim.wait_for_steps(1)
    urgent = hosts.run("sbatch", "--parsable", "-N4", "--exclusive", "-p", "main", "--wrap=true", "-o", "/dev/null")
    ended = victim.wait_for_end(1)
    assert ended.cause == "preempted" and ended.end_step >= reached
    hosts.wait_for_state(urgent.strip(), "COMPLETED", timeout=60)
    victim.wait_for_steps(2)
    assert victim.steps_lost(1, ended.end_step) == 0
    assert "saved" in victim.log()


def test_an_administrators_requeue_loses_nothing(victim: Victim, hosts: SlurmHosts) -> None:
    reached = victim.wait_for_steps(2)
    hosts.run("scontrol", "requeue", victim.job_id)
    ended = victim.wait_for_end(2)
    assert ended.cause == "preempted" and ended.end_step >= reached
    victim.wait_for_steps(3)
    assert victim.steps_lost(2, ended.end_step) == 0


def test_a_rank_killed_by_kill_9_costs_the_steps_since_the_last_checkpoint(victim: Victim) -> None:
    reached = victim.wait_for_steps(3)
    victim.kill(rank=1)
    victim.wait_for_steps(4)
    assert victim.attempt(3).cause == "lost peer"
    assert victim.steps_lost(3, reached) <= EVERY_STEPS


def test_ranks_that_outlive_their_slurmd_do_no_harm(victim: Victim, hosts: SlurmHosts) -> None:
    """The split brain. They hang while the scheduler gives their host up, and wake when the run is elsewhere."""
    reached, lost = victim.wait_for_steps(4), where(victim)
    pids = [victim.pid(rank) for rank in (0, 1)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    hosts.kill_slurmd(lost)
    hosts.wait_until_down(lost)
    victim.wait_for_steps(5)
    assert where(victim) != lost
    assert victim.steps_lost(4, reached) <= EVERY_STEPS
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    victim.wait("the old ranks end themselves", lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids) or None)
    hosts.reboot(lost)


def test_a_host_that_dies_costs_the_steps_since_the_last_checkpoint(victim: Victim, hosts: SlurmHosts) -> None:
    reached, lost = victim.wait_for_steps(5), where(victim)
    hosts.kill_node(lost)
    victim.wait_for_steps(6)
    assert victim.attempt(5).cause == ""
    assert where(victim) != lost
    assert victim.steps_lost(5, reached) <= EVERY_STEPS
    hosts.start_node(lost)


def test_in_the_end_nothing_has_happened(victim: Victim, unbroken: Run) -> None:
    victim.wait_for_state("finished")
    assert len(victim.run.attempts()) == 6
    victim.assert_as_if_nothing_had_been(unbroken)
