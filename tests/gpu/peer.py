"""timm's training loop, as its ``train.py`` has it, which is not in its wheel: what this package is compared with.

timm's own create_loader with its prefetcher and FastCollateMixup, its model, create_optimizer_v2, losses and
NativeScaler, and the order of calls of ``train_one_epoch``, for one GPU or several by DDP. What is left out is logging
and the learning rate's schedule. Started by tests.gpu.evidence, one process a rank.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm import create_model
from timm.data import FastCollateMixup, Mixup, create_dataset, create_loader
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler
from torch.nn.parallel import DistributedDataParallel

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.train.data_wait import DataWait
from tests.gpu.cases import CLASSES, Case, Speed, case_of, cores_per_rank, peak_memory, read_request, report

AMP = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Repeated(torch.utils.data.Dataset[Any]):
    """A data set several times over: an epoch of a few thousand photographs would be mostly its end."""

    def __init__(self, files: str, times: int) -> None:
        self._inner = create_dataset("", root=files)
        self._times = times

    def __len__(self) -> int:
        return self._times * len(self._inner)

    def __getitem__(self, number: int) -> Any:
        return self._inner[number % len(self._inner)]

    @property
    def transform(self) -> Any:
        return self._inner.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self._inner.transform = transform


def mixup_of(recipe: Recipe) -> dict[str, Any]:
    a = recipe.augment
    return {
        "mixup_alpha": a.mixup, "cutmix_alpha": a.cutmix, "prob": a.mix_prob, "switch_prob": a.mix_switch_prob,
        "mode": "batch", "label_smoothing": recipe.loss.smoothing, "num_classes": CLASSES,
    }  # fmt: skip


def loader_of(recipe: Recipe, case: Case, files: str, device: torch.device, world_size: int) -> Any:
    """As train.py makes it. Repeated augmentation is a sampler of a distributed training, so one rank is one, too."""
    a = recipe.augment
    size = len(Repeated(files, 1))
    needed = (case.warm_up + case.steps + 2) * case.batch * world_size + 256
    return create_loader(
        Repeated(files, -(-needed // size)),
        input_size=(3, a.resolution, a.resolution),
        batch_size=case.batch,
        is_training=True,
        use_prefetcher=True,
        re_prob=a.erase_prob,
        re_mode=a.erase_mode,
        scale=a.crop_scale,
        ratio=a.crop_ratio,
        hflip=a.hflip,
        color_jitter=a.color_jitter,
        auto_augment=a.rand_augment or None,
        num_aug_repeats=a.repeats if a.repeats > 1 else 0,
        interpolation=a.interpolation,
        mean=recipe.data.mean,
        std=recipe.data.std,
        num_workers=cores_per_rank(world_size),
        distributed=True,
        collate_fn=FastCollateMixup(**mixup_of(recipe)),
        pin_memory=device.type == "cuda",  # not its default, but faster
        device=device,
    )


def synthetic(recipe: Recipe, case: Case, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield one mixed batch on the device for ever."""
    side = recipe.augment.resolution
    images = torch.randn(case.batch, 3, side, side, device=device)
    labels = torch.randint(CLASSES, (case.batch,), device=device)
    mixed = Mixup(**mixup_of(recipe))(images, labels)
    while True:
        yield mixed


def train(case: Case, files: str, device: torch.device, world_size: int, *, fed: bool) -> Speed:
    """Train for the case's steps."""
    recipe = case.read_recipe(world_size)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    format_ = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    model: torch.nn.Module = create_model(
        case.model, num_classes=CLASSES, drop_path_rate=recipe.model.drop_path_rate or None
    ).to(device, memory_format=format_)
    spec = recipe.optimizer
    settings: dict[str, Any] = {} if spec.name == "sgd" else {"eps": spec.eps, "betas": spec.betas}
    optimizer = create_optimizer_v2(model, spec.name, lr=spec.lr, weight_decay=spec.weight_decay, **settings)
    scaler = NativeScaler(device=device.type) if recipe.train.amp == "fp16" else None
    if recipe.loss.name == "bce":
        loss_fn: torch.nn.Module = BinaryCrossEntropy(target_threshold=recipe.loss.target_threshold or None)
    else:
        loss_fn = SoftTargetCrossEntropy()
    if world_size > 1:
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    batches = iter(loader_of(recipe, case, files, device, world_size) if fed else synthetic(recipe, case, device))
    wait, started, waited = DataWait(device), 0.0, 0.0
    model.train()
    for step in range(case.warm_up + case.steps):
        if step == case.warm_up:
            finish(device)
            wait.take()
            started = time.perf_counter()
        with wait.measure():
            images, target = next(batches)
        images = images.contiguous(memory_format=format_)
        with torch.autocast(device.type, AMP.get(recipe.train.amp), enabled=recipe.train.amp in AMP):
            loss = loss_fn(model(images), target)
        if scaler is not None:
            scaler(loss, optimizer, parameters=model.parameters())
        else:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    finish(device)
    seconds = time.perf_counter() - started
    waited = wait.take()
    return Speed(case.steps * case.batch * world_size / seconds, waited / seconds, peak_memory())


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    request = read_request(sys.argv)
    rank, world_size = request["rank"], request["world_size"]
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    meeting = Path(request["folder"]) / "peer-rendezvous"
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    files = str(Path(request["data"]) / "files")
    speed = train(case_of(request), files, device, world_size, fed=request["fed"])
    dist.destroy_process_group()
    report(speed)


if __name__ == "__main__":
    main()
