"""Checks that need torch and timm, which ``submit`` runs in a subprocess before it queues anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import read_record
from rsb_cluster.errors import ConfigError, RsbError
from rsb_cluster.subprocesses.helper import Send, serve
from rsb_cluster.train.augment import EvalTransform, TrainTransform
from rsb_cluster.train.conversion.state_dict import fit_weights, parse
from rsb_cluster.train.input.pixels.transforms import FastEval, FastTrain
from rsb_cluster.train.model import build_model
from rsb_cluster.train.optimizer import LearningRate, build_optimizer
from rsb_cluster.train.recomputation import enable
from rsb_cluster.weights.resolve import WeightsFile


def check(recipe: Recipe, init: WeightsFile | None = None, *, recompute: bool = False) -> int:
    """Build everything that a recipe names, the model on torch's meta device.

    Args:
        recipe: The recipe.
        init: The file of initial weights.
        recompute: Whether the job asks for gradient checkpointing.

    Returns:
        The number of parameters.

    Raises:
        ConfigError: timm does not know the model, an argument or a transform; or the model does not accept images of
            the recipe's size, the weights, or gradient checkpointing.
        CheckpointError: The weights cannot be read.
    """
    with torch.device("meta"):
        model = build_model(recipe)
        for side in {recipe.augment.resolution, recipe.eval.resolution}:
            try:
                shape = tuple(model(torch.empty(2, 3, side, side)).shape)
            except (AssertionError, RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"model.name = '{recipe.model.name}' does not accept images of {side} px: {error}. For a vision "
                    "transformer add --set model.kwargs.dynamic_img_size=true, or --set model.kwargs.img_size."
                ) from error
            if shape != (2, recipe.data.num_classes):
                raise ConfigError(
                    f"model.name = '{recipe.model.name}' gives outputs of shape {shape}, not one logit per class."
                )
    if recompute:
        enable(model)
    if init is not None:
        fit_weights(model, parse(init.read(), init), recipe.model.name, init.source, recipe.init.head)
    build_optimizer(model, recipe.optimizer)
    LearningRate(recipe.schedule, recipe.optimizer.lr, recipe.steps_per_epoch).at(0)
    try:
        TrainTransform(recipe), EvalTransform(recipe.eval)
        if recipe.data.pipeline == "fast":
            FastTrain(recipe), FastEval(recipe.eval)
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"timm cannot read augment.rand_augment = '{recipe.augment.rand_augment}': {error!r}."
        ) from error
    return sum(p.numel() for p in model.parameters())


def _work(models: Sequence[tuple[Any, Any, bool]], send: Send) -> None:
    """Check recipes, each with its initial weights and its use; all that is wrong is one error."""
    answers, errors = [], []
    for values, init, recompute in models:
        try:
            recipe = read_record(Recipe, values, "recipe")
            answers.append(check(recipe, WeightsFile(**init) if init else None, recompute=recompute))
        except RsbError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(dict.fromkeys(errors)))
    send(parameters=answers)


if __name__ == "__main__":
    serve(_work)
