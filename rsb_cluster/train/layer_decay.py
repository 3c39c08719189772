"""Layer-wise learning rates for fine-tuning: the nearer a layer is to the image, the less it moves."""

from __future__ import annotations

from typing import Any

from timm.optim import param_groups_layer_decay
from torch import nn

from rsb_cluster.config.recipe import Optimizer


def layer_decay_groups(model: nn.Module, spec: Optimizer) -> list[dict[str, Any]]:
    """Return timm's parameter groups, each with the factor of its learning rate, ``lr_scale``.

    The factor is ``layer_decay ** (layers after it)``, so the classifier's is 1. Which parameters decay follows the
    rule that holds without it: no biases, no weights of norms, none that the model names; timm's groups by layer would
    let a bias of two dimensions decay.

    Source: Bao et al. 2021 (BEiT, arXiv:2106.08254); timm ``optim/_param_groups.py``.
    """
    named: set[str] = getattr(model, "no_weight_decay", set)()
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        model,
        weight_decay=spec.weight_decay,
        no_weight_decay_list={*named} if spec.decay_norm_and_bias else {*named, "*.bias"},
        weight_decay_exclude_1d=not spec.decay_norm_and_bias,
        layer_decay=spec.layer_decay,
    )
    return groups
