"""The optimizer and the learning rate over time, both timm's.

Every optimizer takes its step in torch's fused kernels, on any device. They read on the device whether half precision
overflowed, so the host queues a step without waiting for the one before.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.optim import Lamb, create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from rsb_cluster.config.recipe import Optimizer, Schedule
from rsb_cluster.train.lamb import FusedLamb
from rsb_cluster.train.layer_decay import layer_decay_groups


def build_optimizer(model: nn.Module, spec: Optimizer) -> torch.optim.Optimizer:
    """Create timm's optimizer with all settings from the recipe."""
    arguments: dict[str, Any] = {"eps": spec.eps, "betas": spec.betas, "fused": True}
    momentum = 0.9
    if spec.name == "lamb":
        # timm's LAMB clips the global gradient norm itself; the paper's "no clipping" refers to clip_grad_norm.
        arguments["max_grad_norm"] = spec.lamb_max_grad_norm or None
        del arguments["fused"]
    elif spec.name == "sgd":
        arguments, momentum = {"nesterov": True, "fused": True}, spec.momentum
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model,
        opt=spec.name,
        lr=spec.lr,
        weight_decay=spec.weight_decay,
        momentum=momentum,
        filter_bias_and_bn=not spec.decay_norm_and_bias,
        param_group_fn=partial(layer_decay_groups, spec=spec) if spec.layer_decay < 1 else None,
        **arguments,
    )
    if isinstance(optimizer, Lamb):
        return FusedLamb(optimizer.param_groups, max_grad_norm=arguments["max_grad_norm"])
    if isinstance(optimizer, torch.optim.SGD) and momentum:
        # The kernel takes the first gradient for the momentum, and if that step overflowed, whatever is in the memory.
        # From zeros it computes the same.
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state that is on the host; what the optimizer keeps there, as some keep their step counters, stays there.

    The state says which kernels wrote it, and the optimizer goes on with these: others differ in the last bit.
    """
    optimizer.load_state_dict(state)
    if not isinstance(optimizer, FusedLamb):
        # torch sets it when it creates an optimizer, and loading leaves it.
        optimizer._step_supports_amp_scaling = all(  # type: ignore[attr-defined]
            group.get("fused") for group in optimizer.param_groups
        )


class LearningRate:
    """The learning rate as a pure function of the step, so it has no state to save.

    Args:
        spec: The schedule.
        peak: Learning rate after warm-up.
        steps_per_epoch: Optimizer steps in an epoch.
    """

    def __init__(self, spec: Schedule, peak: float, steps_per_epoch: int) -> None:
        per = steps_per_epoch if spec.update == "step" else 1
        self._divide_by = steps_per_epoch // per
        carrier = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
        self._schedule = CosineLRScheduler(
            carrier,
            t_initial=spec.epochs * per,
            lr_min=spec.min_lr,
            warmup_t=spec.warmup_epochs * per,
            warmup_lr_init=spec.warmup_lr,
        )

    def at(self, step: int) -> float:
        """Return the learning rate of an optimizer step, counted from 0 over the whole run."""
        rate = float(self._schedule._get_lr(step // self._divide_by)[0])
        if not math.isfinite(rate):
            raise ValueError(f"the learning rate of step {step} is {rate}")
        return rate
