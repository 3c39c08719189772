"""What is written for timm is loaded by timm, and computes the same."""

from __future__ import annotations

from pathlib import Path

import timm
import torch

from rsb_cluster.runs.run import Run
from rsb_cluster.train.conversion.convert import write_timm_folder
from rsb_cluster.train.conversion.state_dict import load_weights
from tests.equality import logits


def test_a_transformer_that_was_built_for_another_resolution(tmp_path: Path, trained: Run) -> None:
    weights = load_weights(trained.url)
    vit = timm.create_model("test_vit", img_size=64, num_classes=3, depth=2)
    written = vars(weights) | {"architecture": "test_vit", "tensors": vit.state_dict(), "num_classes": 3, "classes": ()}
    written["kwargs"] = {"img_size": 64, "depth": 2}
    written["eval"] = weights.eval.model_copy(update={"resolution": 64})
    write_timm_folder(tmp_path, type(weights)(**written))
    assert torch.equal(logits(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), 64), logits(vit, 64))
