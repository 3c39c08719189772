"""Model, optimizer and learning rate, all from timm."""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from rsb_cluster.config.recipe import Optimizer, Recipe, Schedule
from rsb_cluster.errors import ConfigError, did_you_mean

AMP_DTYPE = {"off": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_model(recipe: Recipe) -> nn.Module:
    """Create the recipe's network with random weights.

    Raises:
        ConfigError: timm does not know the model, or the model does not take one of the recipe's arguments.
    """
    spec = recipe.model
    if not timm.is_model(spec.name):
        raise ConfigError(
            f"model.name = '{spec.name}': timm has no such model.{did_you_mean(spec.name, timm.list_models())}"
        )
    arguments: dict[str, Any] = dict(spec.kwargs)
    # Passed only if they are not zero, which is the default: many models do not accept them.
    if spec.drop_rate:
        arguments["drop_rate"] = spec.drop_rate
    if spec.drop_path_rate:
        arguments["drop_path_rate"] = spec.drop_path_rate
    try:
        model: nn.Module = timm.create_model(spec.name, num_classes=recipe.data.num_classes, **arguments)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"timm cannot build model.name = '{spec.name}' with {arguments}: {error}. "
            "Check model.drop_rate, model.drop_path_rate and model.kwargs."
        ) from error
    return model


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
