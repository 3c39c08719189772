"""``train.deterministic``: the same bits each time on the same GPUs.

A GPU sums in whatever order its threads finish, and cuDNN takes the algorithm that was fastest when it tried them. With
this mode each kernel has one order, and a kernel that has none is refused. What is promised: the same model of GPU, the
same versions of the software, the same number of processes and the same layout of them on nodes (NCCL's rings and trees
follow it) give the same bits; so a preempted run equals an uninterrupted one.
"""

from __future__ import annotations

import os
import re

import torch

from rsb_cluster.errors import ConfigError

# NVIDIA's two settings for which cuBLAS promises equal bits with several streams (its manual, "Results
# reproducibility"), and torch refuses others. The first is faster, for 24 MiB of a GPU's memory.
WORKSPACES = (":4096:8", ":16:8")
_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_REFUSED = re.compile(r"(\S+) does not have a deterministic implementation")


def set_determinism(enabled: bool) -> None:
    """Choose between the fastest kernels and deterministic ones; to be called before CUDA starts.

    Raises:
        ConfigError: The environment has a setting of cuBLAS for which it promises nothing.
    """
    if enabled and os.environ.setdefault(_VARIABLE, WORKSPACES[0]) not in WORKSPACES:
        raise ConfigError(
            f"train.deterministic: the environment has {_VARIABLE} = '{os.environ[_VARIABLE]}', with which cuBLAS sums "
            f"in any order. Remove it, or use {' or '.join(WORKSPACES)}."
        )
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.deterministic = enabled
    torch.backends.cudnn.benchmark = not enabled


def explain_refusal(error: BaseException) -> str:
    """Return a message for the user if torch refused an operation because it has no deterministic kernel; else ""."""
    found = _REFUSED.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return ""
    return (
        f"train.deterministic: {found[1]} has no deterministic version in torch {torch.__version__}. Use another "
        "model, or --set train.deterministic=false; then runs on GPUs are equal up to rounding."
    )
