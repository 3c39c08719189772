"""The paper's own set-up, in a page: one process for each virtual rank, plain DDP, timm's Mixup, LAMB and schedule.

``python -m tests.unit.train.plain_ddp RECIPE DATA SEED STEPS OUT`` trains a recipe (a JSON file) in double precision,
and saves losses and the state of the network. Of the package it takes the samples, their pixels and the seeds of
micro-batches; nothing that gathers, averages or mixes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import Lamb
from timm.scheduler import CosineLRScheduler
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.index import load_index
from rsb_cluster.data.order import derive_seed
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.storage.store import Store
from rsb_cluster.train.augment import seed_everything, seed_micro_batch
from rsb_cluster.train.input.loader import ThreadedBatches
from rsb_cluster.train.input.pixels.transforms import FastTrain
from rsb_cluster.train.input.streams import TrainStream
from tests.unit.train.forking import fork


def train(recipe: Recipe, data: Path, seed: int, steps: int, out: Path, rank: int) -> None:
    """Train as one process of V."""
    torch.set_default_dtype(torch.float64)
    processes, a, o = recipe.train.virtual_ranks, recipe.augment, recipe.optimizer
    store = Store(data / "train")
    index = load_index(store)
    stream = TrainStream(
        ShardReader(store, index), recipe, index, seed=seed, virtual_ranks=processes, local_virtual_ranks=[rank],
        start_step=0, stop_step=steps,
    )  # fmt: skip
    seed_everything(derive_seed(seed, 4))
    network = timm.create_model(
        recipe.model.name, num_classes=10, drop_rate=recipe.model.drop_rate, drop_path_rate=recipe.model.drop_path_rate
    )
    ddp = DistributedDataParallel(network, broadcast_buffers=False)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": o.weight_decay}]
    optimizer = Lamb(groups, lr=o.lr, eps=o.eps, betas=o.betas, max_grad_norm=1.0)
    schedule = CosineLRScheduler(optimizer, t_initial=recipe.schedule.epochs, lr_min=recipe.schedule.min_lr)
    mixup = Mixup(
        a.mixup, a.cutmix, prob=a.mix_prob, switch_prob=a.mix_switch_prob, mode="batch", label_smoothing=0.0,
        num_classes=10,
    )  # fmt: skip
    erase = RandomErasing(a.erase_prob, mode=a.erase_mode, device="cpu")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (recipe.data.mean, recipe.data.std))
    losses = []
    for step, batch in enumerate(ThreadedBatches(stream, FastTrain(recipe), side=a.resolution, threads=0, pin=False)):
        schedule.step(step // recipe.steps_per_epoch)
        seed_micro_batch(seed, step, rank)
        images, shares = mixup(erase((batch.images.double() - mean) / std), batch.labels)
        targets = (shares > 0).double()
        loss = binary_cross_entropy_with_logits(ddp.train()(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average = loss.detach().clone()
        dist.all_reduce(average)
        losses.append(average.item() / processes)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for name in state:
        if "running" in name:  # timm's --dist-bn reduce: the average of moving averages is that of their averages
            dist.all_reduce(state[name])
            state[name] /= processes
    if rank == 0:
        torch.save({"losses": losses, "state": state}, out)


def main(recipe_file: str, data: str, seed: str, steps: str, out: str) -> int:
    """Fork the processes."""
    recipe = Recipe.model_validate_json(Path(recipe_file).read_bytes())
    processes = recipe.train.virtual_ranks
    with tempfile.TemporaryDirectory() as folder:

        def work(rank: int) -> None:
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
            train(recipe, Path(data), int(seed), int(steps), Path(out), rank)

        return int(not fork(processes, work))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
