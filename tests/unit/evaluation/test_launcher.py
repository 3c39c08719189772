"""The processes of an evaluation, and what libraries print in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import timm

from rsb_cluster.data.make import make_set
from rsb_cluster.errors import RsbError
from rsb_cluster.evaluation.launcher import evaluate
from rsb_cluster.evaluation.record import EvaluationRequest
from rsb_cluster.storage.store import Store
from tests.faults.lab import few_digits

PRINTS = "import os\nos.write(1, b'host:7:7 [0] NCCL INFO cudaDriverVersion 12020\\n')\n"
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
    at_start(tmp_path, PRINTS, monkeypatch)
    (found,) = evaluate(request_, procs=2, progress=lambda done, total: None)
    assert (found.samples, found.processes) == (32, 2)
    printed = capfd.readouterr()
    assert "NCCL INFO" in printed.err and printed.out == ""


def test_a_process_that_ends_without_a_word_is_an_error(
    tmp_path: Path, request_: EvaluationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_start(tmp_path, DIES, monkeypatch)
    with pytest.raises(RsbError, match="of the evaluation failed: a helper process ended before its work was done"):
        list(evaluate(request_, procs=2, progress=lambda done, total: None))
