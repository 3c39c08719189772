"""Reads runs: the result of each, or the reason why there is none.

A finished run costs one read: its result.json contains its recipe and spec. A run of an older version, and one that has
not finished, costs a few more. No tensors are read, and metrics only of an attempt that was killed.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import Section, read_record
from rsb_cluster.errors import AccessError, MissingError, RsbError, StorageError
from rsb_cluster.results.references import PublishedModel, lookup
from rsb_cluster.runs.gpu_hours import Cost, Span, cost, spans
from rsb_cluster.runs.run import Run, Spec
from rsb_cluster.runs.sharing import why_unreadable
from rsb_cluster.runs.sweep import Member
from rsb_cluster.storage.store import Store, parse_json

Changes = dict[str, tuple[Any, Any]]
Percent = Annotated[float, Field(ge=0, le=100)]

RESOLUTIONS = ("augment.resolution", "eval.resolution")
READERS = 16  # threads; a request to an object store takes tens of milliseconds
HEARTBEAT_TIMEOUT_S = 300.0  # an attempt writes a heartbeat about every ten seconds, but clocks may differ
RUN_FILES = ("spec.json", "recipe.json", "result.json", "attempts", "checkpoints", "metrics")


class Accuracy(Section):
    """Accuracy on val/. ``loss`` may be NaN: a run that diverged has a result too."""

    # A later version may add fields; the result must still be readable.
    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)

    top1: Percent
    top5: Percent
    loss: float


class Result(Accuracy):
    """The result.json of a finished run. Older versions did not write the fields with a default."""

    run_id: str
    recipe: str
    model: str
    seed: int
    steps: int
    epochs: int | float
    samples: int = Field(description="images evaluated")
    modified: Changes = Field({}, description="changes to the procedure, as {field: (there, here)}")
    gpu_hours: float
    rank_hours: float | None = None
    wall_s: float | None = None
    train_s: float = Field(description="time spent training, in all attempts")
    attempts: int
    preemptions: int
    steps_repeated: int | None = None
    images_per_s: float
    goodput: float = Field(description="useful time / total time")
    finished: float = Field(description="unix time")
    environment_changes: tuple[str, ...] = Field((), description="between attempts")
    ema: Accuracy | None = None


@dataclass(frozen=True)
class Science:
    """What a run trains.

    Attributes:
        changes: Changes to the procedure, as ``{field: (there, here)}``.
        key: Equal for runs that differ only in the seed.
    """

    recipe: Recipe
    spec: Spec
    changes: Changes
    key: str

    @property
    def code(self) -> str:
        """Version of the package, and the commit if it ran from a checkout."""
        code = self.spec.code
        parts = (code.get("version"), code.get("commit", "")[:12], "+changes" if code.get("uncommitted") else "")
        return " ".join(part for part in parts if part)

    def to_json(self) -> dict[str, Any]:
        """Return the fields of a row about the run."""
        return {
            "recipe": self.recipe.name,
            "procedure": self.recipe.paper,
            "model": self.recipe.model.name,
            "seed": self.spec.seed,
            "virtual_ranks": self.spec.virtual_ranks,
            "modified": describe(self.changes),
            "code": self.code,
        }


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        flags: Why it does not count; empty if it does.
    """

    run: Run
    science: Science
    result: Result
    flags: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything known about the run, as a flat mapping."""
        values = self.result.model_dump(exclude={"modified", "ema", "environment_changes"})
        for key in ("top1", "top5", "loss"):
            values[f"ema_{key}"] = getattr(self.result.ema, key) if self.result.ema else None
        values |= self.science.to_json() | {"run_id": self.run.run_id, "url": self.run.url}
        return values | {"reason": "; ".join(self.flags), "state": "finished", "counted": not self.flags}


@dataclass(frozen=True)
class UnfinishedRun:
    """A run without a usable result, and the reason.

    Attributes:
        science: What it trains; None if unknown.
        member: The entry in a sweep of a run without a folder, or with one that cannot be read.
        cost: The cost so far.
        step: The last known step.
    """

    run_id: str
    url: str
    state: str
    reason: str
    science: Science | None = None
    cost: Cost | None = None
    step: int = 0
    member: Member | None = None

    def to_json(self) -> dict[str, Any]:
        """Return everything known about the run, as a flat mapping."""
        values = self.member.model_dump() if self.member else {}
        values |= (self.science.to_json() if self.science else {}) | (asdict(self.cost) if self.cost else {})
        values |= {"run_id": self.run_id, "url": self.url, "state": self.state, "reason": self.reason, "counted": False}
        return values | ({"steps": self.step} if self.cost else {})


@dataclass
class Reader:
    """Reads runs; equal recipes share one object, so that many runs fit in memory.

    Attributes:
        now: Unix time, to which heartbeats are compared.
        members: The entries of sweeps, by run id.
    """

    now: float = field(default_factory=time.time)
    members: Mapping[str, Member] = field(default_factory=dict)
    _recipes: dict[str, tuple[Recipe, str]] = field(default_factory=dict)

    def read(self, runs: Sequence[Run]) -> Iterator[tuple[Run, FinishedRun | UnfinishedRun | None]]:
        """Yield each run with its content; None for another folder among runs.

        Errors are reported in the content, not raised. Runs of one folder are read together, so the order may change.
        """
        for parent, members in _by_parent(runs):
            results = Store(parent).read_many(f"{run.run_id}/result.json" for run in members)
            with ThreadPoolExecutor(READERS) as pool:
                for start in range(0, len(members), READERS * 16):
                    batch = [(run, next(results)) for run in members[start : start + READERS * 16]]
                    yield from zip((run for run, _ in batch), pool.map(self._read, batch), strict=True)

    def _read(self, run_and_result: tuple[Run, bytes | StorageError]) -> FinishedRun | UnfinishedRun | None:
        run, content = run_and_result
        science: Science | None = None
        try:
            if isinstance(content, MissingError):
                science = self._science(run.store.read_json("recipe.json"), run.spec(), run)
                return self._unfinished(run, science)
            if isinstance(content, StorageError):
                raise content
            values = _parsed(content, run.store.locate("result.json"))
            science = self._science_of(run, values)
            result = read_record(Result, values, run.store.locate("result.json"))
        except AccessError as error:
            member = self.members.get(run.run_id) if science is None else None
            return UnfinishedRun(run.run_id, run.url, "unreadable", why_unreadable(run, error), science, member=member)
        except RsbError as error:
            if science is None and not set(RUN_FILES) & set(run.store.names()):
                return self._absent(run, error)
            if science is None:
                with contextlib.suppress(RsbError):
                    science = self._science(run.store.read_json("recipe.json"), run.spec(), run)
            return UnfinishedRun(run.run_id, run.url, "broken", str(error), science)
        if result.modified:
            science = self._changed(science, science.spec.modified | result.modified)
        return FinishedRun(run, science, result, _flags(science, result))

    def _absent(self, run: Run, error: RsbError) -> UnfinishedRun | None:
        if run.store.exists():
            return None
        member = self.members.get(run.run_id)
        reason = "a sweep contains it, but it was never submitted" if member else str(error)
        return UnfinishedRun(run.run_id, run.url, "missing", reason, member=member)

    def _science_of(self, run: Run, values: dict[str, Any]) -> Science:
        """Return what was trained, from the result if it contains that for this run, else from the run's folder."""
        science = values.get("science") if values.get("run_id") == run.run_id else None
        if science is None:
            return self._science(run.store.read_json("recipe.json"), run.spec(), run)
        where = run.store.locate("result.json")
        return self._science(science.get("recipe"), read_record(Spec, science.get("spec"), where), run)

    def _science(self, recipe_values: Any, spec: Spec, run: Run) -> Science:
        init = spec.init.sha256 if spec.init else ""
        text = json.dumps([recipe_values, init, spec.draws], sort_keys=True)
        if text not in self._recipes:
            recipe = read_record(Recipe, recipe_values, run.store.locate("recipe.json"))
            # The same seed and data for all: seeds, and copies of a data set, belong to one group.
            self._recipes[text] = (recipe, recipe.digest(0, "", init, spec.draws))
        recipe, digest = self._recipes[text]
        brief = spec.brief()
        return self._changed(Science(recipe, brief, {}, digest), brief.modified)

    def _changed(self, science: Science, changes: Changes) -> Science:
        """Set the changes, and with them the group."""
        recipe, spec = science.recipe, science.spec
        known = published(recipe, spec)
        if known and known.px == resolutions(recipe):
            changes = {key: change for key, change in changes.items() if key not in RESOLUTIONS}
        digest = science.key.partition(" ")[0]
        names = json.dumps([recipe.name, recipe.paper, {k: list(c) for k, c in changes.items()}], sort_keys=True)
        return Science(recipe, spec, changes, f"{digest} {spec.virtual_ranks} {names}")

    def _unfinished(self, run: Run, science: Science) -> UnfinishedRun:
        """Return a run without a result, with its state and the reason."""
        found = spans(run)
        used, step = cost(found), max((span.end_step for span in found), default=0)
        return UnfinishedRun(run.run_id, run.url, *self._state_and_reason(run, found), science, used, step)

    def _state_and_reason(self, run: Run, found: list[Span]) -> tuple[str, str]:
        if not found:
            submissions = run.submissions()
            if not submissions:
                return "not sent", "no submission is recorded"
            job = submissions[-1]
            return "queued", f"sent to {job.backend} as job {job.job_id}; it has not started, or left no trace"
        last = found[-1].attempt
        if not last.cause:
            where = f"attempt {last.number} on {', '.join(last.hosts)}"
            if found[-1].ended <= last.started:
                return "running", f"{where}; or killed without a last word"
            heartbeat = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(found[-1].ended))
            heard = f"{where}; last heard of at step {found[-1].end_step}, {heartbeat}"
            if self.now - found[-1].ended <= HEARTBEAT_TIMEOUT_S:
                return "running", heard
            return "killed", f"{heard}, more than {HEARTBEAT_TIMEOUT_S / 60:.0f} min ago by the clock of this machine"
        states = dict.fromkeys(("preempted", "timed out", "lost peer", "stuck", "superseded"), "waiting")
        states["finished"] = "no result"
        reason = last.message or last.cause
        if last.cause == "finished":
            reason = "its last step is done, but result.json is missing: submit it again"
        return states.get(last.cause, last.cause), f"{reason} (attempt {last.number}, step {last.end_step})"


