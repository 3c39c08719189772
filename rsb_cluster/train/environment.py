"""The environment of an attempt: all versions that can change a result, as the ranks find them on their nodes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from rsb_cluster.runs.provenance import describe_code, describe_packages
from rsb_cluster.train.distributed import ProcessGroup

_CONTAINERS = ("APPTAINER_NAME", "SINGULARITY_NAME", "SLURM_CONTAINER")
_DRIVER = Path("/sys/module/nvidia/version")


def describe_environment(group: ProcessGroup) -> dict[str, str]:
    """Return the environment of an attempt: the versions on this node, and the models of GPUs of all ranks."""
    code = describe_code()
    found = {name: code.get(name, "") for name in ("version", "commit", "uncommitted", "python")}
    found |= describe_packages() | {
        "torch": torch.__version__,  # with its build, such as +cu126
        "CUDA": torch.version.cuda or "",
        "cuDNN": str(torch.backends.cudnn.version() or "") if torch.version.cuda else "",
        "NCCL": _nccl() if torch.version.cuda else "",
        "driver": _driver(),
        "GPU": ", ".join(sorted(group.gpu_models)),
        "container": _container(),
    }
    return {name: value for name, value in found.items() if value}


def _nccl() -> str:
    with contextlib.suppress(Exception):  # torch may be built without it
        return ".".join(map(str, torch.cuda.nccl.version()))
    return ""


def _driver() -> str:
    with contextlib.suppress(OSError):
        return _DRIVER.read_text().strip()
    return ""


def _container() -> str:
    """Return the name of the container that this process runs in, ``docker`` if it has none; empty outside of one."""
    named = next(filter(None, map(os.environ.get, _CONTAINERS)), "")
    return named or ("docker" if Path("/.dockerenv").exists() else "")
