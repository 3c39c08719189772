"""Whether a micro-batch fits into the memory of the GPUs, found before the attempt counts."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.errors import RsbError
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.losses import criterion
from rsb_cluster.train.model import AMP_DTYPE, build_model
from rsb_cluster.train.recomputation import enable

# Copies of the parameters that the first step creates: LAMB's two moments and its direction, and the average.
_COPIES = {"lamb": 3, "adamw": 2, "sgd": 1}

# What a user can do about it.
OOM_CHOICES = (
    "Use more processes (--nodes, --gpus-per-node), gradient checkpointing (--set job.gradient_checkpointing=true) or "
    "train.amp; or smaller micro-batches (another --virtual-ranks), which are other mathematics and another run"
)


class TooLargeError(RsbError):
    """A micro-batch does not fit into the memory of a GPU."""


def fit_micro_batch(recipe: Recipe, images: int, group: ProcessGroup, *, recompute: bool = False) -> int:
    """Rehearse a micro-batch, and return in how many equal parts, one after the other, each rank is to compute it.

    Without BatchNorm an image knows nothing of the others in the network, so the gradients of the parts of a mixed
    micro-batch add up to those of the whole. With it, the whole must fit.

    Args:
        recipe: The recipe.
        images: Images that a rank has of a micro-batch.
        group: The processes; each calls this, and all get the same number.
        recompute: Whether gradient checkpointing is on.

    Raises:
        TooLargeError: It does not fit, in parts neither; on all ranks.
    """
    model = build_model(recipe).to(group.device)
    if recipe.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if recompute:
        enable(model)
    copies = _COPIES[recipe.optimizer.name] + bool(recipe.train.ema_decay)
    lasting = [torch.empty_like(p) for _ in range(copies) for p in model.parameters()]
    whole = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    reason = "BatchNorm needs it whole" if whole else "torch.compile needs it whole" if recipe.train.compile else ""
    if recompute and not reason:
        reason = "gradient checkpointing needs it whole"  # what is computed again draws for the part alone
    choices = [1] if reason else [parts for parts in range(1, images + 1) if images % parts == 0]
    fitting, problem = 0, ""
    for parts in choices:
        problem = _try(model, recipe, images, parts, group.device)
        if not problem:
            fitting = parts
            break
    del model, lasting
    _free(group.device)
    found: list[tuple[int, str]] = [
        json.loads(text) for text in group.gather("micro-batch", json.dumps([fitting, problem]))
    ]
    if any(not fits for fits, _ in found):
        rank = next(rank for rank, (fits, _) in enumerate(found) if not fits)
        why = reason or "nor does one image alone"
        raise TooLargeError(
            f"out of memory: a micro-batch of {images} images of {recipe.augment.resolution} px does not fit into the "
            f"GPU of rank {rank} on {group.hosts[rank]} ({why}): {found[rank][1]} {OOM_CHOICES}."
        )
    return max(fits for fits, _ in found)


def _try(model: nn.Module, recipe: Recipe, images: int, parts: int, device: torch.device) -> str:
    """Compute a part of a micro-batch, forward and backward; return the error if it does not fit."""
    problem = ""
    try:
        _compute(model, recipe, images, parts, device)
    except torch.OutOfMemoryError as error:
        problem = str(error).splitlines()[0]
    # After the handler: the frames of the error hold what had been computed.
    model.zero_grad(set_to_none=True)
    _free(device)
    return problem


def _compute(model: nn.Module, recipe: Recipe, images: int, parts: int, device: torch.device) -> None:
    side, layout = recipe.augment.resolution, torch.contiguous_format
    if recipe.train.channels_last:
        layout = torch.channels_last
    images_BCHW: Tensor = torch.zeros(images, 3, side, side, device=device).contiguous(memory_format=layout)
    shares_BK = torch.zeros(images, recipe.data.num_classes, device=device)
    size = images // parts
    amp = recipe.train.amp
    with torch.autocast(device.type, dtype=AMP_DTYPE[amp], enabled=amp != "off"):
        logits_BK = model.train()(images_BCHW[:size])
    criterion(recipe.loss)(logits_BK, shares_BK[:size]).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
