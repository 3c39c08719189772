"""The model card of a run for the Hugging Face Hub, from the run's folder.

The card and the recipe beside it are for everybody: what they say of data and weights is a name, and no path or bucket.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.datasets import known_data_sets
from rsb_cluster.runs.gpu_hours import Cost, cost, spans
from rsb_cluster.runs.metrics import read_rows
from rsb_cluster.runs.run import Run, Spec
from rsb_cluster.weights.resolve import WeightsFile


def public_recipe(recipe: Recipe) -> Recipe:
    """Return a recipe without paths; its runs have the same ids, unless the data set's name is a path."""
    weights = recipe.init.weights
    init = recipe.init.model_copy(update={"weights": weights if public_name(weights) == weights else ""})
    data = recipe.data.model_copy(update={"set": public_name(recipe.data.set)})
    return recipe.model_copy(update={"init": init, "data": data})


def public_name(source: str) -> str:
    """Return what may be said of a data set or of weights: a name, or of a path the run or the last word."""
    if "/" not in source or source.startswith(("hf-hub:", "hf_hub:")):
        return source
    words = source.rstrip("/").split("/")
    if len(words) > 2 and words[-2] == "checkpoints":
        return f"{words[-3]}, {words[-1]}"
    return words[-1]


def write_card(run: Run, found: WeightsFile) -> str:
    """Return the model card of a run's weights: YAML for the hub, then Markdown for readers."""
    recipe, spec = public_recipe(run.recipe()), run.spec()
    scores = _find_scores(run, found)
    front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in _front(recipe, spec, scores).items())
    parts = {
        "Training": _table(_training(recipe, spec, found)),
        "Results": _table(_results(recipe, scores)),
        "Cost": _table(_cost(cost(spans(run)))),
        "Use": _use(),
        "Reproduce": _reproduce(spec),
        "Licence": _licence(recipe),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items())
    return f"---\n{front}---\n\n# {spec.run_id}\n\n{_summary(recipe)}\n\n{body}\n"


def _find_scores(run: Run, found: WeightsFile) -> Mapping[str, float]:
    """Return top-1, top-5 (percent) and the number of images of the evaluation of these weights; empty if none."""
    prefix = "ema_" if found.is_ema else ""
    names = {key: f"{prefix}{key}" for key in ("top1", "top5", "samples")}
    for row in reversed(read_rows(run)):
        if row["kind"] == "eval" and row["step"] == found.step and set(names.values()) <= row.keys():
            return {key: row[name] for key, name in names.items()}
    return {}


def _front(recipe: Recipe, spec: Spec, scores: Mapping[str, float]) -> dict[str, Any]:
    """Return the metadata for the hub. JSON is valid YAML."""
    front: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "license": "other",
        "tags": ["timm", "image-classification", "rsb-cluster", f"recipe-{recipe.name}"],
        "datasets": [recipe.data.set],
    }
    if scores:
        task = {"type": "image-classification"}
        data = {"type": recipe.data.set, "name": _title(recipe), "split": "validation"}
        metrics = [{"type": "accuracy", "name": f"top-{k}", "value": round(scores[f"top{k}"], 3)} for k in (1, 5)]
        result = {"task": task, "dataset": data, "metrics": metrics}
        front["model-index"] = [{"name": spec.run_id, "results": [result]}]
    return front


def _summary(recipe: Recipe) -> str:
    what = recipe.description or f"recipe {recipe.name}"
    text = f"{recipe.model.name}, trained by rsb-cluster with the recipe `{recipe.name}`: {what}."
    if recipe.reconstruction:
        text += " The published values of this procedure are not public: the recipe is a reconstruction."
    return text


def _training(recipe: Recipe, spec: Spec, found: WeightsFile) -> dict[str, str]:
    resolution, epochs, steps = recipe.augment.resolution, recipe.schedule.epochs, recipe.total_steps
    rows = {
        "recipe": f"`{recipe.name}`" + (f", procedure {recipe.paper} of arXiv:2110.00476" if recipe.paper else ""),
        "changes to the procedure": _modified(spec),
        "model": f"`{recipe.model.name}`, {recipe.data.num_classes} classes",
        "data": f"{_title(recipe)}, {recipe.data.train_samples:,} images; digest `{spec.train_digest[:12]}`",
        "resolution": f"{resolution} px; tested at {recipe.eval.resolution} px, crop {recipe.eval.crop}",
        "length": f"{epochs} epochs, {steps:,} steps of {recipe.train.global_batch} images, seed {spec.seed}",
        "these weights": f"{_kind(found)} after step {found.step:,}, SHA-256 of the checkpoint file `{found.sha256}`",
    }
    if spec.init is not None:
        rows["initial weights"] = f"{public_name(spec.init.source)}, SHA-256 `{spec.init.sha256}`"
    versions = {**spec.code, **spec.packages}
    names = ("version", "commit", "torch", "timm")
    rows["versions"] = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    return rows


def _kind(found: WeightsFile) -> str:
    return "moving average (EMA) of the weights" if found.is_ema else "the weights"


def _modified(spec: Spec) -> str:
    def said(value: Any) -> str:
        return repr(public_name(value) if isinstance(value, str) else value)

    changes = (f"`{key}` {said(there)} → {said(here)}" for key, (there, here) in sorted(spec.modified.items()))
    return ", ".join(changes) or "nothing"


def _results(recipe: Recipe, scores: Mapping[str, float]) -> dict[str, str]:
    if not scores:
        return {"evaluation": "none at this step"}
    return {
        f"top-1 on {_title(recipe)}": f"{scores['top1']:.2f} %",
        "top-5": f"{scores['top5']:.2f} %",
        "images": f"{scores['samples']:,.0f}",
    }


def _cost(spent: Cost) -> dict[str, str]:
    return {
        "GPU-hours": f"{spent.gpu_hours:,.1f}" if spent.gpu_hours else "none; trained on CPUs",
        "process-hours": f"{spent.rank_hours:,.1f}",
        "attempts": str(spent.attempts),
        "preemptions": str(spent.preemptions),
        "steps repeated": f"{spent.steps_repeated:,}",
    }


def _use() -> str:
    return (
        "```python\nimport timm\n\n"
        'model = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True).eval()  # or hf-hub:OWNER/NAME\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n```"
    )


def _reproduce(spec: Spec) -> str:
    init, needed = "", "the data set at DATA"
    if spec.init is not None:
        is_public = public_name(spec.init.source) == spec.init.source
        init = f" --init {spec.init.source if is_public else 'INIT'}"
        needed += "" if is_public else " and the initial weights at INIT"
    return (
        f"With the file recipe.toml of this folder, {needed}:\n\n```console\n"
        f"$ rsb-cluster submit --recipe ./recipe.toml --seed {spec.seed} --virtual-ranks {spec.virtual_ranks}"
        f" --data DATA{init}\n```"
    )


def _licence(recipe: Recipe) -> str:
    known = known_data_sets().get(recipe.data.set)
    data = f" The training images: {known.licence}." if known else ""
    return (
        "rsb-cluster is under Apache-2.0; that says nothing about these weights. Whoever publishes them chooses their "
        f"licence (`license` above), within what the licence of the training images allows.{data}"
    )


def _title(recipe: Recipe) -> str:
    known = known_data_sets().get(recipe.data.set)
    return known.title if known else recipe.data.set


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
