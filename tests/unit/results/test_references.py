"""The published numbers agree with each other, with timm and with the recipes."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any

import pytest

from rsb_cluster.results import references
from rsb_cluster.results.references import lookup
from tests.unit.bundled import FINE_TUNING, load_recipe


@pytest.mark.parametrize(("name", "top1"), [("a1", 80.4), ("a2", 79.8), ("a3", 78.1)])
def test_a_recipe_is_compared_with_the_last_row_of_table_2(name, top1):
    recipe = load_recipe(name)
    known = references.lookup(recipe.paper, recipe.model.name)
    assert top1 in {r.top1 for r in known.references if r.source == "Table 3"}
    assert known.px == (recipe.augment.resolution, recipe.eval.resolution)


# Table 5 by the weights that fine-tuning starts from: pytorch, A1, A2, A3.
TABLE_5 = {
    "ft-inat2019": (73.2, 73.9, 75.0, 73.8),
    "ft-flowers102": (97.9, 97.9, 97.9, 97.5),
    "ft-cars": (92.5, 92.7, 92.6, 92.5),
    "ft-cifar100": (86.6, 86.9, 86.2, 85.3),
    "ft-cifar10": (98.2, 98.3, 98.0, 97.6),
}


@pytest.mark.parametrize("name", FINE_TUNING)
def test_a_fine_tuning_recipe_is_set_beside_table_5_by_what_it_starts_from(name):
    recipe = load_recipe(name)
    starts = ("pytorch", "A1", "A2", "A3")
    known = [references.lookup(recipe.paper, recipe.model.name, start) for start in starts]
    assert tuple(one.references[0].top1 for one in known) == TABLE_5[name]
    assert {one.px for one in known} == {(recipe.augment.resolution, recipe.eval.resolution)}
    assert references.lookup(recipe.paper, "resnet18", "A1") is None
    assert references.lookup(recipe.paper, recipe.model.name, "") is None


def published(name: str) -> dict[str, Any]:
    package = "rsb_cluster.config" if name == "paper.toml" else "rsb_cluster.results.references"
    return tomllib.loads((files(package) / name).read_text(encoding="utf-8"))


TABLE3 = published("paper.toml")["table3"]


@pytest.mark.parametrize("model", sorted(TABLE3))
def test_timm_builds_each_model_of_table_3_with_the_parameters_of_table_4(model: str) -> None:
    import timm
    import torch

    with torch.device("meta"):
        # Stochastic depth, as A1 and A2 need it; not every network of timm has it.
        network = timm.create_model(model, drop_path_rate=0.05)
        alias = timm.create_model(TABLE3[model].get("same_as", model), drop_path_rate=0.05)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert millions == pytest.approx(TABLE3[model]["params_m"], rel=0.025)  # Table 4 rounds EfficientNet-B3 to 12.0
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in alias.state_dict().items()}


def test_all_models_with_a_reference_are_timms() -> None:
    import timm

    paper, weights = published("paper.toml"), published("timm.toml")
    named = {*TABLE3, *paper["seeds"], *paper["more_seeds"], *paper["deit"], *paper["deit_repository"]}
    named |= {model for part in weights.values() for model in part} | set(paper["table4"])
    assert [name for name in sorted(named) if not timm.is_model(name)] == []
    # The released weights are there under the names that the numbers are of.
    tags = {f"{model}.{procedure.lower()}_in1k" for model, row in weights["a1_a2_a3"].items() for procedure in row}
    assert tags <= set(timm.list_pretrained())


def test_table_3_agrees_with_what_timm_measures_for_the_released_weights() -> None:
    measured = published("timm.toml")["a1_a2_a3"]
    assert len(measured) == 9
    for model, row in measured.items():
        for procedure, top1 in row.items():
            assert top1 == pytest.approx(TABLE3[model][procedure]["top1"], abs=0.07), (model, procedure)


def test_the_papers_tables_agree_with_each_other() -> None:
    paper = published("paper.toml")
    for procedure, row in paper["table1"].items():
        of_table3 = TABLE3["resnet50"][procedure]
        assert (row["top1"], row["hours"], row["gpus"]) == tuple(of_table3[key] for key in ("top1", "hours", "gpus"))
        assert row["peak_mb"] / 1000 == pytest.approx(of_table3["gpu_gb"], abs=0.11)
    differing = {m for m, row in paper["table4"].items() if row["top1"] != TABLE3[m]["A1"]["top1"]}
    assert paper["table4"].keys() == TABLE3.keys()
    assert differing == {m for m, row in TABLE3.items() if "doubt" in row}
    assert (paper["table4"]["resnet50"]["real"], paper["table4"]["resnet50"]["v2"]) == (85.7, 68.7)
    for model, row in TABLE3.items():
        # A2 is half of A1, to the hour: the same images twice.
        assert row["A1"]["hours"] == 2 * row["A2"]["hours"], model
        assert row["A1"]["gpu_gb"] == row["A2"]["gpu_gb"] > row["A3"]["gpu_gb"] or model == "resnext50_32x4d"
    known = lookup("A3", "resnet50")
    assert known is not None
    assert known.v100_hours == 60


def test_timms_values_on_other_labels_are_near_the_papers() -> None:
    paper, timm = published("paper.toml"), published("timm.toml")
    assert len(timm["real"]) == len(timm["v2"]) == len(timm["other_px"]) == 9
    for model, row in timm["real"].items():
        assert row["A1"] == pytest.approx(paper["table4"][model]["real"], abs=0.11), model
        assert timm["v2"][model]["A1"] == pytest.approx(paper["table4"][model]["v2"], abs=0.3), model
        assert timm["other_px"][model]["A3"] < timm["a1_a2_a3"][model]["A3"], "160 px is worse than 224"


def test_seed_statistics_fit_their_headline() -> None:
    paper = published("paper.toml")
    for part in ("seeds", "more_seeds"):
        for procedure, row in paper[part]["resnet50"].items():
            assert row["min"] < row["mean"] < row["max"]
            assert row["min"] <= row["seed0"] <= row["max"]
            assert 0 < row["std"] < row["max"] - row["min"]
            assert row["seed0"] == pytest.approx(TABLE3["resnet50"][procedure]["top1"], abs=0.0501)


@pytest.mark.parametrize(
    ("procedure", "model", "top1"),
    [
        ("A1", "resnet50", 80.24),
        ("A2", "resnet50", 79.68),
        ("A3", "resnet50", 78.00),
        ("A2", "resnet152", 81.8),
        ("A1", "vit_small_patch16_224", 80.6),
        ("A3", "deit_small_patch16_224", 73.8),
        ("DeiT", "deit_tiny_patch16_224", 72.2),
        ("DeiT", "vit_small_patch16_224", 79.8),
        ("DeiT", "deit_base_patch16_224", 81.8),
        ("DeiT", "resnet50", 78.4),
    ],
)
def test_first_reference(procedure: str, model: str, top1: float) -> None:
    known = lookup(procedure, model)
    assert known is not None
    assert known.references[0].top1 == top1
    assert all(reference.source for reference in known.references)


def test_every_model_of_table_3_has_three_results_at_two_resolutions() -> None:
    assert len(TABLE3) == 25
    for model, row in TABLE3.items():
        for procedure in ("A1", "A2", "A3"):
            known = lookup(procedure, model)
            assert known is not None
            assert known.px == tuple(row[procedure]["px"])
            assert 60 < known.references[0].top1 < 85
    assert lookup("A1", "alexnet") is None
    assert lookup("", "resnet50") is None
