"""The result of a run."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from rsb_cluster.runs.gpu_hours import cost, spans
from rsb_cluster.runs.run import Run, environment_changes
from rsb_cluster.train.trainer import Trainer


def write_result(run: Run, trainer: Trainer) -> None:
    """Write ``result.json``, the last file of a run, which makes it finished."""
    recipe, spec = trainer.recipe, trainer.spec
    spent = cost(spans(run))
    images = recipe.total_steps * recipe.train.global_batch
    score = trainer.scores[""]
    result: dict[str, Any] = {
        "run_id": spec.run_id,
        "recipe": recipe.name,
        "model": recipe.model.name,
        "seed": spec.seed,
        "steps": recipe.total_steps,
        "epochs": recipe.schedule.epochs,
        "top1": score.top1,
        "top5": score.top5,
        "loss": score.loss,
        "samples": score.samples,
        "modified": spec.modified,
        **asdict(spent),
        "train_s": trainer.progress.train_s,
        "images_per_s": images / max(trainer.progress.train_s, 1e-9),
        "goodput": min(1.0, trainer.progress.train_s / max(spent.wall_s, 1e-9)),
        "best_top1": trainer.progress.best_top1,
        "best_step": trainer.progress.best_step,
        "finished": time.time(),
        "environment_changes": environment_changes(run.attempts()),
        # So a table of ten thousand runs reads only one file of each.
        "science": {"recipe": recipe.model_dump(mode="json"), "spec": spec.brief().model_dump(mode="json")},
    }
    if "ema_" in trainer.scores:
        ema = trainer.scores["ema_"]
        result["ema"] = {"top1": ema.top1, "top5": ema.top5, "loss": ema.loss}
    run.store.write_json("result.json", result)
