"""Tests for a machine with a GPU; without one they are skipped, or made to run on the CPU to prove their code."""

from __future__ import annotations

import os

import pytest
import torch

ON_CPU = "GPU_TESTS_ON_CPU"  # without RSB_, which tests do not let through


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if os.environ.get(ON_CPU):
        return torch.device("cpu")
    pytest.skip("no GPU")
