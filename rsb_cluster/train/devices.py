"""The device of a rank, and whether those of all ranks can be used together."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rsb_cluster.errors import ConfigError, RsbError
from rsb_cluster.train.lost_peer import LostPeerError

log = logging.getLogger(__name__)


class DeviceError(RsbError):
    """This host does not have the GPUs that the job requests, or they are faulty; another host may have them."""


def pick_device(local_rank: int, gpus: int | None) -> torch.device:
    """Return the device of a rank, and make it the current one.

    Args:
        local_rank: The rank on its node.
        gpus: As in `ProcessGroup`.

    Raises:
        DeviceError: CUDA sees fewer GPUs than the job requests.
    """
    if gpus == 0 or (gpus is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # If a site binds each task to a GPU of its own, a rank sees only that one.
    is_bound = visible == 1 and "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",")
    if gpus is not None and visible < gpus and not is_bound:
        raise DeviceError(
            f"{socket.gethostname()}: the job requests {gpus} GPU{'s' * (gpus > 1)} per node, and CUDA sees "
            f"{visible or 'none'}. {_describe_cuda()}. Install a torch that matches the driver, exclude this host "
            "(slurm.exclude), or request no GPU (--gpus-per-node 0)."
        )
    device = torch.device("cuda", local_rank % visible)
    torch.cuda.set_device(device)
    return device


def check_gpus(cards: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """Return the models of GPUs that the ranks train on, each once; more than one is warned of.

    Args:
        cards: Of each rank: ``host``, ``gpu`` (its UUID) and ``model``; the last two are empty on a CPU.

    Raises:
        ConfigError: Two ranks have the same GPU.
    """
    ranks_of: dict[str, list[int]] = {}
    models: dict[str, list[int]] = {}
    for rank, card in enumerate(cards):
        if card["gpu"]:
            ranks_of.setdefault(card["gpu"], []).append(rank)
            models.setdefault(card["model"], []).append(rank)
    for gpu, ranks in ranks_of.items():
        if len(ranks) > 1:
            raise ConfigError(
                f"ranks {', '.join(map(str, ranks))} on {cards[ranks[0]]['host']} have the same GPU ({gpu}): each rank "
                "needs its own. Options such as --gpu-bind=closest can bind several tasks to one: remove them from "
                "[slurm] and from SBATCH_* and SRUN_* variables, or use slurm.gpu-bind = 'none'."
            )
    if len(models) > 1:
        counts = ", ".join(f"{len(ranks)} x {model}" for model, ranks in models.items())
        log.warning("the ranks have different GPUs (%s): each step takes as long as on the slowest", counts)
    return tuple(models)


def check_health(cards: Sequence[Mapping[str, str]], rank: int) -> None:
    """Warn of what may be harmless, and leave if a GPU must not be used.

    Args:
        cards: As for `check_gpus`, with ``fault`` and ``remark`` of each GPU.
        rank: This rank.

    Raises:
        DeviceError: It is this rank's GPU.
        LostPeerError: It is the GPU of another.
    """
    for number, card in enumerate(cards):
        if card["remark"] and number == rank:
            log.warning("%s, GPU %s: %s", card["host"], card["gpu"], card["remark"])
    faults = {number: card for number, card in enumerate(cards) if card["fault"]}
    if faults:
        text = "; ".join(
            f"rank {n} on {card['host']}, GPU {card['gpu']}: {card['fault']}" for n, card in faults.items()
        )
        message = f"{text}. Submit with --exclude-failed-hosts, and tell who looks after the cluster."
        raise DeviceError(message) if rank in faults else LostPeerError(message)


def _describe_cuda() -> str:
    """Return what decides whether CUDA works here: torch's wheel, the driver, and CUDA_VISIBLE_DEVICES."""
    wheel = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    try:
        driver = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].partition(":")[2].strip()
    except (OSError, IndexError):
        driver = "none is loaded"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        f"torch {torch.__version__} {wheel}; NVIDIA driver: {driver}; CUDA_VISIBLE_DEVICES "
        f"{'is not set' if visible is None else f'= {visible!r}'}"
    )
