"""Of a loss that is not finite the user learns the images, the state, and the last checkpoint that is sound."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.checkpoint import CheckpointId
from rsb_cluster.storage.store import Store
from rsb_cluster.train.divergence import RecentBatches, explain, last_good_checkpoint
from rsb_cluster.train.state import Progress, Staging

INDEX: Any = SimpleNamespace(key=lambda number: f"image-{number}")


def save(store: Store, step: int, weight: float) -> None:
    files = Staging(torch.device("cpu")).put(Progress(step=step), {"model": {"w": torch.tensor([1.0, weight])}})
    checkpoint.write(store, CheckpointId(step, 1), files, before_manifest=lambda: None)


def test_the_last_good_checkpoint_holds_finite_numbers(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert last_good_checkpoint(store, {1: 0}) is None
    for step, weight in ((10, 1.0), (20, 2.0), (30, float("inf")), (40, float("nan"))):
        save(store, step, weight)
    assert last_good_checkpoint(store, {1: 0}) == CheckpointId(20, 1)
    (tmp_path / CheckpointId(20, 1).folder / "model.safetensors").write_bytes(b"damaged")
    assert last_good_checkpoint(store, {1: 0}) == CheckpointId(10, 1)


def test_the_images_of_the_last_steps_are_written_with_their_losses(tmp_path: Path) -> None:
    recent = RecentBatches(Store(tmp_path), 2, INDEX)
    for step in range(5):
        for virtual_rank in (4, 5):
            bad = step == 4 and virtual_rank == 5
            recent.add(step, virtual_rank, torch.tensor([step, 7]), torch.tensor(float("nan") if bad else 0.5))
    written = Store(tmp_path).read_json(recent.write(5))
    assert written["diverged_step"] == 5
    parts = written["micro_batches"]
    assert [(p["step"], p["virtual_rank"]) for p in parts] == [(s, v) for s in (3, 4, 5) for v in (4, 5)]
    assert [p["loss"] for p in parts] == [0.5] * 5 + ["nan"] and parts[-1]["images"] == ["image-4", "image-7"]


def test_the_message_has_the_state_and_what_to_try(tmp_path: Path) -> None:
    for amp, words in (("fp16", "loss scale 0.5)"), ("bf16", "learning rate 1.00e-03)")):
        recipe = load_recipe("digits", overrides=parse_overrides([f"train.amp={amp}"])).recipe
        message = explain(
            recipe, step=33, loss=float("inf"), rate=1e-3, scale=0.5 if amp == "fp16" else None,
            batches=RecentBatches(Store(tmp_path), 0, INDEX), folder=Store(tmp_path),
        )  # fmt: skip
        assert message.startswith("the loss of step 33 is inf (epoch 1.50, learning rate 1.00e-03")
        assert words in message and str(tmp_path / "divergence") in message
        assert ("train.amp=bf16" in message) == (amp == "fp16") and "optimizer.clip_grad_norm=1" in message
