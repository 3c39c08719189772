"""Run folders are made here with the numbers spelled out; what the collector says of them is computed again apart."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsb_cluster.config.recipe import Recipe, override
from rsb_cluster.results.collect import Collection, Group, collect, judge, render
from rsb_cluster.results.collect.render import EVALUATION_COLUMNS
from rsb_cluster.results.references import Reference, lookup
from rsb_cluster.runs.run import Attempt, Run, Spec, Submission, list_folders
from rsb_cluster.runs.sweep import Member, Sweep
from rsb_cluster.storage.store import Store
from tests.command import ROOT

GOLDEN = ROOT / "tests" / "unit" / "golden"

A3: dict[str, Any] = {
    "name": "a3",
    "paper": "A3",
    "model": {"name": "resnet50"},
    "data": {"set": "imagenet", "num_classes": 1000, "train_samples": 1281167, "val_samples": 50000},
    "augment": {"resolution": 160},
    "loss": {"name": "bce"},
    "optimizer": {"name": "lamb", "lr": 8e-3, "weight_decay": 0.02},
    "schedule": {"epochs": 100, "warmup_epochs": 5},
    "train": {"global_batch": 2048},
    "eval": {"resolution": 224, "crop": 0.95},
}
A3_STEPS = 62500  # 100 epochs of 1281167 // 2048 = 625 steps


def a_recipe(*changes: str) -> Recipe:
    return Recipe.model_validate(override(A3, list(changes)))


def a1(model: str, *changes: str) -> Recipe:
    return a_recipe("name=a1", "paper=A1", "augment.resolution=224", f"model.name={model}", *changes)


def make_run(
    folder: Path, recipe: Recipe | None = None, *, seed: int = 0, tag: str = "", spec: dict[str, Any] | None = None
) -> Run:
    """Make the folder of a run that was submitted and has not started."""
    recipe = recipe or a_recipe()
    run_id = f"{recipe.name}-{recipe.model.name}-s{seed}{tag}"
    run = Run.at(folder, run_id)
    fixed = {"virtual_ranks": 4, "data": "s3://data", "train_digest": "t", "val_digest": "v"} | (spec or {})
    run.create(recipe, Spec.model_validate({"run_id": run_id, "seed": seed} | fixed))
    return run


def finish(run: Run, top1: float, **changes: Any) -> Run:
    """Add the result, as a trainer would."""
    recipe, spec = run.recipe(), run.spec()
    result = {
        "run_id": run.run_id,
        "recipe": recipe.name,
        "model": recipe.model.name,
        "seed": spec.seed,
        "steps": recipe.total_steps,
        "epochs": recipe.schedule.epochs,
        "top1": top1,
        "top5": 93.5,
        "loss": 0.0025,
        "samples": recipe.data.val_samples,
        "modified": spec.modified,
        "gpu_hours": 60.25,
        "rank_hours": 60.25,
        "wall_s": 54225.0,
        "train_s": 54000.0,
        "attempts": 1,
        "preemptions": 0,
        "steps_repeated": 0,
        "images_per_s": 2370.5,
        "goodput": 0.975,
        "finished": 1760000000.0,
        "science": {"recipe": recipe.model_dump(mode="json"), "spec": spec.brief().model_dump(mode="json")},
    }
    run.store.write_json("result.json", result | changes)
    return run


def finished(folder: Path, top1: float, recipe: Recipe | None = None, *, seed: int = 0, **result: Any) -> Run:
    return finish(make_run(folder, recipe, seed=seed), top1, **result)


def attempt(run: Run, number: int = 1, **fields: Any) -> None:
    values = {"number": number, "job_id": "7", "world_size": 4, "hosts": ("node-a",), "started": 1e9, "start_step": 0}
    run.write_attempt(Attempt.model_validate(values | fields))


def only(collection: Collection) -> Group:
    (group,) = collection.groups
    return group


# ---- numbers -----------------------------------------------------------------------------------------------


def test_numbers_of_a_group_are_those_of_its_seeds(tmp_path: Path) -> None:
    top1, top5 = [78.06, 77.91, 78.13], [93.7, 93.6, 93.9]
    hours, attempts, preemptions, goodput = [60.5, 61.25, 70.0], [1, 2, 5], [0, 1, 3], [0.99, 0.95, 0.82]
    runs = [
        finished(tmp_path, t1, seed=i, top5=t5, gpu_hours=h, attempts=a, preemptions=p, goodput=g)
        for i, (t1, t5, h, a, p, g) in enumerate(zip(top1, top5, hours, attempts, preemptions, goodput, strict=True))
    ]
    group = only(collect(runs))
    assert (group.recipe, group.procedure, group.model, group.n) == ("a3", "A3", "resnet50", 3)
    assert group.mean == pytest.approx(statistics.mean(top1))
    assert group.std == pytest.approx(statistics.stdev(top1))
    assert group.std == pytest.approx(0.11239810)  # by hand: deviations .026667, -.123333, .096667; / (3 - 1)
    assert (group.min, group.max) == (77.91, 78.13)
    assert group.top5 == pytest.approx(statistics.mean(top5))
    assert group.gpu_hours == pytest.approx(191.75)
    assert (group.attempts, group.preemptions) == (8, 4)
    assert group.goodput == pytest.approx(3 / (1 / 0.99 + 1 / 0.95 + 1 / 0.82))  # all trained for the same time
    assert group.references[0] == Reference(78.00, "Table 9, 10 seeds", 10, 0.09)
    assert group.delta == pytest.approx(statistics.mean(top1) - 78.00)
    assert group.verdict == "reproduced"
    assert group.notes == ()
    assert [row.science.spec.seed for row in group.rows] == [0, 1, 2]


def test_one_seed_has_no_standard_deviation(tmp_path: Path) -> None:
    group = only(collect([finished(tmp_path, 78.0)]))
    assert (group.n, group.std, group.tolerance) == (1, None, 0.3)


A1_SEEDS = Reference(80.24, "Table 9, 10 seeds", 10, 0.14)
A3_SEEDS = Reference(78.00, "Table 9, 10 seeds", 10, 0.09)
HEADLINE = Reference(71.5, "Table 3")


@pytest.mark.parametrize(
    ("top1", "reference", "tolerance", "verdict"),
    [
        ([80.54], A1_SEEDS, 0.3, "reproduced"),  # just inside, although 80.54 - 80.24 > 0.3 in binary
        ([80.55], A1_SEEDS, 0.3, "above"),
        ([79.94], A1_SEEDS, 0.3, "reproduced"),
        ([79.93], A1_SEEDS, 0.3, "below"),
        ([71.2], HEADLINE, 0.3, "reproduced"),
        # Three equal seeds: their std counts as the paper's 0.09. About 0.1185
        ([78.118] * 3, A3_SEEDS, 2 * 0.09 * math.sqrt(1 / 3 + 1 / 10), "reproduced"),
        ([78.119] * 3, A3_SEEDS, 2 * 0.09 * math.sqrt(1 / 3 + 1 / 10), "above"),
        ([77.881] * 3, A3_SEEDS, 2 * 0.09 * math.sqrt(1 / 3 + 1 / 10), "below"),
        # A wider spread of ours: s = 0.2. About 0.2379
        ([77.8, 78.0, 78.2], A3_SEEDS, 2 * math.sqrt(0.04 / 3 + 0.0081 / 10), "reproduced"),
        ([78.03, 78.23, 78.43], A3_SEEDS, 2 * math.sqrt(0.04 / 3 + 0.0081 / 10), "reproduced"),
        ([78.04, 78.24, 78.44], A3_SEEDS, 2 * math.sqrt(0.04 / 3 + 0.0081 / 10), "above"),
        # One seed of the paper's, so S = 0.1 and N = 1. About 0.2236
        ([71.28] * 4, HEADLINE, 2 * 0.1 * math.sqrt(1 / 4 + 1), "reproduced"),
        ([71.27] * 4, HEADLINE, 2 * 0.1 * math.sqrt(1 / 4 + 1), "below"),
        # A spread so wide that 2 standard errors are 1.3 points is held to 0.3.
        ([77.0, 79.5, 78.9], A3_SEEDS, 0.3, "above"),
    ],
)
def test_verdict(top1: list[float], reference: Reference, tolerance: float, verdict: str) -> None:
    found = judge(top1, reference)
    assert found[:2] == pytest.approx((statistics.mean(top1) - reference.top1, tolerance))
    assert found[2] == verdict


def test_a_model_with_one_published_seed_is_compared_with_the_headline(tmp_path: Path) -> None:
    group = only(collect([finished(tmp_path, 71.9, a1("resnet18"))]))
    assert [r.top1 for r in group.references] == [71.5, 71.504]
    assert group.delta == pytest.approx(0.4)
    assert group.verdict == "above"


def test_a_recipe_that_is_not_the_papers_has_no_reference(tmp_path: Path) -> None:
    group = only(collect([finished(tmp_path, 97.0, a_recipe("name=mine", "paper="))]))
    assert (group.verdict, group.references, group.delta, group.notes) == ("no reference", (), None, ())


def test_a_model_that_the_paper_did_not_train_is_said_to_have_no_reference(tmp_path: Path) -> None:
    group = only(collect([finished(tmp_path, 80.0, a1("convnext_tiny"))]))
    assert group.verdict == "no reference"
    assert group.notes == ("nothing is published for convnext_tiny with A1",)


def test_doubtful_values_are_not_compared_with(tmp_path: Path) -> None:
    recipe = a1("efficientnetv2_rw_s", "augment.resolution=288", "eval.resolution=384")
    group = only(collect([finished(tmp_path, 82.3, recipe)]))
    assert (group.verdict, group.references) == ("no reference", ())
    assert "swap" in group.notes[0]


# ---- what may be averaged ----------------------------------------------------------------------------------


def test_a_modified_run_is_never_averaged_with_others(tmp_path: Path) -> None:
    changed = a_recipe("optimizer.lr=4e-3")
    runs = [finished(tmp_path, 78.0), finished(tmp_path, 78.1, seed=1)]
    runs.append(finish(make_run(tmp_path, changed, tag="-x", spec={"modified": {"optimizer.lr": (8e-3, 4e-3)}}), 70.0))
    plain, modified = collect(runs).groups
    assert (plain.n, plain.verdict) == (2, "reproduced")
    assert plain.mean == pytest.approx(78.05)
    assert (modified.n, modified.mean, modified.verdict) == (1, 70.0, "modified")
    assert modified.changes == {"optimizer.lr": (0.008, 0.004)}
    assert modified.delta == pytest.approx(-8.0)


def test_a_modified_run_is_modified_even_if_it_hits_the_number(tmp_path: Path) -> None:
    run = make_run(tmp_path, a_recipe("optimizer.lr=4e-3"), spec={"modified": {"optimizer.lr": (8e-3, 4e-3)}})
    group = only(collect([finish(run, 78.0)]))
    assert (group.verdict, group.tolerance) == ("modified", None)


def test_a_change_that_only_the_result_tells_of_counts_as_one(tmp_path: Path) -> None:
    group = only(collect([finished(tmp_path, 78.0, modified={"loss.reduction": ["mean", "sum"]})]))
    assert (group.verdict, group.changes) == ("modified", {"loss.reduction": ("mean", "sum")})


def test_a_change_that_only_the_spec_tells_of_counts_as_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, spec={"modified": {"loss.reduction": ("mean", "sum")}})
    group = only(collect([finish(run, 78.0, modified={})]))
    assert (group.verdict, group.changes) == ("modified", {"loss.reduction": ("mean", "sum")})


def test_a_reconstruction_that_hits_the_number_reproduces_nothing(tmp_path: Path) -> None:
    recipe = a_recipe("name=a2-reg", "paper=A2-reg", "model.name=resnet152", "augment.resolution=224")
    plain = finished(tmp_path / "plain", 82.4, recipe)
    guess = finished(tmp_path / "guess", 82.4, recipe.model_copy(update={"reconstruction": True}))
    assert only(collect([plain])).verdict == "reproduced"
    group = only(collect([guess]))
    assert (group.verdict, group.tolerance, group.references[0].top1) == ("reconstruction", None, 82.4)
    assert group.delta == pytest.approx(0)


def test_fine_tuning_is_compared_with_the_row_of_the_weights_it_started_from(tmp_path: Path) -> None:
    recipe = a_recipe(
        "name=ft-cars", "paper=FT-Cars", "augment.resolution=224", "init.weights=w", "reconstruction=true"
    )
    init = {"source": "w", "file": "w.pt", "architecture": "resnet50"}
    starts = {"A1": "1", "A3": "3", "": "0"}
    runs = [
        finish(
            make_run(
                tmp_path, recipe, tag=f"-{digit}", spec={"init": {**init, "sha256": digit * 64, "procedure": procedure}}
            ),
            92.0,
        )
        for procedure, digit in starts.items()
    ]
    a1_, a3_, own = (only(collect([run])) for run in runs)
    assert [r.top1 for r in (*a1_.references, *a3_.references)] == [92.7, 92.5]
    assert own.references == () and "nothing is published for resnet50 with FT-Cars from such weights" in own.notes
    assert "starts from w (SHA-256 111111111111)" in a1_.notes
    kept_apart = collect(runs).groups
    assert len(kept_apart) == 3
    assert any("initial weights" in note for note in kept_apart[1].notes)


def test_runs_of_one_name_and_unlike_recipes_are_kept_apart(tmp_path: Path) -> None:
    one, two = a_recipe("name=mine", "paper="), a_recipe("name=mine", "paper=", "schedule.epochs=50")
    runs = [finished(tmp_path, 78.0, one), finished(tmp_path, 70.0, two, seed=1)]
    groups = collect(runs).groups
    assert [(group.n, group.mean) for group in groups] == [(1, 78.0), (1, 70.0)]
    assert groups[1].notes == ("unlike the group of the same name: schedule.epochs 100 → 50",)


def test_runs_with_other_virtual_ranks_are_kept_apart(tmp_path: Path) -> None:
    runs = [finish(make_run(tmp_path, seed=v, spec={"virtual_ranks": v}), 78.0) for v in (4, 8)]
    groups = collect(runs).groups
    assert [group.virtual_ranks for group in groups] == [4, 8]
    assert groups[1].notes == ("unlike the group of the same name: virtual ranks 4 → 8",)


def test_a_resolution_that_the_paper_changes_for_a_model_is_no_modification(tmp_path: Path) -> None:
    px = ("augment.resolution=240", "eval.resolution=240")
    changes = {"augment.resolution": (224, 240), "eval.resolution": (224, 240)}
    run = finish(make_run(tmp_path, a1("efficientnet_b1", *px), spec={"modified": changes}), 79.25)
    group = only(collect([run]))
    assert (group.changes, group.verdict) == ({}, "reproduced")
    assert group.delta == pytest.approx(0.05)


def test_another_resolution_is_a_modification_with_its_distance_from_the_paper(tmp_path: Path) -> None:
    changes = {"eval.resolution": (224, 288)}
    run = make_run(tmp_path, a_recipe("eval.resolution=288"), spec={"modified": changes})
    group = only(collect([finish(run, 78.5)]))
    assert (group.changes, group.verdict, group.delta) == (changes, "modified", 0.5)


def test_a_model_at_another_resolution_than_the_papers_is_not_compared(tmp_path: Path) -> None:
    group = only(collect([finished(tmp_path, 79.2, a1("efficientnet_b1"))]))
    assert (group.verdict, group.references) == ("no reference", ())
    assert group.notes == (
        "not compared: the paper trains this model at 240 px and tests it at 240 px. "
        "Use --set augment.resolution=240 --set eval.resolution=240",
    )


def test_a_procedure_on_other_data_is_not_set_beside_imagenet_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path, a_recipe("data.set=cifar"), spec={"modified": {"data.set": ("imagenet", "cifar")}})
    group = only(collect([finish(run, 95.0)]))
    assert (group.verdict, group.references, group.delta) == ("modified", (), None)


def test_what_else_differs_in_a_group_is_noted(tmp_path: Path) -> None:
    unlike = [
        {"val_digest": "v", "code": {"version": "0.1.0"}, "packages": {"torch": "2.4"}},
        {"val_digest": "w", "code": {"version": "0.1.0", "uncommitted": "diff"}, "packages": {"torch": "2.5"}},
    ]
    runs = [finish(make_run(tmp_path, tag=f"-{i}", spec=spec), 78.0) for i, spec in enumerate(unlike)]
    group = only(collect(runs))
    assert group.n == 2
    assert group.notes == (
        "mixes 2 copies of the data (their indexes differ)",
        "mixes 2 versions of the code",
        "mixes 2 sets of package versions",
        "not all seeds are independent: more than one run has seed 0",
    )


def test_runs_that_do_not_count_are_not_said_to_be_mixed_in(tmp_path: Path) -> None:
    other = finish(make_run(tmp_path, tag="-x", spec={"val_digest": "w"}), 78.0, samples=1)
    assert only(collect([finished(tmp_path, 78.0), other])).notes == ()


def test_a_run_counts_once_however_often_it_is_named(tmp_path: Path) -> None:
    here, there = finished(tmp_path / "here", 78.0), finished(tmp_path / "there", 79.0)
    collection = collect([here, here, there])
    assert (only(collection).n, only(collection).mean) == (1, 78.0)
    (copy,) = collection.unfinished
    assert (copy.state, copy.url) == ("duplicate", there.url)
    assert here.url in copy.reason


def test_a_finished_run_counts_although_an_unfinished_copy_comes_first(tmp_path: Path) -> None:
    collection = collect([make_run(tmp_path / "here"), finished(tmp_path / "there", 78.0)])
    assert only(collection).n == 1


def test_the_order_in_which_runs_are_named_does_not_matter(tmp_path: Path, runs: list[Run]) -> None:
    shuffled = random.Random(0).sample(runs, len(runs))
    assert [run.run_id for run in shuffled] != [run.run_id for run in runs]
    assert render(collect(shuffled), "json") == render(collect(runs), "json")


def test_models_come_in_natural_order(tmp_path: Path) -> None:
    runs = [finished(tmp_path, 78.0, a1(f"resnet{depth}")) for depth in (152, 50, 18, 101, 34)]
    assert [group.model for group in collect(runs).groups] == [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]


# ---- what does not count -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "flag"),
    [
        ({"samples": 49984}, "evaluated 49984 images, not 50000"),
        ({"samples": 50016}, "evaluated 50016 images, not 50000"),
        ({"steps": 62000}, "trained 62000 steps, not 62500"),
        ({"seed": 5}, "its result.json is of a3-resnet50-s1 (seed 5, resnet50)"),
        ({"run_id": "other"}, "its result.json is of other (seed 1, resnet50)"),
    ],
)
def test_a_result_that_is_not_of_its_run_is_flagged_and_in_no_mean(
    tmp_path: Path, result: dict[str, Any], flag: str
) -> None:
    runs = [finished(tmp_path, 78.0), finish(make_run(tmp_path, seed=1), 90.0, **result)]
    group = only(collect(runs))
    assert (group.n, group.mean, group.max, group.verdict) == (1, 78.0, 78.0, "reproduced")
    assert [row.flags for row in group.rows] == [(), (flag,)]
    assert flag in render(collect(runs), "table")
    assert flag in render(collect(runs), "md")


def test_the_fixture_trains_as_many_steps_as_the_paper() -> None:
    assert a_recipe().total_steps == A3_STEPS


def test_a_group_without_a_run_that_counts_has_no_verdict(tmp_path: Path) -> None:
    group = only(collect([finished(tmp_path, 78.0, samples=1)]))
    assert (group.n, group.mean, group.delta, group.verdict) == (0, None, None, "not counted")


def unfinished(run: Run) -> tuple[str, str]:
    collection = collect([run])
    assert all(group.verdict == "no result" and group.n == 0 and not group.rows for group in collection.groups)
    (one,) = collection.unfinished
    assert (one.run_id, one.url) == (run.run_id, run.url)
    return one.state, one.reason


def test_a_run_that_was_never_submitted_is_missing(tmp_path: Path) -> None:
    state, reason = unfinished(Run.at(tmp_path, "a3-resnet50-s9"))
    assert state == "missing"
    assert str(tmp_path / "a3-resnet50-s9") in reason


def test_a_run_that_was_not_sent_says_so(tmp_path: Path) -> None:
    assert unfinished(make_run(tmp_path)) == ("not sent", "no submission is noted")


def test_a_run_that_has_not_started_names_its_job(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.add_submission(Submission(backend="slurm", job_id="4711", folder="f", shape="1x4", time=1e9))
    assert unfinished(run) == ("queued", "sent to slurm as job 4711; it has not started, or left no trace")


@pytest.mark.parametrize(
    ("last", "state", "reason"),
    [
        ({"cause": ""}, "running", "attempt 2 on node-a; or killed without a last word"),
        ({"cause": "failed", "message": "no space left"}, "failed", "no space left (attempt 2, step 40)"),
        ({"cause": "crashed", "message": "CUDA error"}, "crashed", "CUDA error (attempt 2, step 40)"),
        ({"cause": "stopped"}, "stopped", "stopped (attempt 2, step 40)"),
        ({"cause": "preempted"}, "waiting", "preempted (attempt 2, step 40)"),
        ({"cause": "timed out"}, "waiting", "timed out (attempt 2, step 40)"),
        ({"cause": "lost peer"}, "waiting", "lost peer (attempt 2, step 40)"),
        ({"cause": "finished"}, "no result", "finished (attempt 2, step 40)"),
    ],
)
def test_the_last_attempt_says_why_there_is_no_result(
    tmp_path: Path, last: dict[str, Any], state: str, reason: str
) -> None:
    run = make_run(tmp_path)
    attempt(run, 1, cause="failed", message="an older failure", end_step=10)
    attempt(run, 2, end_step=40, **last)
    assert unfinished(run) == (state, reason)


def test_a_run_without_a_result_never_counts_whatever_its_metrics_say(tmp_path: Path) -> None:
    run = make_run(tmp_path, seed=1)
    attempt(run, cause="failed", message="died in the last step", end_step=A3_STEPS)
    run.store.write_json("metrics/0001-000000.jsonl", {"step": A3_STEPS, "top1": 99.0})
    group = only(collect([finished(tmp_path, 78.0), run]))
    assert (group.n, group.mean) == (1, 78.0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"top1": 78.0', "is not JSON"),
        (b"{}", "'top1' is missing"),
        (b"[]", "result.json"),
    ],
)
def test_a_result_that_cannot_be_read_is_named_and_does_not_count(tmp_path: Path, content: bytes, reason: str) -> None:
    run = make_run(tmp_path)
    run.store.write_bytes("result.json", content)
    state, said = unfinished(run)
    assert state == "unreadable"
    assert reason in said


@pytest.mark.parametrize("top1", [100.5, -0.1, math.nan, None])
def test_an_accuracy_that_is_no_percentage_does_not_count(tmp_path: Path, top1: Any) -> None:
    state, reason = unfinished(finished(tmp_path, top1))
    assert state == "unreadable"
    assert "top1" in reason


def test_a_result_of_a_later_version_can_be_read(tmp_path: Path) -> None:
    assert only(collect([finished(tmp_path, 78.0, energy_kwh=3.5)])).n == 1


# ---- text --------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """One run or more of every kind."""
    folder = tmp_path / "runs"
    ema = {"top1": 77.98, "top5": 93.75, "loss": 0.0024}
    code = {"code": {"version": "0.1.0", "commit": "0123456789abcdef", "uncommitted": "diff"}}
    lr = {"modified": {"optimizer.lr": (8e-3, 4e-3)}}
    found = [
        finish(make_run(folder, spec=code), 78.06, ema=ema),
        finish(
            make_run(folder, seed=1, spec=code),
            77.91,
            attempts=3,
            preemptions=2,
            goodput=0.9,
            gpu_hours=64.0,
            steps_repeated=1375,
        ),
        finish(make_run(folder, seed=2, spec=code), 78.13),
        finish(make_run(folder, a_recipe("optimizer.lr=4e-3"), tag="-lr", spec=lr), 77.5),
        finished(folder, 71.9, a1("resnet18")),
        finished(folder, 79.6, a1("resnet50"), gpu_hours=1440.5),
        finished(folder, 0.1, a1("resnet101"), loss=math.nan),
        finished(folder, 73.1, a_recipe("model.name=resnet34"), samples=49984),
        finished(folder, 97.0, a_recipe("name=mine", "paper=")),
        make_run(folder, seed=3),
        make_run(folder, seed=4),
        make_run(folder, seed=5),
        Run.at(folder, "a3-resnet50-s6"),
        make_run(folder, a1("resnet152")),
        finished(folder, 78.0, seed=7),
    ]
    attempt(found[9], cause="failed", message='loss is NaN, "twice"\n[red] | in a row', end_step=1250)
    attempt(found[10])
    found[11].add_submission(Submission(backend="slurm", job_id="4711", folder="f", shape="1x4", time=1e9))
    attempt(found[13], gpus=8, end_step=0)
    found[13].store.write_json("attempts/0001-alive.json", {"step": 700, "time": 1e9 + 3600, "beats": 360})
    found[14].store.write_bytes("result.json", b'{"top1": 78')
    return found


def same_as_golden(name: str, text: str, folder: Path) -> None:
    """Compare with a file. ``UPDATE_GOLDEN=1`` writes it instead, and fails so that it is looked at."""
    for written in (str(folder), str(folder).replace("_", r"\_")):  # as it is, and in LaTeX
        text = text.replace(written, "<folder>")
    golden = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
        pytest.fail(f"{golden} was written; look at it and run again")
    assert text == golden.read_text(encoding="utf-8")


def test_csv_is_golden(runs: list[Run], tmp_path: Path) -> None:
    same_as_golden("collect.csv", render(collect(runs), "csv"), tmp_path)


def test_json_is_golden(runs: list[Run], tmp_path: Path) -> None:
    same_as_golden("collect.json", render(collect(runs), "json"), tmp_path)


def test_markdown_is_golden(runs: list[Run], tmp_path: Path) -> None:
    same_as_golden("collect.md", render(collect(runs), "md"), tmp_path)


def test_latex_is_golden(runs: list[Run], tmp_path: Path) -> None:
    same_as_golden("collect.tex", render(collect(runs), "latex"), tmp_path)


def test_html_is_golden(runs: list[Run], tmp_path: Path) -> None:
    same_as_golden("collect.html", render(collect(runs), "html"), tmp_path)


def test_plain_table_is_golden(runs: list[Run], tmp_path: Path) -> None:
    table = render(collect(runs), "table", terminal=False)
    assert "\x1b" not in table
    same_as_golden("collect.txt", "\n".join(line.rstrip() for line in table.splitlines()) + "\n", tmp_path)


def test_csv_has_one_line_per_run_and_no_number_for_the_unfinished(runs: list[Run]) -> None:
    rows = list(csv.DictReader(io.StringIO(render(collect(runs), "csv"))))
    assert sorted(row["run_id"] for row in rows) == sorted(run.run_id for run in runs)
    by_id = {row["run_id"]: row for row in rows}
    assert float(by_id["a3-resnet50-s1"]["top1"]) == 77.91
    assert float(by_id["a3-resnet50-s0"]["ema_top1"]) == 77.98
    assert by_id["a3-resnet50-s0-lr"]["modified"] == "optimizer.lr 0.008 → 0.004"
    failed = by_id["a3-resnet50-s3"]
    assert (failed["state"], failed["counted"], failed["top1"]) == ("failed", "False", "")
    assert failed["reason"] == 'loss is NaN, "twice"\n[red] | in a row (attempt 1, step 1250)'
    counted = {row["run_id"] for row in rows if row["counted"] == "True"}
    assert counted == {run.run_id for run in runs[:9]} - {"a3-resnet34-s0"}
    assert by_id["a1-resnet152-s0"]["gpu_hours"] == "8.0"
    assert by_id["a1-resnet152-s0"]["steps"] == "700"
    assert all(None not in row for row in rows)
    empty = [name for name in rows[0] if not any(row[name] for row in rows)]
    assert empty == list(EVALUATION_COLUMNS)  # there are none here


def test_json_has_every_run_and_is_strict(runs: list[Run]) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    value = json.loads(render(collect(runs), "json"), parse_constant=refuse)
    inside = [run["run_id"] for group in value["groups"] for run in group["runs"]]
    outside = [run["run_id"] for run in value["unfinished"]]
    assert sorted(inside + outside) == sorted(run.run_id for run in runs)
    assert {run["run_id"]: run["state"] for run in value["unfinished"]} == {
        "a1-resnet152-s0": "killed",
        "a3-resnet50-s3": "failed",
        "a3-resnet50-s4": "running",
        "a3-resnet50-s5": "queued",
        "a3-resnet50-s6": "missing",
        "a3-resnet50-s7": "unreadable",
    }
    (diverged,) = [group["runs"][0] for group in value["groups"] if group["model"] == "resnet101"]
    assert diverged["loss"] is None


def test_markdown_rows_have_as_many_cells_as_the_heading(runs: list[Run], tmp_path: Path) -> None:
    odd = finish(make_run(tmp_path, tag="-p", spec={"modified": {"model.kwargs": ("a|b", "c|d")}}), 78.0)
    lines = render(collect([*runs, odd]), "md").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 9
    assert {line.replace(r"\|", "").count("|") for line in table} == {17}
    assert any(r"model.kwargs=c\|d" in line for line in table)


@pytest.mark.parametrize("format", ["table", "md"])
def test_runs_without_a_result_are_named_below_the_table(runs: list[Run], format: Any) -> None:
    lines = render(collect(runs), format).splitlines()
    below = [line.strip(" -") for line in lines[lines.index("No result:") :]]
    assert 'a3-resnet50-s3: failed: loss is NaN, "twice" [red] | in a row (attempt 1, step 1250)' in below
    assert "a3-resnet50-s4: running: attempt 1 on node-a; or killed without a last word" in below
    assert any(line.startswith("a3-resnet50-s5: queued: ") for line in below)
    assert any(line.startswith("a3-resnet50-s6: missing: ") for line in below)


def test_a_long_reason_is_cut_in_the_table_and_whole_in_json(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    attempt(run, cause="failed", message="x" * 5000, end_step=1)
    assert "x" * 5000 in render(collect([run]), "json")
    assert "x" * 300 not in render(collect([run]), "table")
    assert "x" * 299 + "…" in render(collect([run]), "table")


def test_many_changes_are_counted_in_the_table_and_listed_below(tmp_path: Path) -> None:
    changes = {"optimizer.lr": (8e-3, 4e-3), "augment.mixup": (0.1, 0.2), "augment.rand_augment": ("x", "")}
    text = render(collect([finish(make_run(tmp_path, spec={"modified": changes}), 77.0)]), "table")
    assert "a3 with 3 changes" in text
    assert "augment.mixup 0.1 → 0.2, augment.rand_augment x → '', optimizer.lr 0.008 → 0.004" in text


def test_a_narrow_terminal_gets_fewer_columns_and_is_told_which(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    text = render(collect(runs[:3]), "table", terminal=True)
    assert "\x1b[32mreproduced" in text
    heading = text.splitlines()[0]
    assert "verdict" in heading
    assert "attempts" not in heading
    assert "attempts" in text.partition("Left out for want of width")[2]
    monkeypatch.setenv("COLUMNS", "200")
    wide = render(collect(runs[:3]), "table", terminal=True)
    assert "attempts" in wide.splitlines()[0]
    assert "Left out" not in wide


def test_nothing_at_all_is_said_so() -> None:
    assert render(collect([]), "table") == "No run has a result.\n"
    assert json.loads(render(collect([]), "json")) == {"groups": [], "unfinished": [], "evaluations": []}
    assert render(collect([]), "csv").count("\n") == 1


# ---- reading -----------------------------------------------------------------------------------------------


def test_a_finished_run_costs_one_file_and_all_their_evaluations_one_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, old, waiting = finished(tmp_path, 78.0), finished(tmp_path, 78.0, seed=1), make_run(tmp_path, seed=2)
    old.store.write_json("result.json", {k: v for k, v in old.store.read_json("result.json").items() if k != "science"})
    attempt(run, cause="finished", ended=2e9)
    attempt(waiting, cause="preempted", ended=2e9)
    read: list[str] = []
    read_bytes, read_many, files_of = Store.read_bytes, Store.read_many, Store.files

    def spy_read(self: Store, path: str) -> bytes:
        read.append(self.locate(path).removeprefix(f"{tmp_path}/"))
        return read_bytes(self, path)

    def spy_many(self: Store, paths: Any) -> Any:
        paths = list(paths)
        read.extend(self.locate(path).removeprefix(f"{tmp_path}/") for path in paths)
        return read_many(self, paths)

    def spy_files(self: Store, folder: str = "") -> list[str]:
        read.append(self.locate(folder).removeprefix(f"{tmp_path}/") + "/")
        return files_of(self, folder)

    monkeypatch.setattr(Store, "read_bytes", spy_read)
    monkeypatch.setattr(Store, "read_many", spy_many)
    monkeypatch.setattr(Store, "files", spy_files)
    collect([run])
    assert read == ["a3-resnet50-s0/result.json", "evaluations/"]
    read.clear()
    assert only(collect([old])).n == 1
    assert sorted(read) == [*(f"a3-resnet50-s1/{name}.json" for name in ("recipe", "result", "spec")), "evaluations/"]
    read.clear()
    collect([waiting])
    assert "a3-resnet50-s2/attempts/0001.json" in read
    assert not any("metrics" in name or "checkpoints" in name for name in read)


def test_what_a_result_says_was_trained_is_not_believed_of_another_run(tmp_path: Path) -> None:
    """A result.json that was copied into another run's folder brings its own recipe with it."""
    here, there = make_run(tmp_path), finished(tmp_path, 79.0, a_recipe("name=mine", "paper="))
    here.store.write_bytes("result.json", there.store.read_bytes("result.json"))
    group = only(collect([here]))
    assert (group.recipe, group.n) == ("a3", 0)
    assert group.rows[0].flags == ("its result.json is of mine-resnet50-s0 (seed 0, resnet50)",)


