"""What a dry run prints: the plan in words, the resolved recipe, and the script."""

from __future__ import annotations

from typing import Any

from rsb_cluster import submit
from rsb_cluster.recipe import flatten
from rsb_cluster.submit import Plan


def as_dict(plan: Plan, images_per_s: float | None = None) -> dict[str, Any]:
    """Return a plan as plain values, for ``--json``."""
    recipe, job = plan.resolved.recipe, plan.job
    return {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_file": str(plan.resolved.path),
        "modified": plan.resolved.modified,
        "job": job.model_dump(mode="json"),
        "job_file": str(plan.job_path),
        "nodes": job.nodes,
        "world_size": job.world_size,
        "global_batch": recipe.train.global_batch,
        "virtual_ranks": plan.runs[0].virtual_ranks,
        "epochs": recipe.schedule.epochs,
        "steps_per_epoch": recipe.steps_per_epoch,
        "steps": recipe.total_steps,
        "images": recipe.total_steps * recipe.train.global_batch,
        "gpu_hours": submit.gpu_hours(recipe, images_per_s, plan.runs) if images_per_s else None,
        "data": plan.data.url,
        "data_found": plan.data.train is not None,
        "notes": list(plan.notes),
        "runs": [{"run_id": p.run.run_id, "url": p.run.url, "seed": p.seed, "state": p.state} for p in plan.runs],
        "script": submit.sbatch(plan) if job.backend == "slurm" else None,
    }


def describe(plan: Plan, images_per_s: float | None = None) -> str:
    """Return a plan as text.

    Args:
        plan: The plan.
        images_per_s: Training images per second and GPU, for the estimate of GPU-hours.
    """
    recipe, job, first = plan.resolved.recipe, plan.job, plan.runs[0]
    images = recipe.total_steps * recipe.train.global_batch
    accumulation = first.virtual_ranks // job.world_size
    if images_per_s:
        hours = submit.gpu_hours(recipe, images_per_s, plan.runs)
        ranks = job.world_size * len(plan.runs)
        cost = f"{hours:,.1f} GPU-hours at {images_per_s:g} images/s and GPU, {hours / ranks:,.1f} h on {ranks} of them"
        cost += " (training images; evaluation comes on top)"
    else:
        cost = "say --images-per-s N (of one GPU, in training) to see GPU-hours"
    found = plan.data.train is not None and plan.data.val is not None
    lines = {
        "recipe": f"{recipe.name} ({plan.resolved.path})",
        "model": f"{recipe.model.name}, {plan.parameters / 1e6:.1f} M parameters",
        "job": f"{job.name} ({plan.job_path})",
        "resources": f"{job.shape} = {job.world_size} ranks, back end {job.backend}",
        "global batch": f"{recipe.train.global_batch} = {first.virtual_ranks} virtual ranks × "
        f"{recipe.train.global_batch // first.virtual_ranks} images"
        + (f" ({accumulation} micro-batches on each rank)" if accumulation > 1 else ""),
        "steps": f"{recipe.total_steps:,} ({recipe.schedule.epochs} epochs of {recipe.steps_per_epoch:,})",
        "images": f"{images:,}",
        "cost": cost,
        "data": f"{plan.data.url} ({'found' if found else 'NOT FOUND'})",
        "runs": "\n".join(f"{p.run.url} ({p.state})" for p in plan.runs),
        "scripts and logs": str(plan.folder),
    }
    if plan.resolved.modified:
        lines["modified"] = "\n".join(
            f"{k}: {there!r} → {here!r}" for k, (there, here) in plan.resolved.modified.items()
        )
    width = max(map(len, lines)) + 2
    text = "\n".join(f"{key:<{width}}" + value.replace("\n", "\n" + " " * width) for key, value in lines.items())
    if plan.notes:
        text += "\n\n" + "\n".join(f"note: {note}" for note in plan.notes)
    text += "\n\n--- recipe, resolved ---\n" + "\n".join(f"{k} = {v!r}" for k, v in flatten(recipe).items())
    if job.backend == "slurm":
        text += "\n\n--- sbatch script ---\n" + submit.sbatch(plan)
    return text
