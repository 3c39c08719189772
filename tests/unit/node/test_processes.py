"""A process is known by a name that no other has, on this machine or on another, before a reboot or after."""

import dataclasses
import os
import re
import socket
import subprocess
import sys

import pytest

from rsb_cluster.node.processes import Process
from tests.servers.daemons import poll


def test_a_process_is_named_and_found_again(sleeper):
    process = Process.of(sleeper.pid)
    assert (process.host, process.pid) == (socket.gethostname(), sleeper.pid)
    assert Process.parse(str(process)) == process
    assert re.fullmatch(r"[A-Za-z0-9.-]+", str(process)), "it is part of file names, and '_' parts those"
    assert process.is_alive and not process.is_elsewhere


def test_a_process_finds_the_name_that_its_parent_gave_it():
    code = "from rsb_cluster.node.processes import Process; import os; print(Process.of(os.getpid()))"
    # The shell is replaced by the program, as with a job's setup.
    with subprocess.Popen(["bash", "-c", f'exec {sys.executable} -c "{code}"'], stdout=subprocess.PIPE) as child:
        name = str(Process.of(child.pid))
        assert child.communicate()[0].decode().strip() == name


def test_a_process_that_has_ended_is_not_alive_even_if_nobody_waits_for_it(sleeper):
    process = Process.of(sleeper.pid)
    sleeper.kill()
    assert poll(lambda: not process.is_alive, interval=0.01)
    assert Process.of(sleeper.pid) == process, "it is a zombie, and its number is still taken"
    sleeper.wait()
    assert not process.is_alive and not process.is_elsewhere
    with pytest.raises(OSError):
        Process.of(sleeper.pid)


@pytest.mark.parametrize("other", [{"start": 1}, {"boot": "00000000"}, {"pid": 2**22 + 1}])
def test_a_later_process_of_that_number_is_another_one(sleeper, other):
    process = dataclasses.replace(Process.of(sleeper.pid), **other)
    assert not process.is_alive and not process.is_elsewhere


def test_a_process_of_another_machine_is_not_one_of_ours(sleeper):
    process = dataclasses.replace(Process.of(sleeper.pid), host="far-away", boot="00000000")
    assert process.is_elsewhere and not process.is_alive
    container = dataclasses.replace(Process.of(sleeper.pid), host="5c1d3e6f7a8b", start=1)
    assert container.is_elsewhere, "it has the kernel of its host, but other processes"


def test_a_machine_that_is_called_otherwise_by_now_knows_its_processes(sleeper, monkeypatch):
    process = Process.of(sleeper.pid)
    monkeypatch.setattr(socket, "gethostname", lambda: "at_home.local")
    assert process.is_alive and not process.is_elsewhere
    assert Process.of(os.getpid()).host == "at-home.local"


@pytest.mark.parametrize(
    "text", ["", "123", "7_1", "rsb-20260101-120000-1a2b3c", "host-1-2-1a2b3c", "host-1-2-1a2b3c4g"]
)
def test_ids_of_other_jobs_are_no_processes(text):
    assert Process.parse(text) is None