def test_a_folder_that_is_no_run_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    (tmp_path / "README").write_text("x")
    assert collect(list_folders(str(tmp_path))) == Collection((), ())


@pytest.mark.parametrize(
    ("broken", "content", "reason"),
    [
        ("spec.json", None, "there is nothing at"),
        ("spec.json", b"{", "is not JSON"),
        ("recipe.json", None, "there is nothing at"),
        ("recipe.json", b"[]", "recipe.json"),
        ("attempts/0001.json", b"{}", "'number' is missing"),
    ],
)
def test_a_broken_folder_is_named_and_the_others_are_read(
    tmp_path: Path, broken: str, content: bytes | None, reason: str
) -> None:
    finished(tmp_path, 78.0)
    run = make_run(tmp_path, seed=1)
    attempt(run)
    run.store.delete(broken)
    if content is not None:
        run.store.write_bytes(broken, content)
    collection = collect(list_folders(str(tmp_path)))
    assert (collection.groups[0].n, collection.groups[0].mean) == (1, 78.0)
    (one,) = collection.unfinished
    assert (one.run_id, one.state) == (run.run_id, "unreadable")
    assert reason in one.reason


def test_a_run_that_a_sweep_wants_and_that_was_never_sent_is_counted_as_missing(tmp_path: Path) -> None:
    finished(tmp_path, 78.0)
    wanted = [("a3-resnet50-s0", "a3", "resnet50", 0), ("a3-resnet50-s9", "a3", "resnet50", 9), ("x-y-s0", "x", "y", 0)]
    members = [Member(run_id=i, recipe=recipe, model=model, seed=seed) for i, recipe, model, seed in wanted]
    sweep = Sweep(sweep_id="s-1", file="", created=1e9, members=tuple(members))
    collection = collect([Run.at(tmp_path, member.run_id) for member in members], [sweep])
    assert [(g.recipe, g.model, g.n, len(g.rows) + len(g.open), g.verdict) for g in collection.groups] == [
        ("a3", "resnet50", 1, 2, "reproduced"),
        ("x", "y", 0, 1, "no result"),
    ]
    assert [(run.run_id, run.state) for run in collection.unfinished] == [
        ("a3-resnet50-s9", "missing"),
        ("x-y-s0", "missing"),
    ]
    missing = [row for row in csv.DictReader(io.StringIO(render(collection, "csv"))) if row["state"] == "missing"]
    assert [(row["recipe"], row["model"], row["seed"]) for row in missing] == [("a3", "resnet50", "9"), ("x", "y", "0")]
    for format in ("table", "md", "latex", "html"):
        assert "1/2" in render(collection, format)


