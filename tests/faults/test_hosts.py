"""Faults on Slurm, one after the other, to one run of two ranks on two of four hosts.

The tests are stations of that run and stand in its order: each waits for the attempt that the one before left behind.
Preemption without a user's signal, the time limit and scancel are in tests/integration/test_slurm*.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsb_cluster.runs.run import Run
from tests.command import RsbCluster
from tests.faults.victim import EVERY_STEPS, Victim, on_slurm, submit
from tests.servers.hosts import SlurmHosts

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def victim(hosts: SlurmHosts, tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Iterator[Victim]:
    rsb = RsbCluster(tmp_path_factory.mktemp("hosts"), hosts.env)
    rsb.hold()
    two_hosts = ("--nodes", "2", "--set", "job.tasks_per_node=1", "--set", "job.slurm.partition=spot")
    yield on_slurm(rsb, submit(rsb, digits, "--job", "slurm-cpu", *two_hosts), hosts)
    hosts.cancel_all()


def where(victim: Victim) -> tuple[str, str]:
    """The hosts that the run is on: rank 0's and rank 1's."""
    first, second = victim.run.attempts()[-1].hosts
    return first, second


@pytest.fixture(scope="module")
def ghosts() -> dict[str, int]:
    """By host, the rank that lives on there when the run is elsewhere.

    It may take its watchdog to end it, and the run, which goes on meanwhile, would be finished before the next station.
    """
    return {}


def wait_until_gone(victim: Victim, ghosts: dict[str, int]) -> str:
    """Wait until the one ghost has ended itself, and return the host that it was on."""
    host, pid = ghosts.popitem()
    victim.wait("the old rank ends itself", lambda: not Path(f"/proc/{pid}").exists() or None)
    return host


def test_a_preemption_by_the_users_signal_loses_nothing(victim: Victim, hosts: SlurmHosts) -> None:
    """Under preempt_send_user_signal Slurm says SIGUSR2, which elsewhere announces the time limit."""
    reached = victim.wait_for_steps(1)
    urgent = hosts.run("sbatch", "--parsable", "-N4", "--exclusive", "-p", "main", "--wrap=true", "-o", "/dev/null")
    ended = victim.wait_for_end(1)
    assert ended.cause == "preempted" and ended.end_step >= reached
    hosts.wait_for_state(urgent.strip(), "COMPLETED")
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


def test_a_rank_that_is_stopped_is_named_with_its_host(victim: Victim) -> None:
    """By SIGSTOP. Slurm would wait a while for it and kill it then; the test does not."""
    reached, (_, second) = victim.wait_for_steps(4), where(victim)
    pid = victim.pid(rank=1)
    victim.kill(1, signal.SIGSTOP)
    stuck = victim.wait_for_end(4)
    os.kill(pid, signal.SIGKILL)
    assert stuck.cause == "stuck"
    assert f"rank 1 on {second} stalled for " in stuck.message and "does not answer" in stuck.message
    victim.wait_for_steps(5)
    assert victim.steps_lost(4, reached) <= EVERY_STEPS


def test_a_rank_that_outlives_its_slurmd_does_no_harm(
    victim: Victim, hosts: SlurmHosts, ghosts: dict[str, int]
) -> None:
    """The split brain. It hangs while the scheduler gives its host up, and wakes when the run is elsewhere.

    Its peer is dead then, so it ends as one that lost its peer, and the job script on its host would ask Slurm to
    start the job again, which runs already.
    """
    reached, (lost, _) = victim.wait_for_steps(5), where(victim)
    pid = victim.pid(rank=0)
    os.kill(pid, signal.SIGSTOP)
    hosts.kill_slurmd(lost)
    hosts.wait_until_down(lost)
    victim.wait_for_steps(6)
    assert lost not in where(victim)
    assert victim.steps_lost(5, reached) <= EVERY_STEPS
    os.kill(pid, signal.SIGCONT)
    ghosts[lost] = pid


def test_a_host_that_is_cut_off_costs_the_steps_since_the_last_checkpoint(
    victim: Victim, hosts: SlurmHosts, ghosts: dict[str, int]
) -> None:
    """Its rank lives on and sees the run's folder, as over another network, but neither its peer nor Slurm."""
    reached, (_, lost) = victim.wait_for_steps(6), where(victim)
    pid = victim.pid(rank=1)
    hosts.cut_off(lost)
    victim.rsb.go_on()
    hosts.reboot(wait_until_gone(victim, ghosts))
    victim.wait_for_steps(7)
    assert lost not in where(victim)
    assert victim.steps_lost(6, reached) <= EVERY_STEPS
    ghosts[lost] = pid


def test_a_host_that_dies_costs_the_steps_since_the_last_checkpoint(
    victim: Victim, hosts: SlurmHosts, ghosts: dict[str, int]
) -> None:
    reached, (lost, _) = victim.wait_for_steps(7), where(victim)
    hosts.kill_node(lost)
    victim.rsb.go_on()
    hosts.rejoin(wait_until_gone(victim, ghosts))
    victim.wait_for_steps(8)
    assert victim.attempt(7).cause == "lost peer" and f"rank 0 on {lost} does not answer" in victim.attempt(7).message
    assert victim.attempt(7).end_step >= reached - 1, "the other rank knows how far they were"
    assert lost not in where(victim)
    assert victim.steps_lost(7, reached) <= EVERY_STEPS
    hosts.start_node(lost)


def test_in_the_end_nothing_has_happened(victim: Victim, unbroken: Run) -> None:
    victim.rsb.allow()
    victim.wait_for_state("finished")
    assert len(victim.run.attempts()) == 8
    victim.assert_as_if_nothing_had_been(unbroken)
