"""Evaluations in tables: against what is published, and never more than it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.datasets import known_data_sets
from rsb_cluster.evaluation.record import Evaluation
from rsb_cluster.results.collect import EvaluationRow, collect, render
from rsb_cluster.results.references.other_data import not_public, published_on
from rsb_cluster.runs.run import InitialWeights, Run
from tests.unit.results.collect.made import A3_STEPS, a1, a_recipe, an_evaluation, finished, make_run


def lines_of(folder: Path, *evaluations: Evaluation, names: tuple[Run, ...] | None = None) -> tuple[EvaluationRow, ...]:
    for one in evaluations:
        one.save(str(folder))
    runs = names if names is not None else tuple(Run.at(folder, p.parent.name) for p in folder.glob("*/spec.json"))
    return collect(runs, weights_in=str(folder)).evaluations


def only(folder: Path, *evaluations: Evaluation) -> EvaluationRow:
    (line,) = lines_of(folder, *evaluations)
    return line


def test_seeds_on_real_labels_are_one_line_against_figure_1(tmp_path: Path) -> None:
    recipe = a_recipe("name=a2", "paper=A2", "augment.resolution=224")
    runs = [finished(tmp_path, 79.7, recipe, seed=seed) for seed in range(3)]
    real = [an_evaluation(value, run, labels="real") for value, run in zip((85.3, 85.4, 85.5), runs, strict=True)]
    line = only(tmp_path, *real)
    assert (line.name, len(line.counted), line.verdict) == ("a2", 3, "reproduced")
    assert line.mean == pytest.approx(85.4)
    assert line.std == pytest.approx(0.1)
    assert [(r.top1, r.source) for r in line.references] == [
        (85.37, "Figure 1, 100 seeds"), (85.4, "Table 1"), (85.447, "timm's evaluation of the released weights"),
    ]  # fmt: skip
    assert line.delta == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("data_set", "labels", "value", "first", "verdict"),
    [
        ("imagenet-1k", "", 80.24, 80.24, "reproduced"),
        ("imagenet-1k", "real", 85.7, 85.7, "reproduced"),
        ("imagenet-1k", "real", 84.9, 85.7, "below"),
        ("imagenet-v2", "", 68.68, 68.7, "reproduced"),
    ],
)
def test_a_run_of_a1_has_the_papers_value(
    tmp_path: Path, data_set: str, labels: str, value: float, first: float, verdict: str
) -> None:
    line = only(tmp_path, an_evaluation(value, finished(tmp_path, 80.3, a1("resnet50")), data_set, labels=labels))
    assert (line.references[0].top1, line.verdict) == (first, verdict)


def test_other_mean_or_std_than_the_weights_say_are_not_compared(tmp_path: Path) -> None:
    half = {"mean": (0.5, 0.5, 0.5)}
    run = finished(tmp_path, 80.3, a1("resnet50"))
    for line in lines_of(tmp_path, an_evaluation(80.24, run, overrides=half), an_evaluation(80.38, overrides=half)):
        assert (line.references, line.delta, line.verdict) == ((), None, "modified")
        assert line.notes == ("not compared: evaluated with --mean 0.5,0.5,0.5, which is not what the weights say",)
    entry = an_evaluation(80.38, overrides={"entry": "model_ema"}, weights="other.a1_in1k")
    verdicts = {line.name: line.verdict for line in lines_of(tmp_path, entry)}
    assert verdicts["other.a1_in1k"] == "agrees", "which weights of a file is no other input"


def test_released_weights_agree_with_timm_or_differ_and_reproduce_nothing(tmp_path: Path) -> None:
    same = an_evaluation(80.38)
    other = an_evaluation(80.25, weights="other", weights_digest="other")
    smaller = an_evaluation(81.24, resolution=288, crop=1.0)
    verdicts = {(line.name, line.evaluation.resolution): line for line in lines_of(tmp_path, same, other, smaller)}
    assert verdicts["resnet50.a1_in1k", 224].verdict == "agrees"
    assert verdicts["resnet50.a1_in1k", 288].verdict == "agrees"
    assert verdicts["other", 224].verdict == "differs"
    assert verdicts["other", 224].delta == pytest.approx(-0.132)


@pytest.mark.parametrize(
    ("data_set", "labels", "value", "scored"),
    [
        ("imagenet-a", "a-classes", 9.973, 7_500),
        ("imagenet-r", "r-classes", 40.417, 30_000),
        ("imagenet-sketch", "", 29.641, 50_889),
        ("imagenet-1k", "a-classes", 94.41, 10_000),
        ("imagenet-1k", "r-classes", 93.96, 10_000),
    ],
)
def test_released_weights_agree_with_timm_on_other_images(
    tmp_path: Path, data_set: str, labels: str, value: float, scored: int
) -> None:
    samples = known_data_sets()[data_set].samples["val"]
    line = only(tmp_path, an_evaluation(value + 0.04, None, data_set, labels=labels, samples=samples, scored=scored))
    assert (line.verdict, line.references[0].top1) == ("agrees", value)
    assert published_on(data_set, labels, "DeiT", "deit_small_patch16_224")[0].crop == 0.9
    other = published_on(data_set, "r-classes" if labels == "a-classes" else "a-classes", "A1", "resnet50")
    assert all(one.reference.top1 != value for one in other)


def test_another_resolution_or_crop_is_compared_with_its_own_value_or_nothing(tmp_path: Path) -> None:
    run = finished(tmp_path, 80.3, a1("resnet50"))
    wide, narrow = an_evaluation(80.2, run, crop=0.875), an_evaluation(80.9, run, resolution=256)
    lines = {line.evaluation.crop: line for line in lines_of(tmp_path, wide, narrow)}
    assert (lines[0.875].references[0].top1, lines[0.875].verdict) == (80.18, "reproduced")  # Table 9
    assert (lines[0.95].references, lines[0.95].verdict) == ((), "no reference")
    assert "published at 224 px, crop 0.95" in lines[0.95].notes[0]


def fine_tuned(folder: Path, start: str, value: float) -> Evaluation:
    recipe = a_recipe(
        "name=ft-cifar10", "paper=FT-CIFAR10", "reconstruction=true", "augment.resolution=224", "data.set=cifar10",
        "data.num_classes=10", "data.train_samples=50000", "data.val_samples=10000", "init.weights=x",
    )  # fmt: skip
    init = InitialWeights(source="x", file="x", sha256=start, architecture="resnet50", procedure=start)
    run = make_run(folder, recipe, tag=f"-{start}", spec={"init": init.model_dump()})
    return an_evaluation(value, run, "cifar10")


def test_fine_tuning_has_table_5s_value_and_is_never_a_reproduction(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, fine_tuned(tmp_path, "A1", 98.3), fine_tuned(tmp_path, "A3", 97.6))
    assert {(line.references[0].top1, line.references[0].source) for line in lines} == {
        (98.3, "Table 5, from A1"), (97.6, "Table 5, from A3"),
    }  # fmt: skip
    assert {line.verdict for line in lines} == {"reconstruction"}
    assert all(line.delta == pytest.approx(0) for line in lines)


def test_what_is_not_public_says_so(tmp_path: Path) -> None:
    recipe = a_recipe("name=mine", "paper=", "model.name=resnext50_32x4d")
    run = finished(tmp_path, 99.0, recipe)
    nct = an_evaluation(99.3, run, "nct-crc-he", metric="macro_f1")
    top1 = an_evaluation(99.3, run, "nct-crc-he")
    flaws = an_evaluation(
        60.0, None, "vizwiz-classification", labels="vizwiz", groups={"Blur": {"value": 50.0, "scored": 2}}
    )
    lines = {(line.evaluation.data_set, line.evaluation.metric): line for line in lines_of(tmp_path, nct, top1, flaws)}
    with_value = lines["nct-crc-he", "macro_f1"]
    assert (with_value.references[0].top1, with_value.verdict) == (99.2, "reconstruction")
    assert lines["nct-crc-he", "top1"].verdict == "not public"
    assert lines["vizwiz-classification", "label_set_top1"].verdict == "not public"
    assert "neither are the labels" in lines["vizwiz-classification", "label_set_top1"].notes[0]
    assert not_public("indl-zollner") == not_public("indl-hering") != ""
    assert published_on("indl-zollner", "", "", "resnetv2_50")[0].metric == "recall"
    assert not_public("cifar10") == ""


def test_a_part_of_a_data_set_old_weights_and_changed_recipes_are_no_reproduction(tmp_path: Path) -> None:
    whole = finished(tmp_path / "whole", 80.3, a1("resnet50"))
    few = only(tmp_path / "whole", an_evaluation(80.2, whole, samples=49_999))
    assert (few.verdict, few.counted) == ("not counted", ())
    assert "49,999 images of imagenet-1k/val, which has 50,000" in few.notes[-1]
    early = finished(tmp_path / "early", 80.3, a1("resnet50"))
    line = only(tmp_path / "early", an_evaluation(80.2, early, step=A3_STEPS - 1))
    assert (line.verdict, "weights of step 62499 of 62500" in line.notes[-1]) == ("not counted", True)
    changed = a1("resnet50", "optimizer.lr=4e-3")
    spec = {"modified": {"optimizer.lr": (0.008, 0.004)}}
    run = make_run(tmp_path / "changed", changed, spec=spec)
    assert only(tmp_path / "changed", an_evaluation(80.2, run)).verdict == "modified"
    average = finished(tmp_path / "ema", 80.3, a1("resnet50"))
    line = only(tmp_path / "ema", an_evaluation(80.2, average, ema=True))
    assert (line.name, line.verdict) == ("a1 (EMA)", "no reference")


def test_the_newest_of_the_last_weights_counts(tmp_path: Path) -> None:
    run = finished(tmp_path, 80.3, a1("resnet50"))
    old = an_evaluation(70.0, run, weights_digest="old", step=100, finished=3.0)
    first = an_evaluation(80.1, run, exact=True, finished=1.0)
    assert only(tmp_path, old, first, an_evaluation(80.2, run, finished=2.0)).mean == 80.2


def test_only_what_is_named_and_what_can_be_read(tmp_path: Path) -> None:
    one, other = (finished(tmp_path, 80.3, a1(model)) for model in ("resnet18", "resnet34"))
    for evaluation in (an_evaluation(71.5, one), an_evaluation(76.4, other), an_evaluation(80.4)):
        evaluation.save(str(tmp_path))
    assert [line.model for line in collect([one]).evaluations] == ["resnet18"]
    damaged = tmp_path / "evaluations" / "x" / "y.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    collected = collect([one])
    assert len(collected.evaluations) == 1
    assert "evaluations/x/y.json cannot be read" in collected.unreadable[0]
    assert "evaluations/x/y.json cannot be read" in render(collected, "md")


def test_a_recipe_of_ones_own_has_no_reference(tmp_path: Path) -> None:
    recipe: Recipe = a_recipe("name=mine", "paper=")
    line = only(tmp_path, an_evaluation(80.0, finished(tmp_path, 80.0, recipe)))
    assert (line.verdict, line.references) == ("no reference", ())