@pytest.mark.parametrize(("now", "state"), [(1e9 + 3700, "running"), (1e9 + 7200, "killed")])
def test_an_attempt_without_an_end_is_taken_for_dead_when_it_is_silent(tmp_path: Path, now: float, state: str) -> None:
    run = make_run(tmp_path)
    attempt(run)
    run.store.write_json("attempts/0001-alive.json", {"step": 700, "time": 1e9 + 3600, "beats": 360})
    (one,) = collect([run], now=now).unfinished
    heard = "attempt 1 on node-a; last heard of at step 700, 2001-09-09 02:46:40 UTC"
    assert (one.state, one.reason, one.step) == (state, heard, 700)


def test_what_unfinished_runs_cost_is_in_the_cost_of_their_group(tmp_path: Path) -> None:
    done, failed = finished(tmp_path, 78.0), make_run(tmp_path, seed=1)
    attempt(failed, gpus=4, ended=1e9 + 3600, cause="preempted", end_step=500)
    attempt(failed, 2, gpus=4, started=1e9 + 4000, ended=1e9 + 5800, cause="failed", start_step=400, end_step=450)
    group = only(collect([done, failed]))
    assert group.gpu_hours == pytest.approx(60.25 + 4 + 2)
    assert (group.attempts, group.preemptions, group.steps_repeated) == (3, 1, 50)
    assert group.goodput == pytest.approx(0.975)  # of the finished ones


