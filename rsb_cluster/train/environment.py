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
    """Return the environment of an attempt on rank 0, an empty mapping on the others; every rank calls it.

    The versions are those of rank 0's node; the models of GPUs are those of all ranks.
    """
    is_cuda = group.device.type == "cuda"
    group.store.set(f"gpu/{group.rank}", torch.cuda.get_device_name(group.device) if is_cuda else "")
    if group.rank:
        return {}
    models = sorted({group.store.get(f"gpu/{rank}").decode() for rank in range(group.world_size)})
    code = describe_code()
    found = {name: code.get(name, "") for name in ("version", "commit", "uncommitted", "python")}
    found |= describe_packages() | {
        "torch": torch.__version__,  # with its build, such as +cu126
        "CUDA": torch.version.cuda or "",
        "cuDNN": str(torch.backends.cudnn.version() or "") if torch.version.cuda else "",
        "NCCL": _nccl() if torch.version.cuda else "",
        "driver": _driver(),
        "GPU": ", ".join(filter(None, models)),
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
