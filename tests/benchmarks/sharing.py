"""What synchronised BatchNorm costs: the time of a step where k processes share a virtual rank.

    python -m tests.benchmarks.sharing [--processes 8] [--device cuda]

The processes are of this machine, each with the same number of images, so that k = 1 is the same work without the small
collectives. The rounds take turns. With ``cuda`` each has a GPU, and NCCL two communicators in one backward pass: DDP's
and BatchNorm's. Exits with 1 if the gradient where all share one virtual rank is not that of one for all images.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import sys
import tempfile
import time

import timm
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rsb_cluster.train.replica import KEEP_BUFFERS
from rsb_cluster.train.shared_rank import SharedVirtualRank

MOST_DIFFERENT = 1e-3  # of the gradient's norm; rounding gives some 1e-6


def gradient(network: nn.Module, images: Tensor) -> Tensor:
    """The gradient of a loss of these images, all of it in one row."""
    network.zero_grad()
    network(images).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def measure(rank: int, folder: str, options: argparse.Namespace) -> int:
    """Take part as a rank; return the exit code."""
    processes, on_gpu = options.processes, options.device == "cuda"
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes,
        device_id=device if on_gpu else None,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = timm.create_model(options.model).to(device).train()
    whole = torch.randn(processes * options.images, 3, options.side, options.side).to(device)
    images = whole[rank * options.images :][: options.images]
    network = DistributedDataParallel(copy.deepcopy(plain), **KEEP_BUFFERS)
    shared: dict[int, contextlib.AbstractContextManager[object]] = {1: contextlib.nullcontext()}
    for parts in (k for k in range(2, processes + 1) if processes % k == 0 and k & (k - 1) == 0):
        members = [list(range(start, start + parts)) for start in range(0, processes, parts)]
        group, _ = dist.new_subgroups_by_enumeration(members)
        slots = range(rank % parts * options.images, (rank % parts + 1) * options.images)
        shared[parts] = SharedVirtualRank(slots, parts * options.images, group)
    times: dict[int, list[float]] = {parts: [] for parts in shared}
    for _ in range(options.rounds + 1):
        for parts, context in shared.items():
            dist.barrier()
            begun = time.monotonic()
            with context:
                loss = network(images).square().mean()
            loss.backward()
            network.zero_grad()
            dist.barrier()
            times[parts].append(time.monotonic() - begun)
    with shared[processes]:
        shared_gradient = gradient(network, images)
    if rank:
        return 0
    expected = gradient(plain, whole)
    difference = float((shared_gradient - expected).norm() / expected.norm())
    layers = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    title = (
        f"{options.model}, {options.images} images of {options.side} px on each of {processes} processes, {device.type}"
    )
    table = Table("k", "step, ms", "of k = 1", "collectives of BatchNorm", title=title)
    first = statistics.median(times[1][1:])
    for parts, found in times.items():
        middle = statistics.median(found[1:])  # the first is for the connections
        table.add_row(str(parts), f"{1000 * middle:.1f}", f"{middle / first:.2f}", str(2 * layers * (parts > 1)))
    console = Console(width=100)
    console.print(table)
    console.print(f"gradient of k = {processes} against that of one process: {difference:.0e} apart")
    return int(not difference < MOST_DIFFERENT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8, help="a power of two; as many GPUs with cuda")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(options.processes):
            if (pid := os.fork()) == 0:
                try:
                    code = measure(rank, folder, options)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                    code = 2
                sys.stdout.flush()
                os._exit(code)
            children.append(pid)
        return max([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children], key=abs)


if __name__ == "__main__":
    sys.exit(main())
