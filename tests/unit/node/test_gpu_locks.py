"""GPUs are locked by what they are, by whatever name; the kernel releases the locks of a dead process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsb_cluster.errors import RsbError
from rsb_cluster.node.gpu_locks import FOLDER_ENV, GpuLocks, gpu_names
from tests.command import ROOT
from tests.servers.daemons import GUARD_S

UUIDS = ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GPU-a5a5c0de-0000-4106-c12f-20bd9faed9f6"]
MIG = "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/0"

HOLDER = """
import sys
from rsb_cluster.node.gpu_locks import GpuLocks
locks = GpuLocks(sys.argv[1:])
print(locks.try_acquire() or "held", flush=True)
locks.name_run("a1-resnet50-s0")
sys.stdin.read()
"""


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that says what nvidia-smi says on a host with two GPUs."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' {' '.join(UUIDS)}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_ENV, str(tmp_path / "locks"))
    return tmp_path / "locks"


@pytest.fixture
def holder(folder: Path, nvidia_smi: None) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the first GPU."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER, "0"]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.usefixtures("nvidia_smi")
def test_a_gpu_has_one_name_however_it_is_called() -> None:
    assert gpu_names(["0", "1"]) == UUIDS
    assert gpu_names(["GPU-8932", UUIDS[1]]) == UUIDS
    assert gpu_names(["7", "GPU-", MIG]) == ["7", "GPU-", MIG], "what cannot be told is called as it is"


def test_without_nvidia_smi_a_gpu_has_its_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_names(["0", "1"]) == ["0", "1"]


def test_all_gpus_are_locked_or_none(holder: subprocess.Popen[str]) -> None:
    wanted, other = GpuLocks(["1", "0"]), GpuLocks([UUIDS[1], MIG])
    while (why := wanted.try_acquire()).endswith("another run"):
        pass  # it says its name a moment after it has the lock
    assert why == "waits for GPU 0, in use by a1-resnet50-s0"
    assert other.try_acquire() == "", "the first has kept nothing"
    other.release()
    holder.kill()
    holder.wait(GUARD_S)
    assert wanted.try_acquire() == ""
    assert other.try_acquire() == f"waits for GPU {UUIDS[1]}, in use by another run"


def test_nothing_is_locked_without_gpus(folder: Path) -> None:
    assert GpuLocks([]).try_acquire() == "" and not folder.exists()


def test_all_users_share_the_folder_and_each_file(folder: Path) -> None:
    before = os.umask(0o077)
    try:
        locks = GpuLocks(["0"])
        assert locks.try_acquire() == ""
        locks.name_run("digits-s0")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o7777 == 0o1777
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        "0": 0o644,
        f"0.{os.getuid()}": 0o600,
    }


def test_a_lock_whose_file_was_deleted_is_made_again(folder: Path) -> None:
    first, second = GpuLocks(["0"]), GpuLocks(["0"])
    assert first.try_acquire() == ""
    first.release()
    (folder / "0").unlink()
    assert first.try_acquire() == "" and second.try_acquire() != ""


def test_a_link_in_the_folders_place_is_refused(folder: Path, tmp_path: Path) -> None:
    folder.symlink_to(tmp_path)
    with pytest.raises(RsbError, match=f"cannot lock GPUs in {folder}: it is no folder. Set RSB_GPU_LOCKS to a folder"):
        GpuLocks(["0"]).try_acquire()
