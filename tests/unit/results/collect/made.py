"""Run folders with the numbers spelled out, as a trainer would leave them, and evaluations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import override, parse_overrides
from rsb_cluster.evaluation.record import Evaluation
from rsb_cluster.results.collect import Collection, Group
from rsb_cluster.runs.run import Attempt, Run, Spec
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
    """A3 with changes."""
    return Recipe.model_validate(override(A3, parse_overrides(list(changes))))


def a1(model: str, *changes: str) -> Recipe:
    """A1 of a model, with changes."""
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
    """A run with a result."""
    return finish(make_run(folder, recipe, seed=seed), top1, **result)


def attempt(run: Run, number: int = 1, **fields: Any) -> None:
    """Note an attempt of a run."""
    values = {"number": number, "job_id": "7", "world_size": 4, "hosts": ("node-a",), "started": 1e9, "start_step": 0}
    run.write_attempt(Attempt.model_validate(values | fields))


def only(collection: Collection) -> Group:
    """The group, where there is but one."""
    (group,) = collection.groups
    return group


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


SETS = {"imagenet-1k": 50_000, "imagenet-v2": 10_000, "cifar10": 10_000, "nct-crc-he": 7_180, "indl-zollner": 2_000}


def an_evaluation(value: float, run: Run | None = None, data_set: str = "imagenet-1k", **fields: Any) -> Evaluation:
    """An evaluation of a run, or of released weights, with one value."""
    steps = run.recipe().total_steps if run else 0
    metric = fields.pop("metric", "label_set_top1" if fields.get("labels") else "top1")
    known = {
        "weights": run.run_id if run else "resnet50.a1_in1k", "model": run.recipe().model.name if run else "resnet50",
        "weights_digest": "abcdef0123", "run_id": run.run_id if run else "", "step": steps,
        "procedure": "" if run else "A1",
        "data": f"s3://data/{data_set}/val", "data_set": data_set, "part": "val", "data_digest": "d",
        "resolution": 224, "crop": 0.95, "interpolation": "bicubic", "exact": False,
        "metric": metric, "values": {metric: value}, "samples": SETS.get(data_set, 8_900),
        "scored": SETS.get(data_set, 8_900), "finished": 1.76e9, "code": {"version": "0.1.0"},
    }  # fmt: skip
    return Evaluation.model_validate(known | fields)
