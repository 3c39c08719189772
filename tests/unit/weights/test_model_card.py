"""The card says what the run was."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import validate
from rsb_cluster.runs.run import InitialWeights, Run
from rsb_cluster.weights.export import export
from rsb_cluster.weights.model_card import public_name, write_card
from rsb_cluster.weights.resolve import find_weights


def front_matter(card: str) -> dict[str, Any]:
    """Read it as YAML; its values are JSON."""
    _, front, _ = card.split("---\n", 2)
    return {key: json.loads(value) for key, _, value in (line.partition(": ") for line in front.splitlines())}


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
    assert "| changes to the procedure | `optimizer.lr` 0.01 → 0.02 |" in card
    assert f"| initial weights | resnet50.a1_in1k, SHA-256 `{'5' * 64}` |" in card
    assert "--init resnet50.a1_in1k" in card
    assert "the recipe is a reconstruction" in card
    assert "| these weights | the weights after step 18" in card


RUN = "a1-resnet50-s0-2df9ebd6"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (f"/home/alice/runs/{RUN}/checkpoints/step-00375000-a0003", f"{RUN}, step-00375000-a0003"),
        ("s3://secret-bucket/alice/best.pth", "best.pth"),
        ("/home/alice/model/", "model"),
        ("resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("hf-hub:timm/resnet50.a1_in1k", "hf-hub:timm/resnet50.a1_in1k"),
    ],
)
def test_of_a_path_only_a_name_is_said(source: str, said: str) -> None:
    assert public_name(source) == said


def test_what_is_given_away_shows_no_path(trained: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = "s3://secret-bucket/alice/best.pth"
    start = InitialWeights(source=source, file="m.pt", sha256="5" * 64, architecture="test_resnet")
    spec, recipe = trained.spec(), trained.recipe()
    init = recipe.init.model_copy(update={"weights": source})
    monkeypatch.setattr(Run, "recipe", lambda self: recipe.model_copy(update={"init": init}))
    changed = {"modified": {"init.weights": ("", source)}, "init": start, "data": "/home/alice/data/imagenet"}
    monkeypatch.setattr(Run, "spec", lambda self: spec.model_copy(update=changed))
    export(trained, "hf", str(tmp_path / "model"))
    texts = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert set(texts) == {"README.md", "recipe.toml", "config.json", "model.safetensors"}
    for private in (b"alice", b"secret-bucket", b"/home/", b"s3://", trained.runs_url.encode()):
        assert not [name for name, text in texts.items() if private in text], private
    card = texts["README.md"].decode()
    assert "best.pth, SHA-256" in card and "--init INIT" in card and "initial weights at INIT" in card
    again = validate(Recipe, tomllib.loads(texts["recipe.toml"].decode()), "exported")
    assert again.digest(0, "d", "5" * 64) == recipe.digest(0, "d", "5" * 64)


def test_weights_that_were_not_evaluated_have_no_metrics(trained: Run) -> None:
    card = write_card(trained, find_weights(trained.url, "", which="15"))
    assert "model-index" not in front_matter(card)
    assert "| evaluation | none at this step |" in card
