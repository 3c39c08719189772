"""What a dry run prints: the plan, the resolved recipe and the script of a run, or the table of a sweep."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rsb_cluster.backends import backend_of
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import flatten
from rsb_cluster.errors import plural
from rsb_cluster.submission.data_location import DataLocation
from rsb_cluster.submission.estimate import Rates, cost_usd, describe_price, gpu_hours, total
from rsb_cluster.submission.job_arrays import Array
from rsb_cluster.submission.own_data import describe_classes
from rsb_cluster.submission.plan import Plan
from rsb_cluster.submission.planned_run import PlannedRun
from rsb_cluster.submission.virtual_ranks import describe_sharing

# --- one recipe -----------------------------------------------------------------------------------------------------


def as_dict(plan: Plan, rates: Rates) -> dict[str, Any]:
    """Return the plan of one recipe for ``--json``."""
    first = plan.runs[0]
    resolved, recipe, job = first.point.resolved, first.recipe, first.point.job
    return {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_file": str(resolved.path),
        "modified": resolved.modified,
        "job": job.model_dump(mode="json"),
        "job_file": str(first.point.job_path),
        "nodes": job.nodes,
        "world_size": job.world_size,
        "global_batch": recipe.train.global_batch,
        "virtual_ranks": first.virtual_ranks,
        "batchnorm_images": recipe.train.global_batch // first.virtual_ranks,
        "ranks_per_virtual_rank": max(1, job.world_size // first.virtual_ranks),
        "epochs": recipe.schedule.epochs,
        "steps_per_epoch": recipe.steps_per_epoch,
        "steps": recipe.total_steps,
        "images": recipe.total_steps * recipe.train.global_batch,
        "gpu_hours": total([gpu_hours(p.recipe, rates) for p in plan.runs]),
        "usd": _usd(plan.runs, rates),
        "data": first.data.url,
        "data_found": first.data.is_found,
        "init": {"source": first.init.source, "sha256": first.init.sha256} if first.init else None,
        "notes": list(plan.notes),
        "ready": not plan.refusals,
        "refusals": [str(error) for error in plan.refusals],
        "runs": [{"run_id": p.run.run_id, "url": p.run.url, "seed": p.seed, "state": p.state} for p in plan.runs],
        "script": (plan.arrays[0].script or None) if plan.arrays else None,
    }


def describe(plan: Plan, rates: Rates) -> str:
    """Return the plan of one recipe as text."""
    first = plan.runs[0]
    resolved, recipe, job = first.point.resolved, first.recipe, first.point.job
    images = recipe.total_steps * recipe.train.global_batch
    hours = total([gpu_hours(p.recipe, rates) for p in plan.runs])
    if hours is not None:
        ranks = job.world_size * len(plan.runs)
        rate = images * len(plan.runs) / hours / 3600
        cost = f"{hours:,.1f} GPU-hours at {rate:g} images/s per GPU, {hours / ranks:,.1f} h on {plural(ranks, 'GPU')}"
        cost += " (training only, without evaluation)"
    else:
        cost = "use --images-per-s N (training throughput of one GPU) to estimate GPU-hours"
    lines = {
        "recipe": f"{recipe.name} ({resolved.path})",
        "model": f"{recipe.model.name}, {first.parameters / 1e6:.1f} M parameters",
        "job": f"{job.name} ({first.point.job_path})",
        "resources": f"{job.shape} = {plural(job.world_size, 'rank')}, back end {job.backend}",
        "global batch": f"{recipe.train.global_batch} = "
        + describe_sharing(recipe, first.virtual_ranks, job.world_size),
        **({"host memory": f"at least {first.memory}"} if first.memory else {}),
        "steps": f"{recipe.total_steps:,} ({recipe.schedule.epochs} epochs of {recipe.steps_per_epoch:,})"
        + _dropped(recipe),
        "images": f"{images:,}",
        "cost": cost,
        **({"price": describe_price(job, hours)} if backend_of(job).has_prices else {}),
        **({"limit": f"{job.max_gpu_hours:g} GPU-hours per run, then it saves and stops"} if job.max_gpu_hours else {}),
        "data": f"{first.data.url} ({_data_state(first.data)})",
        **({"classes": describe_classes(first.data.train)} if first.data.train is not None else {}),
        "initial weights": _initial_weights(first),
        "runs": "\n".join(f"{p.run.url} ({p.state})" for p in plan.runs),
        "scripts and logs": "\n".join(_locations(array) for array in plan.arrays) or "nothing to submit",
    }
    if resolved.modified:
        lines["modified"] = "\n".join(f"{k}: {old!r} → {new!r}" for k, (old, new) in resolved.modified.items())
    width = max(map(len, lines)) + 2
    text = "\n".join(f"{key:<{width}}" + value.replace("\n", "\n" + " " * width) for key, value in lines.items())
    text += _notes(plan)
    text += "\n\n--- recipe, resolved ---\n" + "\n".join(f"{k} = {v!r}" for k, v in flatten(recipe).items())
    if plan.arrays and (script := plan.arrays[0].script):
        text += f"\n\n--- {backend_of(job).script_title} ---\n" + script
    return text


def verdict(plan: Plan) -> str:
    """Return the last line of a dry run: ``ready``, or why a submit would be refused; the notes say more."""
    if plan.refusals:
        # The first sentence of each; the notes have the rest.
        sentences = (re.split(r"\.\s|\n", str(error), maxsplit=1)[0].rstrip(".:") for error in plan.refusals)
        return f"would be refused: {'; '.join(sentences)}"
    if not any(planned.should_submit for planned in plan.runs):
        return f"ready: nothing to submit ({count(planned.state for planned in plan.runs)})"
    return "ready: the same command without --dry-run submits it"


def _dropped(recipe: Recipe) -> str:
    if recipe.augment.repeats > 1:  # an epoch has a part of the images only, another one each time
        return ""
    dropped = recipe.data.train_samples - recipe.steps_per_epoch * recipe.train.global_batch
    return f", {plural(dropped, 'image')} dropped each epoch" if dropped else ""


def _data_state(data: DataLocation) -> str:
    if data.to_make:
        return "will be made"
    if data.is_found:
        return "found"
    return "could not be searched" if data.problem.startswith("could not search") else "NOT FOUND"


def _initial_weights(planned: PlannedRun) -> str:
    if planned.init is not None:
        return f"{planned.init.source} (SHA-256 {planned.init.sha256[:12]})"
    weights = planned.recipe.init.weights
    return f"{weights} (NOT FOUND)" if weights else "random"


# --- a sweep --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepLine:
    """Runs of a sweep that differ only in the seed."""

    runs: tuple[PlannedRun, ...]

    @property
    def first(self) -> PlannedRun:
        """The first of the runs."""
        return self.runs[0]

    @property
    def states(self) -> str:
        """The number of runs in each state."""
        return count(p.state for p in self.runs)


def lines(plan: Plan) -> list[SweepLine]:
    """Group the runs of a sweep that differ only in the seed."""
    found: dict[int, list[PlannedRun]] = {}
    for planned in plan.runs:
        found.setdefault(id(planned.point), []).append(planned)
    return [SweepLine(tuple(runs)) for runs in found.values()]


def sweep_as_dict(plan: Plan, rates: Rates) -> dict[str, Any]:
    """Return the plan of a sweep for ``--json``."""
    assert plan.sweep is not None
    return {
        "sweep_id": plan.sweep.sweep_id,
        "file": plan.sweep.file or None,
        "runs": [_run_as_dict(p, rates) for p in plan.runs],
        "arrays": [_array_as_dict(array) for array in plan.arrays],
        "steps": sum(p.recipe.total_steps for p in plan.runs),
        "gpu_hours": total([gpu_hours(p.recipe, rates) for p in plan.runs]),
        "gpu_hours_to_submit": total([gpu_hours(p.recipe, rates) for p in plan.runs if p.should_submit]),
        "usd": _usd(plan.runs, rates),
        "notes": list(plan.notes),
        "ready": not plan.refusals,
        "refusals": [str(error) for error in plan.refusals],
    }


def _run_as_dict(planned: PlannedRun, rates: Rates) -> dict[str, Any]:
    recipe, job = planned.recipe, planned.point.job
    return {
        "run_id": planned.run.run_id,
        "url": planned.run.url,
        "state": planned.state,
        "recipe": recipe.name,
        "model": recipe.model.name,
        "varied": planned.point.varied,
        "modified": planned.point.resolved.modified,
        "seed": planned.seed,
        "nodes": job.nodes,
        "world_size": job.world_size,
        "virtual_ranks": planned.virtual_ranks,
        "steps": recipe.total_steps,
        "gpu_hours": gpu_hours(recipe, rates),
    }


def _array_as_dict(array: Array) -> dict[str, Any]:
    return {
        "job": array.job.model_dump(mode="json"),
        "shape": array.job.shape,
        "folder": str(array.folder),
        "runs": [run.run_id for run in array.runs],
        "script": array.script or None,
    }


def sweep_rows(plan: Plan, rates: Rates) -> list[dict[str, str]]:
    """Return the rows of a sweep's table as ``{column: text}``, the totals last."""
    shown = lines(plan)
    varied = {
        key: {str(line.first.point.varied.get(key)) for line in shown} for p in shown for key in p.first.point.varied
    }
    rows = []
    for line in shown:
        first = line.first
        hours = total([gpu_hours(p.recipe, rates) for p in line.runs])
        rows.append(
            {
                "recipe": first.recipe.name,
                "model": first.recipe.model.name,
                "values": ", ".join(f"{k}={v}" for k, v in first.point.varied.items() if len(varied[k]) > 1),
                "runs": str(len(line.runs)),
                "resources": first.point.job.shape,
                "batch": f"{first.virtual_ranks} × {first.recipe.train.global_batch // first.virtual_ranks}",
                "steps": f"{first.recipe.total_steps:,}",
                "GPU-hours": _hours(hours),
                "state": line.states,
            }
        )
    totals = {
        "recipe": "total",
        "runs": str(len(plan.runs)),
        "steps": f"{sum(p.recipe.total_steps for p in plan.runs):,}",
        "GPU-hours": _hours(total([gpu_hours(p.recipe, rates) for p in plan.runs])),
        "state": count(p.state for p in plan.runs),
    }
    rows.append(dict.fromkeys(rows[0], "") | totals)
    return rows if any(row["values"] for row in rows) else [{k: v for k, v in r.items() if k != "values"} for r in rows]


