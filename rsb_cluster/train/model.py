"""The model: timm's, with the recipe's arguments."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from rsb_cluster.config.recipe import Recipe
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
