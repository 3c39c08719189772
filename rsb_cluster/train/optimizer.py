"""The optimizer and the learning rate over time, both timm's."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from rsb_cluster.config.recipe import Optimizer, Schedule


def build_optimizer(model: nn.Module, spec: Optimizer) -> torch.optim.Optimizer:
    """Create timm's optimizer with all settings from the recipe."""
    arguments: dict[str, Any] = {"eps": spec.eps, "betas": spec.betas}
    momentum = 0.9
    if spec.name == "lamb":
        # timm's LAMB clips the global gradient norm itself; the paper's "no clipping" refers to clip_grad_norm.
        arguments["max_grad_norm"] = spec.lamb_max_grad_norm or None
    elif spec.name == "sgd":
        arguments, momentum = {"nesterov": True}, spec.momentum
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model,
        opt=spec.name,
        lr=spec.lr,
        weight_decay=spec.weight_decay,
        momentum=momentum,
        filter_bias_and_bn=not spec.decay_norm_and_bias,
        **arguments,
    )
    return optimizer


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
