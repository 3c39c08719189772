"""Kernels that a step launches, against those of the network's own forward and backward pass.

    python -m tests.benchmarks.launches [--px 64]

Needs no GPU: counts the operations that reach a device in a real step of the training loop, an operation on a list of
tensors as the kernels that CUDA makes of it. A launch costs the host some 5 µs, and the device as much where it is done
with the one before; so a step that launches much else than its network is slower than the network.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from timm.optim import Lamb
from torch.utils._python_dispatch import TorchDispatchMode

from rsb_cluster.config.catalog import load_job
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.node.stopping import StopFlag
from rsb_cluster.runs import lease
from rsb_cluster.runs.run import Attempt, Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.trainer import Trainer
from rsb_cluster.train.watchdog import Watchdog
from tests.faults.lab import new_run

MODELS = {"a1": "resnet50", "a3": "resnet50", "deit": "deit_small_patch16_224"}
IMAGES = 4  # of a step

# aten/src/ATen/native/cuda/MultiTensorApply.cuh: tensors and blocks of a launch by the number of lists, and a block.
_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_BLOCKS, _BLOCK_ELEMENTS = 320, 65536
# They allocate, or change what is known of a tensor.
_NO_KERNEL = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::detach", "aten::_unsafe_view", "aten::lift_fresh", "aten::resize_", "aten::set_", "aten::item",
    "aten::scalar_tensor", "profiler::_record_function_enter_new", "profiler::_record_function_exit",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts kernels by operation, and the values that the host reads (on a GPU it waits there)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            self.reads += 1
        elif not func.is_view and name not in _NO_KERNEL:
            lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], torch.Tensor)]
            many = lists and ("_foreach_" in name or "_fused_" in name)
            self.kernels[name] += _of_lists(lists) if many else 1
        return func(*args, **kwargs or {})


def _of_lists(lists: list[Any]) -> int:
    tensors = lists[0]
    blocks = sum(math.ceil(t.numel() / _BLOCK_ELEMENTS) for t in tensors)
    return max(math.ceil(len(tensors) / _TENSORS[min(len(lists), 5)]), math.ceil(blocks / _BLOCKS))


@contextlib.contextmanager
def trainer_of(run: Run) -> Iterator[Trainer]:
    """The trainer of an attempt that is alone."""
    job, _ = load_job("local")
    group = ProcessGroup(Ranks(0, 0, 1, "launches", 0, 1), run.store, wait_s=10, collective_s=10)
    draft = Attempt(number=0, job_id="launches", world_size=1, hosts=(), started=time.time(), start_step=0)
    watchdog = Watchdog(group, stalled_s=0, peer_timeout_s=0, report=lambda *_: None, exit_rank=lambda _: None)
    claimed = lease.acquire(run, draft)
    # One micro-batch: a step of several launches the network's kernels as often, and the rest once.
    spec = run.spec().model_copy(update={"virtual_ranks": 1})
    yield Trainer(run, spec, run.recipe(), job, group, StopFlag(), watchdog, claimed)
    group.close()


def of_the_network(trainer: Trainer, side: int) -> Launches:
    """The kernels of a forward and a backward pass, as timm's models and autograd launch them."""
    images, network = torch.zeros(IMAGES, 3, side, side), trainer.replica.model.train()
    with Launches() as launches:
        with trainer.replica.autocast():
            logits = network(images)
        logits.float().sum().backward()
    trainer.replica.optimizer.zero_grad(set_to_none=True)
    return launches


def of_a_step(trainer: Trainer) -> Launches:
    """The kernels of the second step; the first makes what lasts."""
    counted: list[Launches] = []
    step = trainer._step

    def count(source: Any) -> None:
        # The images are decoded before it counts: on a GPU that is done elsewhere.
        batches = source._source
        source._source = iter([next(batches) for _ in trainer.local_virtual_ranks])
        with Launches() as launches:
            step(source)
        source._source = batches
        counted.append(launches)

    trainer._step = count  # type: ignore[method-assign]
    trainer.train()
    return counted[1]


def of_timms_loop(trainer: Trainer) -> int:
    """The kernels of an optimizer step in the form that timm had until 1.0.30."""
    groups = [
        {"params": g["params"], "weight_decay": g["weight_decay"], "lr": g["lr"]}
        for g in trainer.replica.optimizer.param_groups
    ]
    for p in trainer.replica.model.parameters():
        p.grad = torch.zeros_like(p)
    with Launches() as launches:
        Lamb(groups, foreach=False).step()
    return launches.kernels.total()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--px", type=int, default=64, help="side of the images; 224 for a ViT in any case")
    side = parser.parse_args().px
    torch.manual_seed(0)
    print("recipe   network   step   ratio   read by the host   largest of the rest")
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"train": 2 * IMAGES, "val": IMAGES}
        made = {n: dataclasses.replace(s, entries=s.entries[: sizes[n]]) for n, s in open_set("digits").items()}
        make_set(made, Store(f"{folder}/data"), shard_samples=50)
        for recipe, model in MODELS.items():
            px = 224 if "patch" in model else side
            run = new_run(
                f"{folder}/{recipe}", f"{folder}/data", f"model.name={model}", f"train.global_batch={IMAGES}",
                f"data.train_samples={sizes['train']}", f"data.val_samples={sizes['val']}", "data.num_classes=10",
                "data.set=digits", f"augment.resolution={px}", f"eval.resolution={px}", "schedule.epochs=1",
                "schedule.warmup_epochs=0", "train.virtual_ranks=1", recipe=recipe,
            )  # fmt: skip
            with trainer_of(run) as trainer:
                network = of_the_network(trainer, px)
                step = of_a_step(trainer)
                loop = of_timms_loop(trainer) if run.recipe().optimizer.name == "lamb" else 0
            rest = step.kernels - network.kernels
            ratio = step.kernels.total() / network.kernels.total()
            top = ", ".join(f"{count} {name.removeprefix('aten::')}" for name, count in rest.most_common(4))
            print(
                f"{recipe:6} {network.kernels.total():9} {step.kernels.total():6} {ratio:7.2f} {step.reads:18}   {top}"
                + (f" (timm's loop: {loop})" if loop else ""),
                flush=True,
            )


if __name__ == "__main__":
    main()