def published(recipe: Recipe, spec: Spec) -> PublishedModel | None:
    """Return the published values of a recipe's procedure and model, and of the procedure of its initial weights."""
    return lookup(recipe.paper, recipe.model.name, spec.init.procedure if spec.init else "")


def resolutions(recipe: Recipe) -> tuple[int, int]:
    """Return the sides of the training and of the test crop, px."""
    return recipe.augment.resolution, recipe.eval.resolution


def describe(changes: Changes) -> str:
    """Format changes, as ``optimizer.lr 0.008 → 0.004``."""
    return ", ".join(f"{key} {_plain(there)} → {_plain(here)}" for key, (there, here) in sorted(changes.items()))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {_plain(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, float):
        return f"{value:.7g}" if value != int(value or 0) else str(value)
    return f"'{value}'" if value == "" else str(value)


def _by_parent(runs: Sequence[Run]) -> Iterator[tuple[str, list[Run]]]:
    parents: dict[str, list[Run]] = {}
    for run in runs:
        parents.setdefault(run.url.rpartition("/")[0], []).append(run)
    yield from parents.items()


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    values = parse_json(content, where)
    if not isinstance(values, dict):
        raise StorageError(f"{where} is not a JSON object. Was it edited by hand? Restore it from a copy.")
    return values


def _flags(science: Science, result: Result) -> tuple[str, ...]:
    """Return the reasons why a result does not count."""
    recipe, spec = science.recipe, science.spec
    flags = []
    if result.samples != recipe.data.val_samples:
        flags.append(f"evaluated {result.samples} images, not {recipe.data.val_samples}")
    if result.steps != recipe.total_steps:
        flags.append(f"trained {result.steps} steps, not {recipe.total_steps}")
    if (result.run_id, result.seed, result.model) != (spec.run_id, spec.seed, recipe.model.name):
        flags.append(f"its result.json is of {result.run_id} (seed {result.seed}, {result.model})")
    return tuple(flags)
