"""Layer-wise learning rates are timm's own, with the rule of which parameters decay that holds without them."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.config.recipe import Optimizer
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.train.optimizer import build_optimizer


def spec_of(recipe: str, *assignments: str) -> Optimizer:
    return load_recipe(recipe, overrides=parse_overrides(assignments)).recipe.optimizer


def settings(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """The factor of the learning rate, and the weight decay, of each parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "resnet18", "test_convnext"])
@pytest.mark.parametrize("decays_all", ["false", "true"])
def test_each_parameter_has_the_rate_and_the_decay_of_timms_optimizer(name: str, decays_all: str) -> None:
    spec = spec_of("deit", "optimizer.layer_decay=0.65", f"optimizer.decay_norm_and_bias={decays_all}")
    with torch.device("meta"):
        model = timm.create_model(name)
    theirs = create_optimizer_v2(
        model, opt="adamw", lr=spec.lr, weight_decay=spec.weight_decay, layer_decay=0.65,
        filter_bias_and_bn=not spec.decay_norm_and_bias,
    )  # fmt: skip
    ours = settings(model, build_optimizer(model, spec))
    assert ours == settings(model, theirs)
    factors = [factor for factor, _ in ours.values()]
    assert max(factors) == 1.0 == ours[f"{model.pretrained_cfg['classifier']}.weight"][0]
    assert 0 < min(factors) == next(iter(ours.values()))[0] < 0.65**3


def test_a_bias_of_two_dimensions_does_not_decay() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].bias = nn.Parameter(torch.zeros(2, 2))
    decays = {
        name: {k: decay for k, (_, decay) in settings(model, build_optimizer(model, spec_of("deit", name))).items()}
        for name in ("optimizer.layer_decay=1", "optimizer.layer_decay=0.5")
    }
    assert list(decays.values()) == [{"0.weight": 0.05, "0.bias": 0.0}] * 2


def test_without_it_nothing_changes() -> None:
    model = timm.create_model("test_resnet")
    for recipe in ("a1", "deit", "ft-cars"):
        groups = build_optimizer(model, spec_of(recipe)).param_groups
        assert len(groups) == 2 and not any("lr_scale" in group for group in groups)
