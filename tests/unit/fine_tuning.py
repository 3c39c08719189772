"""Runs that start from weights, planned as a submit does, and the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch

from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.config.sweep_file import Grid, SweepFile, expand
from rsb_cluster.submission.plan_runs import plan_runs
from rsb_cluster.submission.planned_run import PlannedRun

# timm's smallest network, so that some hundred steps take seconds on one core.
SHORT = (
    "model.name=test_resnet", "train.global_batch=64", "train.virtual_ranks=1", "schedule.warmup_epochs=0",
    "job.tasks_per_node=1", "schedule.epochs=1",
)  # fmt: skip


def plan_short(recipe: str, data: Path, runs: Path, *assignments: str, seeds: int = 1) -> list[PlannedRun]:
    """Plan runs as submit does, but for the check of the model in a process of its own."""
    of_job = parse_overrides([a.removeprefix("job.") for a in assignments if a.startswith("job.")])
    of_recipe = parse_overrides([a for a in assignments if not a.startswith("job.")])
    file = SweepFile(name="test", grid=(Grid(recipes=(recipe,), seeds=tuple(range(seeds))),))
    points = expand(
        file,
        job="local",
        recipe_overrides=of_recipe,
        job_overrides=of_job,
    )
    return plan_runs(points, str(runs), str(data), dry_run=False)[0]


def from_(source: str | Path) -> str:
    """What sets a recipe's initial weights."""
    return f'init.weights="{source}"'


def write_weights(path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Write random weights, some of them changed, and return them."""
    state = {**timm.create_model("test_resnet", num_classes=10).state_dict(), **changes}
    safetensors.torch.save_file(state, path)
    return state