def sweep_summary(plan: Plan, rates: Rates) -> str:
    """Return the text below a sweep's table: its id, the jobs to submit, their cost, and notes."""
    assert plan.sweep is not None
    todo = [p for p in plan.runs if p.should_submit]
    hours = total([gpu_hours(p.recipe, rates) for p in todo])
    text = f"sweep {plan.sweep.sweep_id}: {len(todo)} of {plural(len(plan.runs), 'run')} to submit, "
    text += f"in {plural(len(plan.arrays), 'job')}"
    text += f", {_hours(hours)} GPU-hours (training only, without evaluation)" if hours is not None else ""
    for array in plan.arrays:
        concurrent = backend_of(array.job).concurrent_runs(array.job, len(array.runs))
        text += f"\n  {array.job.name}: {len(array.runs)} × ({array.job.shape}), at most {concurrent} concurrent"
        text += f"\n    scripts and logs: {_locations(array)}"
    prices = _usd(todo, rates)
    if hours is not None and prices:
        text += "".join(
            f"\n{kind}: {f'${cost:,.2f}' if cost is not None else 'price unknown'}" for kind, cost in prices.items()
        )
    if hours is None:
        text += "\nuse --images-per-s N or MODEL=N (training throughput of one GPU) to estimate GPU-hours"
    return text + _notes(plan)


def _locations(array: Array) -> str:
    """Return where an array's scripts and logs will be."""
    if not backend_of(array.job).needs_object_store:
        return str(array.folder)
    return "in each run's folder: submissions/ (spec and task), code/ (this package as a wheel), logs/"


def count(states: Any) -> str:
    """Return ``"8 new, 2 finished"``."""
    return ", ".join(f"{number} {state}" for state, number in Counter(states).items())


def _usd(runs: Sequence[PlannedRun], rates: Rates) -> dict[str, float | None] | None:
    """Return the cost of runs, spot and on demand; None if the back end of any of them has no prices."""
    if not runs or not all(backend_of(planned.point.job).has_prices for planned in runs):
        return None
    parts = [(planned.point.job, gpu_hours(planned.recipe, rates)) for planned in runs]
    return {"spot": cost_usd(parts, spot=True), "on demand": cost_usd(parts, spot=False)}


def _hours(hours: float | None) -> str:
    return "unknown" if hours is None else f"{hours:,.1f}"


def _notes(plan: Plan) -> str:
    return "\n\n" + "\n".join(f"note: {note}" for note in plan.notes) if plan.notes else ""
