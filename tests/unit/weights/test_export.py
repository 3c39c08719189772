"""A run that is given away: timm loads it and computes the same, and nothing is overwritten."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from rsb_cluster.cli import main
from rsb_cluster.errors import ConfigError
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train.conversion.state_dict import load_weights
from rsb_cluster.train.model import build_model
from rsb_cluster.weights.export import export
from tests.commands_of import as_printed
from tests.equality import final_state, logits


def of_run(run: Run, kind: str) -> torch.nn.Module:
    """The network as the training loop builds it, with the last weights."""
    model = build_model(run.recipe())
    model.load_state_dict(final_state(run)[kind])
    return model


def test_timm_loads_the_folder_and_computes_the_same_bits(for_hub: Path, trained: Run) -> None:
    of_folder = timm.create_model(f"local-dir:{for_hub}", pretrained=True)
    of_file = timm.create_model(
        "test_resnet", pretrained=True, num_classes=10,
        pretrained_cfg_overlay={"file": str(for_hub / "model.safetensors"), "num_classes": 10},
    )  # fmt: skip
    expected = logits(of_run(trained, "ema"))
    assert torch.equal(logits(of_folder), expected)
    assert torch.equal(logits(of_file), expected)
    assert not torch.equal(logits(of_run(trained, "model")), expected)
    recipe = trained.recipe()
    asked = timm.data.resolve_model_data_config(of_folder)
    assert tuple(asked["input_size"]) == (3, recipe.eval.resolution, recipe.eval.resolution)
    assert (asked["crop_pct"], asked["interpolation"]) == (recipe.eval.crop, recipe.eval.interpolation)
    assert (tuple(asked["mean"]), tuple(asked["std"])) == (recipe.data.mean, recipe.data.std)


def test_what_was_exported_is_a_source_of_weights_again(for_hub: Path, trained: Run) -> None:
    weights = load_weights(str(for_hub))
    assert weights.architecture == "test_resnet" and weights.num_classes == 10
    assert torch.equal(logits(weights.build()), logits(of_run(trained, "ema")))
    assert weights.eval.model_dump(include={"resolution", "crop", "interpolation"}) == trained.recipe().eval.model_dump(
        include={"resolution", "crop", "interpolation"}
    )
    assert weights.classes == tuple("0123456789")


def test_a_destination_that_is_not_empty_is_left_alone(tmp_path: Path, trained: Run) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="already exists and is not empty"):
        export(trained, "timm", str(tmp_path))
    with pytest.raises(ConfigError, match="already exists and is not empty"):
        export(trained, "timm", str(tmp_path / "mine"))
    (tmp_path / "mine").rename(tmp_path / ".mine")
    (tmp_path / ".link").symlink_to(tmp_path)
    for dest in (tmp_path, tmp_path / ".link"):
        with pytest.raises(ConfigError, match="already exists and is not empty"):
            export(trained, "timm", str(dest))
    assert {path.name for path in tmp_path.iterdir()} == {".mine", ".link"}


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(run: Run, found: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rsb_cluster.weights.export.write_card", full)
    monkeypatch.setattr("rsb_cluster.weights.export._convert", lambda found, folder: (folder / "config.json").touch())
    with pytest.raises(ConfigError, match="No space left on device"):
        export(trained, "hf", str(tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.s3
def test_a_folder_on_s3(s3: Any, trained: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the command, as the README has it."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    s3.make_bucket("bucket")
    shutil.copytree(trained.url, tmp_path / "runs" / "a1-resnet50-s0-2df9ebd6")
    monkeypatch.chdir(tmp_path)
    command = as_printed("rsb-cluster export a1-resnet50-s0 --to hf s3://bucket/models/resnet50-a1 --checkpoint best")
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 0 and done.stdout == "s3://bucket/models/resnet50-a1\n", done.output
    target = Store(done.stdout.strip())
    assert target.names() == ["README.md", "config.json", "model.safetensors", "recipe.toml"]
    (tmp_path / "model").mkdir()
    for name in target.names():
        (tmp_path / "model" / name).write_bytes(target.read_bytes(name))
    step = int(done.stderr.split()[-1])
    weights = load_file(next((tmp_path / "runs").glob(f"*/checkpoints/step-{step:08d}-*/ema.safetensors")))
    loaded = timm.create_model(f"local-dir:{tmp_path}/model", pretrained=True).state_dict()
    assert torch.equal(loaded["conv1.0.weight"], weights["conv1.0.weight"])