# ---- numbers, a second way ---------------------------------------------------------------------------------


def test_the_numbers_of_every_group_follow_from_its_runs(runs: list[Run]) -> None:
    """From the CSV's lines alone, with numpy, as a user would compute them in a notebook."""
    collection = collect(runs)
    lines = list(csv.DictReader(io.StringIO(render(collection, "csv"))))
    for group in json.loads(render(collection, "json"))["groups"]:
        names = {run["run_id"] for run in group["runs"]} | set(group["unfinished"])
        mine = [line for line in lines if line["run_id"] in names]
        top1 = np.array([float(line["top1"]) for line in mine if line["counted"] == "True"])
        assert group["n"] == len(top1)
        if len(top1):
            assert [group["mean"], group["min"], group["max"]] == pytest.approx([top1.mean(), top1.min(), top1.max()])
        if len(top1) > 1:
            assert group["std"] == pytest.approx(top1.std(ddof=1))
        for column in ("gpu_hours", "attempts", "preemptions", "steps_repeated"):
            assert group[column] == pytest.approx(sum(float(line[column] or 0) for line in mine)), column
        if group["references"] and len(top1):
            assert group["delta"] == pytest.approx(top1.mean() - group["references"][0]["top1"])


def test_a_store_that_is_no_local_folder_is_read_too() -> None:
    runs = [finish(make_run("memory://collect-test", seed=seed), 78.0 + seed / 10) for seed in range(3)]  # type: ignore[arg-type]
    group = only(collect(runs))
    assert group.n == 3
    assert group.mean == pytest.approx(78.1)


def test_the_login_node_imports_neither_torch_nor_timm() -> None:
    code = "import rsb_cluster.results.collect, sys; print([m for m in ('torch', 'timm', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- the published numbers ---------------------------------------------------------------------------------


def published(name: str) -> dict[str, Any]:
    return tomllib.loads((files("rsb_cluster.results.references") / name).read_text(encoding="utf-8"))


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
