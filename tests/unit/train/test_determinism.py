"""The settings of deterministic training, and what is said of an operation that has no deterministic kernel."""

import os
from collections.abc import Iterator

import pytest
import torch

from rsb_cluster.errors import ConfigError
from rsb_cluster.train.causes import classify
from rsb_cluster.train.determinism import explain_refusal, set_determinism

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    yield
    set_determinism(False)


def settings() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


def test_all_settings_are_made_together_and_taken_back() -> None:
    set_determinism(True)
    assert settings() == (True, True, False) and os.environ[VARIABLE] == ":4096:8"
    set_determinism(False)
    assert settings() == (False, False, True)


def test_a_setting_of_cublas_that_promises_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ":16:8")
    set_determinism(True)
    monkeypatch.setenv(VARIABLE, ":0:0")
    set_determinism(False)
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG = ':0:0'"):
        set_determinism(True)


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    set_determinism(True)
    with pytest.raises(RuntimeError) as refused:
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))  # one that has none on CPUs, either
    cause, message = classify(refused.value)
    assert cause == "failed" and message.startswith("train.deterministic: put_ has no deterministic version in torch")
    assert explain_refusal(RuntimeError("another")) == ""
