"""Why an attempt ended, as an exception says it, and the exit code that tells it to the scheduler."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import torch

from rsb_cluster.errors import AccessError, RsbError, StorageError
from rsb_cluster.node.exit_codes import EXIT_FAILED, EXIT_RESTART, EXIT_STOPPED
from rsb_cluster.runs import gpu_hours, lease
from rsb_cluster.runs.run import Cause, RunGoneError
from rsb_cluster.storage.redact import redact
from rsb_cluster.train.determinism import explain_refusal
from rsb_cluster.train.devices import DeviceError
from rsb_cluster.train.input.decoder_process import DecoderDiedError
from rsb_cluster.train.lost_peer import LostPeerError, is_lost_peer, is_nccl_error
from rsb_cluster.train.rehearsal import OOM_CHOICES
from rsb_cluster.train.watchdog import Watchdog

EXIT_CODES: dict[Cause, int] = {
    "preempted": EXIT_RESTART,
    "timed out": EXIT_RESTART,
    "lost peer": EXIT_RESTART,
    "crashed": EXIT_RESTART,
    "stuck": EXIT_RESTART,
    "failed": EXIT_FAILED,
    "stopped": EXIT_STOPPED,
    "superseded": EXIT_STOPPED,
}

OOM_HINT = (
    "; the kernel killed a process on this host because it ran out of memory. Request more memory (job.mem_gb), or use "
    "fewer loader workers"
)


def exit_with(cause: Cause) -> NoReturn:
    """Exit the process. Not by sys.exit, as the threads of a broken process group or of a slow save may never end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODES[cause])


def explain_end(error: Exception, watchdog: Watchdog | None, kills: int) -> tuple[Cause, str]:
    """Return the cause of an attempt's end, and its message, for an exception and what else is known.

    Args:
        error: The exception.
        watchdog: Tells whether NCCL lost a peer, which its error does not; None before there is one.
        kills: The kernel's OOM kills on this host before the attempt.
    """
    if is_nccl_error(error) and not isinstance(error, torch.OutOfMemoryError) and watchdog is not None:
        if watchdog.find_lost():
            return "lost peer", f"lost a peer rank: {classify(error)[1]}"
        return "crashed", (
            f"{classify(error)[1]} All ranks are alive. If it is the network: set NCCL_SOCKET_IFNAME to the "
            "interface by which the nodes reach each other (ip addr), and NCCL_DEBUG=INFO to see what NCCL chose."
        )
    cause, message = classify(error)
    if isinstance(error, DecoderDiedError) and oom_kills() > kills:
        message += OOM_HINT
    return cause, message


def classify(error: BaseException) -> tuple[Cause, str]:
    """Return the cause of an attempt's end, and its message, for an exception."""
    text = redact(str(error)) or type(error).__name__
    if isinstance(error, lease.SupersededError):
        return "superseded", text
    if isinstance(error, gpu_hours.BudgetExceededError):
        return "stopped", text
    if isinstance(error, RunGoneError):
        return "failed", text  # what would another start train?
    if isinstance(error, lease.EndedError):
        return error.cause, text
    if refusal := explain_refusal(error):
        return "failed", refusal
    if isinstance(error, DeviceError):
        return "crashed", text  # another host may have the GPUs
    if isinstance(error, LostPeerError) or is_lost_peer(error):
        return "lost peer", text
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _is_host_memory(error):
        return "failed", (
            f"out of memory: {text.splitlines()[0]} {OOM_CHOICES}; where it is the host's memory, more of it (--set "
            "job.mem_gb)."
        )
    if isinstance(error, StorageError) and not isinstance(error, AccessError):
        return "crashed", text  # may be a transient error of the network
    if isinstance(error, RsbError):
        return "failed", text
    return "crashed", f"{type(error).__name__}: {text}"


def _is_host_memory(error: BaseException) -> bool:
    """Whether torch ran out of host memory, for which it has no error class."""
    signs = (
        "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "std::bad_alloc",
        "can't start new thread",
    )  # fmt: skip
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def oom_kills() -> int:
    """Return the number of the kernel's OOM kills on this host since boot."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
