"""A run that is given away: timm loads it and computes the same, and its card says what it is."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from rsb_cluster.config.recipe import Recipe, validate
from rsb_cluster.errors import ConfigError
from rsb_cluster.runs.run import InitialWeights, Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train.conversion.convert import write_timm_folder
from rsb_cluster.train.conversion.state_dict import load_weights
from rsb_cluster.train.model import build_model
from rsb_cluster.weights.export import export
from rsb_cluster.weights.model_card import write_card
from rsb_cluster.weights.resolve import find_weights
from tests.equality import final_state


def logits(model: torch.nn.Module, side: int = 16) -> torch.Tensor:
    images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(images)
    return found


def of_run(run: Run, kind: str) -> torch.nn.Module:
    """The network as the training loop builds it, with the last weights."""
    model = build_model(run.recipe())
    model.load_state_dict(final_state(run)[kind])
    return model


def front_matter(card: str) -> dict[str, Any]:
    """Read it as YAML; its values are JSON."""
    _, front, _ = card.split("---\n", 2)
    return {key: json.loads(value) for key, _, value in (line.partition(": ") for line in front.splitlines())}


@pytest.fixture(scope="module")
def for_hub(tmp_path_factory: pytest.TempPathFactory, trained: Run) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    found = export(trained, "hf", str(folder))
    assert found.is_ema and found.step == 18
    return folder


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


def test_a_transformer_that_was_built_for_another_resolution(tmp_path: Path, trained: Run) -> None:
    weights = load_weights(trained.url)
    vit = timm.create_model("test_vit", img_size=64, num_classes=3, depth=2)
    written = vars(weights) | {"architecture": "test_vit", "tensors": vit.state_dict(), "num_classes": 3, "classes": ()}
    written["kwargs"] = {"img_size": 64, "depth": 2}
    written["eval"] = weights.eval.model_copy(update={"resolution": 64})
    write_timm_folder(tmp_path, type(weights)(**written))
    assert torch.equal(logits(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), 64), logits(vit, 64))


def test_the_card_says_what_the_run_was(for_hub: Path, trained: Run) -> None:
    card = (for_hub / "README.md").read_text()
    front = front_matter(card)
    assert front["library_name"] == "timm" and front["pipeline_tag"] == "image-classification"
    ema = (trained.result() or {})["ema"]
    [result] = front["model-index"][0]["results"]
    assert [metric["value"] for metric in result["metrics"]] == [round(ema["top1"], 3), round(ema["top5"], 3)]
    found = find_weights(trained.url, "")
    for said in (
        "moving average (EMA) of the weights after step 18",
        found.sha256,
        f"| top-1 on scikit-learn's digits | {ema['top1']:.2f} % |",
        "| attempts | 1 |",
        "| preemptions | 0 |",
        "--recipe ./recipe.toml --seed 0 --virtual-ranks 4 --data DATA",
        "that says nothing about these weights",
    ):
        assert said in card, said
    again = validate(Recipe, tomllib.loads((for_hub / "recipe.toml").read_text()), "exported")
    assert again == trained.recipe()
    assert again.digest(0, "d") == trained.recipe().digest(0, "d")


def test_the_card_says_what_was_changed_what_it_started_from_and_that_it_is_a_guess(
    trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = InitialWeights(source="resnet50.a1_in1k", file="m.pt", sha256="5" * 64, architecture="test_resnet")
    spec = trained.spec().model_copy(update={"modified": {"optimizer.lr": (0.01, 0.02)}, "init": start})
    recipe = trained.recipe().model_copy(update={"paper": "FT-Cars", "reconstruction": True})
    monkeypatch.setattr(Run, "spec", lambda self: spec)
    monkeypatch.setattr(Run, "recipe", lambda self: recipe)
    found = find_weights(trained.url, "", ema=False)
    card = write_card(trained, found)
    assert "| changed against the procedure | `optimizer.lr` 0.01 → 0.02 |" in card
    assert f"| started from | resnet50.a1_in1k, SHA-256 `{'5' * 64}` |" in card
    assert "--init resnet50.a1_in1k" in card
    assert "the recipe is a reconstruction" in card
    assert "| these weights | the weights after step 18" in card


def test_weights_that_were_not_evaluated_have_no_metrics(trained: Run) -> None:
    card = write_card(trained, find_weights(trained.url, "", which="15"))
    assert "model-index" not in front_matter(card)
    assert "| evaluation | none at this step |" in card


def test_a_destination_that_is_not_empty_is_left_alone(tmp_path: Path, trained: Run) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="is there already and not empty"):
        export(trained, "timm", str(tmp_path))
    with pytest.raises(ConfigError, match="is there already and not empty"):
        export(trained, "timm", str(tmp_path / "mine"))
    (tmp_path / "mine").rename(tmp_path / ".mine")
    (tmp_path / ".link").symlink_to(tmp_path)
    for dest in (tmp_path, tmp_path / ".link"):
        with pytest.raises(ConfigError, match="is there already and not empty"):
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
def test_a_folder_on_s3(s3: Any, s3_bucket: str, trained: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    target = Store(f"s3://{s3_bucket}/models/one")
    export(trained, "timm", target.url, ema=False)
    assert target.names() == ["config.json", "model.safetensors"]
    for name in target.names():
        (tmp_path / name).write_bytes(target.read_bytes(name))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(logits(loaded), logits(of_run(trained, "model")))
