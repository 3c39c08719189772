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
from rsb_cluster.weights.model_card import write_card
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


def test_weights_that_were_not_evaluated_have_no_metrics(trained: Run) -> None:
    card = write_card(trained, find_weights(trained.url, "", which="15"))
    assert "model-index" not in front_matter(card)
    assert "| evaluation | none at this step |" in card
