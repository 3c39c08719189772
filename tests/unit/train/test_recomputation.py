"""Gradient checkpointing is the same mathematics, to the last bit: gradients, statistics and what is drawn."""

import pytest
import timm
import torch
from torch import Tensor, nn

from rsb_cluster.errors import ConfigError
from rsb_cluster.train.recomputation import Recomputation
from tests.equality import assert_bit_equal


def three_micro_batches(name: str, *, enabled: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients and state after three micro-batches, and how often the first of the blocks was computed."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, drop_path_rate=0.4)
    blocks = next(m for n, m in model.named_modules() if n in ("layer1", "blocks", "stages"))
    computed: list[object] = []
    next(m for m in blocks.modules() if isinstance(m, nn.Conv2d | nn.Linear)).register_forward_pre_hook(
        lambda module, inputs: computed.append(module)
    )
    recomputation = Recomputation(model.train(), enabled=enabled)
    draws = []
    for step in range(3):
        torch.manual_seed(100 + step)
        loss = model(torch.randn(4, 3, model.default_cfg["input_size"][1], model.default_cfg["input_size"][2])).mean()
        with recomputation.backward():
            loss.backward()
        draws.append(torch.rand(1))  # what a later draw of the same micro-batch would be
    gradients = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**gradients, **model.state_dict(), "draws": torch.cat(draws)}, len(computed)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_it_computes_twice_and_changes_no_bit(name: str) -> None:
    plain, once = three_micro_batches(name, enabled=False)
    again, twice = three_micro_batches(name, enabled=True)
    assert twice == 2 * once > 0
    assert_bit_equal(again, plain)


def test_a_model_without_it_is_refused() -> None:
    for model in (timm.create_model("test_vit").head, timm.create_model("pit_ti_224")):
        with pytest.raises(ConfigError, match=f"gradient_checkpointing: timm cannot do it for {type(model).__name__}"):
            Recomputation(model, enabled=True)
        Recomputation(model, enabled=False)
