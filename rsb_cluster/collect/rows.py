"""Reading one run: its result, or why it has none. No tensor file and no metrics are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from rsb_cluster.errors import MissingError, RsbError
from rsb_cluster.recipe import Recipe, Section, validate
from rsb_cluster.references import Known, lookup
from rsb_cluster.run import Run, Spec

Changes = dict[str, tuple[Any, Any]]
Percent = Annotated[float, Field(ge=0, le=100)]

RESOLUTIONS = ("augment.resolution", "eval.resolution")


class Evaluation(Section):
    """Accuracy on val/. ``loss`` may be NaN: a run that diverged has a result too."""

    # A later version may say more; what it says here must still be readable.
    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)

    top1: Percent
    top5: Percent
    loss: float


class Result(Evaluation):
    """What a run writes when it has finished."""

    run_id: str
    recipe: str
    model: str
    seed: int
    steps: int
    epochs: int | float
    samples: int = Field(description="images evaluated")
    modified: Changes = Field({}, description="what was changed, as {field: (there, here)}")
    gpu_hours: float
    train_s: float = Field(description="time spent training, in all attempts")
    attempts: int
    preemptions: int
    images_per_s: float
    goodput: float = Field(description="useful time / all time")
    finished: float = Field(description="unix time")
    ema: Evaluation | None = None


@dataclass(frozen=True)
class Row:
    """A finished run.

    Attributes:
        changes: What was changed against the procedure, as ``{field: (there, here)}``.
        flags: Why it does not count; empty where it does.
    """

    run: Run
    recipe: Recipe
    spec: Spec
    result: Result
    changes: Changes
    flags: tuple[str, ...]

    @property
    def code(self) -> str:
        """Version of the package, and of its checkout where it ran from one."""
        code = self.spec.code
        parts = (code.get("version"), code.get("commit", "")[:12], "+changes" if code.get("uncommitted") else "")
        return " ".join(part for part in parts if part)

    def to_json(self) -> dict[str, Any]:
        """Return all there is to say about the run, as a flat mapping."""
        values = self.result.model_dump(exclude={"modified", "ema"})
        for key in ("top1", "top5", "loss"):
            values[f"ema_{key}"] = getattr(self.result.ema, key) if self.result.ema else None
        values |= {"url": self.run.url, "procedure": self.recipe.paper, "virtual_ranks": self.spec.virtual_ranks}
        values |= {"code": self.code, "modified": describe(self.changes), "reason": "; ".join(self.flags)}
        return values | {"state": "finished", "counted": not self.flags}


@dataclass(frozen=True)
class Unfinished:
    """A run without a result that can be used, and why."""

    run_id: str
    url: str
    state: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {"run_id": self.run_id, "url": self.url, "state": self.state, "reason": self.reason}


def read(run: Run) -> Row | Unfinished:
    """Read a run's three small files, and its attempts only where there is no result."""
    try:
        spec = run.spec()
        recipe = run.recipe()
        values = run.result()
        if values is None:
            return Unfinished(run.run_id, run.url, *_why_unfinished(run))
        result = validate(Result, values, run.store.locate("result.json"))
    except MissingError as error:
        return Unfinished(run.run_id, run.url, "missing", str(error))
    except RsbError as error:
        return Unfinished(run.run_id, run.url, "unreadable", str(error))
    changes = spec.modified | result.modified
    known = published(recipe)
    if known and known.px == resolutions(recipe):
        changes = {key: change for key, change in changes.items() if key not in RESOLUTIONS}
    return Row(run, recipe, spec, result, changes, _flags(recipe, spec, result))


def published(recipe: Recipe) -> Known | None:
    """Return what is published for a recipe's procedure and model."""
    return lookup(recipe.paper, recipe.model.name)


def resolutions(recipe: Recipe) -> tuple[int, int]:
    """Return the side of the training and of the test crop, px."""
    return recipe.augment.resolution, recipe.eval.resolution


def describe(changes: Changes) -> str:
    """Say what was changed, as ``optimizer.lr 0.008 → 0.004``."""
    return ", ".join(f"{key} {_plain(there)} → {_plain(here)}" for key, (there, here) in sorted(changes.items()))


def _plain(value: Any) -> str:
    return f"'{value}'" if value == "" else str(value)


def _why_unfinished(run: Run) -> tuple[str, str]:
    """Return the state of a run without a result, and the reason, from what its folder says."""
    attempts = run.attempts()
    if not attempts:
        sent = run.submissions()
        if not sent:
            return "not sent", "no submission is noted"
        return "queued", f"sent to {sent[-1].backend} as job {sent[-1].job_id}; it has not started, or left no trace"
    last = attempts[-1]
    if not last.cause:
        return "running", f"attempt {last.number} on {', '.join(last.hosts)}; or killed without a last word"
    states = {"preempted": "waiting", "timed out": "waiting", "lost peer": "waiting", "finished": "no result"}
    said = last.message or last.cause
    return states.get(last.cause, last.cause), f"{said} (attempt {last.number}, step {last.end_step})"


def _flags(recipe: Recipe, spec: Spec, result: Result) -> tuple[str, ...]:
    """Return why a result does not count."""
    flags = []
    if result.samples != recipe.data.val_samples:
        flags.append(f"evaluated {result.samples} images, not {recipe.data.val_samples}")
    if result.steps != recipe.total_steps:
        flags.append(f"trained {result.steps} steps, not {recipe.total_steps}")
    if (result.run_id, result.seed, result.model) != (spec.run_id, spec.seed, recipe.model.name):
        flags.append(f"its result.json is of {result.run_id} (seed {result.seed}, {result.model})")
    return tuple(flags)
