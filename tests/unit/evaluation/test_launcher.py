"""The processes of an evaluation, and what libraries print in them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import timm

import rsb_cluster.cli.evaluate as evaluate_command
from rsb_cluster.data.make import make_set
from rsb_cluster.errors import RsbError
from rsb_cluster.evaluation.launcher import evaluate
from rsb_cluster.evaluation.record import EvaluationRequest
from rsb_cluster.node.gpu_locks import FOLDER_ENV, GpuLocks
from rsb_cluster.storage.store import Store
from tests.command import ROOT
from tests.faults.lab import few_digits

PRINTS = "import os\nos.write(1, b'host:7:7 [0] NCCL INFO cudaDriverVersion 12020\\n')\n"
HELD = """
import sys
from rsb_cluster.node.gpu_locks import GpuLocks
locks = GpuLocks(["0"])
assert not locks.try_acquire()
locks.name_run("a1-resnet50-s0")
print("held", flush=True)
sys.stdin.read()
"""
DIES = "import os, sys\nif 'numpy' not in sys.modules: os._exit(0)\n"


@pytest.fixture
def request_(tmp_path: Path) -> EvaluationRequest:
    make_set({"val": few_digits()["val"]}, Store(tmp_path / "data"))
    safetensors.torch.save_file(
        timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "w.safetensors"
    )
    return EvaluationRequest(
        sources=(str(tmp_path / "w.safetensors"),), runs=str(tmp_path), data=str(tmp_path / "data"),
        model="test_resnet", resolution=32,
    )  # fmt: skip


def at_start(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each Python run this code when it starts."""
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_library_that_prints_does_not_disturb(
    tmp_path: Path, request_: EvaluationRequest, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the GPUs are held while its processes run, but not for a request that cannot work."""
    at_start(tmp_path, PRINTS, monkeypatch)
    seen: list[str] = []

    @contextmanager
    def hold() -> Iterator[None]:
        seen.append("held")
        yield
        seen.append("released")

    with pytest.raises(RsbError, match="there are no shards"):
        list(evaluate(request_.model_copy(update={"data": "/no"}), procs=2, hold=hold, progress=lambda *_: None))
    assert seen == []
    (found,) = evaluate(request_, procs=2, hold=hold, progress=lambda *_: seen.append("running"))
    assert (seen[0], seen[-1]) == ("held", "released") and "running" in seen
    assert (found.samples, found.processes) == (32, 2)
    printed = capfd.readouterr()
    assert "NCCL INFO" in printed.err and printed.out == ""


def test_a_process_that_ends_without_a_word_is_an_error(
    tmp_path: Path, request_: EvaluationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_start(tmp_path, DIES, monkeypatch)
    with pytest.raises(RsbError, match="of the evaluation failed: a helper process ended before its work was done"):
        list(evaluate(request_, procs=2, progress=lambda done, total: None))


def test_an_evaluation_on_gpus_waits_for_the_training_on_them_and_keeps_the_next_one_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command's own locks: what it does with them is seen without a GPU."""
    monkeypatch.setenv(FOLDER_ENV, str(tmp_path / "locks"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    told: list[str] = []
    command = [sys.executable, "-c", HELD]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdin is not None and training.stdout is not None
        training.stdout.readline()

        def end_training(why: str) -> None:
            told.append(why)
            training.stdin.close()  # type: ignore[union-attr]

        monkeypatch.setattr(evaluate_command, "log", end_training)
        with evaluate_command._hold_gpus(None, 1):
            others = [GpuLocks([device]) for device in "01"]
            assert [lock.try_acquire() for lock in others] == ["waits for GPU 0, in use by an evaluation", ""]
            others[1].release()
    assert told == ["waits for GPU 0, in use by a1-resnet50-s0; --procs evaluates on CPUs"]
    assert others[0].try_acquire() == "", "the lock ended with the evaluation"
    others[0].release()
    with evaluate_command._hold_gpus(2, None):
        assert [lock.try_acquire() for lock in others] == ["", ""], "on CPUs nothing is locked"
    for lock in others:
        lock.release()
