"""Faults on this machine, one after the other, to one run of two processes.

The tests are stations of that run and stand in its order: each waits for the attempt that the one before left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsb_cluster.runs.run import Run
from tests.command import RsbCluster
from tests.faults.victim import EVERY_STEPS, PACE, SCIENCE, Victim, on_this_machine, submit
from tests.servers.daemons import GUARD_S, kill_all

# The unbroken run that it must equal decodes in its ranks, as later attempts here do.
IN_A_PROCESS = ("--set", "job.loader_workers=2")


@pytest.fixture(scope="module")
def rsb(tmp_path_factory: pytest.TempPathFactory) -> RsbCluster:
    folder = tmp_path_factory.mktemp("local")
    made = RsbCluster(folder, {"VICTIM": str(folder)})
    made.hold()
    return made


@pytest.fixture(scope="module")
def victim(rsb: RsbCluster, digits: Path) -> Iterator[Victim]:
    found = on_this_machine(rsb, submit(rsb, digits, "--job", "local", *IN_A_PROCESS))
    yield found
    kill_all(None, [f"\0VICTIM={rsb.cwd}\0"])


def test_a_rank_that_is_stopped_is_named_and_costs_the_steps_since_the_last_checkpoint(victim: Victim) -> None:
    """By SIGSTOP; all other ranks wait for it in a collective, and look just as stuck."""
    reached, pid = victim.wait_for_steps(1), victim.pid(rank=1)
    victim.kill(1, signal.SIGSTOP)
    stuck = victim.wait_for_end(1)
    assert stuck.cause == "stuck"
    assert f"rank 1 on {stuck.hosts[0]} stalled for " in stuck.message
    assert f"is stopped (SIGSTOP, process {pid})" in stuck.message
    assert victim.run.rank_failures(1)[1]["cause"] == "stuck"
    victim.wait_for_steps(2)
    assert victim.steps_lost(1, reached) <= EVERY_STEPS


def test_a_rank_that_the_kernel_kills_for_lack_of_memory_is_named(victim: Victim, no_memory: Path) -> None:
    reached = victim.wait_for_steps(2)
    (no_memory / "cgroup.procs").write_text(str(victim.pid(rank=1)))
    victim.rsb.allow(reached + 60)  # it must ask for memory to be killed
    ended = victim.wait_for_end(2)
    assert ended.cause == "lost peer"
    assert f"rank 1 on {ended.hosts[0]} " in ended.message
    assert "the kernel killed a process on this host because it ran out of memory. Request more" in ended.message
    victim.wait_for_steps(3)
    assert victim.steps_lost(2, reached) <= EVERY_STEPS


def test_a_decoding_process_that_is_killed_costs_the_steps_since_the_last_checkpoint(victim: Victim) -> None:
    reached = victim.wait_for_steps(3)
    os.kill(victim.decoder(rank=1), signal.SIGKILL)
    victim.rsb.allow(reached + 60)  # what is decoded already is used
    ended = victim.wait_for_end(3)
    assert ended.cause == "crashed" and "decodes this rank's images has died without a word" in ended.message
    victim.wait_for_steps(4)
    assert victim.steps_lost(3, reached) <= EVERY_STEPS


def foreground(rsb: RsbCluster, data: Path) -> subprocess.Popen[str]:
    """``submit --wait`` as in a terminal: a second submit of a run that is under way only follows it."""
    command = [sys.executable, "-m", "rsb_cluster", "submit", *SCIENCE, *PACE, "--job", "local", "--data", str(data)]
    return subprocess.Popen([*command, "--wait"], cwd=rsb.cwd, env=rsb.env, stderr=subprocess.PIPE, text=True)


def until_it_says(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if text in line:
            return
    raise AssertionError(f"it never said {text!r}, but: {said}")


def test_ctrl_c_once_saves_and_stops(victim: Victim, rsb: RsbCluster, digits: Path) -> None:
    number = len(victim.run.attempts())
    reached = victim.wait_for_steps(number)
    with foreground(rsb, digits) as process:
        until_it_says(process, ": running")
        process.send_signal(signal.SIGINT)
        until_it_says(process, "Saving and stopping; press Ctrl-C again to kill the runs.")
        process.communicate(timeout=GUARD_S)
    ended = victim.wait_for_end(number)
    assert ended.cause == "stopped" and ended.end_step >= reached
    assert victim.wait_for_state("stopped")["step"] == ended.end_step


def test_ctrl_c_twice_stops_now(victim: Victim, rsb: RsbCluster, digits: Path) -> None:
    """It resumed from the last checkpoint, and ends without a save, even if its ranks do not answer."""
    number = len(victim.run.attempts()) + 1
    with foreground(rsb, digits) as process:
        until_it_says(process, "submitted")
        reached = victim.wait_for_steps(number)
        assert victim.attempt(number).start_step == victim.attempt(number - 1).end_step, "nothing was lost"
        for rank in (0, 1):
            victim.kill(rank, signal.SIGSTOP)  # so that they cannot save between the two
        process.send_signal(signal.SIGINT)
        until_it_says(process, "Saving and stopping; press Ctrl-C again to kill the runs.")
        process.send_signal(signal.SIGINT)
        until_it_says(process, "Killing the runs.")
        process.communicate(timeout=GUARD_S)
    assert victim.attempt(number).cause == ""
    assert reached > victim.attempt(number).start_step


def test_in_the_end_nothing_has_happened(victim: Victim, rsb: RsbCluster, digits: Path, unbroken: Run) -> None:
    """The attempt before was killed, and was another job's: whether it lives is waited for, here for five seconds."""
    rsb.change_trainer("from rsb_cluster.runs import lease\nlease.STALE_S = 5.0")
    submit(rsb, digits, "--job", "local", "--wait")
    victim.assert_as_if_nothing_had_been(unbroken)
