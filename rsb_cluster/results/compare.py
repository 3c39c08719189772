"""Two runs side by side: what differs between them, where their curves part, and their final scores."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rsb_cluster.config.schema import flatten
from rsb_cluster.runs.metrics import MetricsRow, read_rows
from rsb_cluster.runs.run import Attempt, Run, Spec

Pair = tuple[Any, Any]

# Of a recipe, what only describes it.
_DESCRIPTION = ("name", "description", "paper", "reconstruction")
_HARDWARE = ("GPU", "driver")

# The scatter of a curve at a row is the median change between the consecutive losses that are at most so many rows
# away. Two curves have parted where they differ by more than so many times the larger scatter, this many rows in a row.
WINDOW = 5
SCATTERS = 3.0
ROWS = 3


@dataclass(frozen=True)
class Curves:
    """How far two curves of the logged training loss agree.

    Attributes:
        common: Number of steps at which both runs logged a loss.
        last_equal: The last logged step up to which all losses are bitwise equal; 0: none.
        first_different: The first logged step whose losses differ at all; None: none does.
        losses: The losses of that step.
        parted: The first step from which on they differ by more than their scatter; None: they do not.
        parted_losses: The losses of that step.
        intervals: Steps between two logged losses, of each run: a loss is the mean over them.
    """

    common: int
    last_equal: int
    first_different: int | None
    losses: Pair | None
    parted: int | None
    parted_losses: Pair | None
    intervals: tuple[int, int]


@dataclass(frozen=True)
class Comparison:
    """Two runs. All pairs are those of the first and of the second run.

    Attributes:
        run_ids: Their ids.
        states: finished, or not finished.
        differences: What differs, by kind and name.
        same: Kinds in which nothing differs.
        curves: How far the training losses agree.
        scores: Final scores, by name; of an unfinished run those of its last evaluation.
    """

    run_ids: tuple[str, str]
    states: tuple[str, str]
    differences: dict[str, dict[str, Pair]]
    same: tuple[str, ...]
    curves: Curves
    scores: dict[str, Pair]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)


def compare(one: Run, other: Run) -> Comparison:
    """Compare two runs.

    Raises:
        StorageError: A run's files cannot be read.
    """
    runs = (one, other)
    facts = [_facts(run) for run in runs]
    found = {kind: _differing(facts[0][kind], facts[1][kind]) for kind in facts[0]}
    rows = [read_rows(run) for run in runs]
    results = [run.result() for run in runs]
    scores = [_scores(result, of_run) for result, of_run in zip(results, rows, strict=True)]
    first, second = ("finished" if result is not None else "not finished" for result in results)
    return Comparison(
        run_ids=(one.run_id, other.run_id),
        states=(first, second),
        differences={kind: pairs for kind, pairs in found.items() if pairs},
        same=tuple(kind for kind, pairs in found.items() if not pairs),
        curves=compare_curves(*rows),
        scores={name: (scores[0].get(name), scores[1].get(name)) for name in {**scores[0], **scores[1]}},
    )


def compare_curves(one: Sequence[MetricsRow], other: Sequence[MetricsRow]) -> Curves:
    """Compare the training losses of two runs at the steps that both logged; the rules are at the top of the module."""
    trained = [[row for row in rows if row.get("kind") == "train" and "loss" in row] for rows in (one, other)]
    curves = [{row["step"]: row["loss"] for row in rows} for rows in trained]
    steps = sorted(curves[0].keys() & curves[1].keys())
    losses = [[curve[step] for step in steps] for curve in curves]
    # Losses are compared as they were logged; NaN equals NaN.
    unequal = [i for i, (a, b) in enumerate(zip(*losses, strict=True)) if a != b and not (a != a and b != b)]
    first = unequal[0] if unequal else None
    parted = _parted(*losses) if unequal else None
    return Curves(
        common=len(steps),
        last_equal=steps[first - 1] if first else (steps[-1] if steps and first is None else 0),
        first_different=None if first is None else steps[first],
        losses=None if first is None else (losses[0][first], losses[1][first]),
        parted=None if parted is None else steps[parted],
        parted_losses=None if parted is None else (losses[0][parted], losses[1][parted]),
        intervals=(_interval(curves[0]), _interval(curves[1])),
    )


def _parted(one: Sequence[float], other: Sequence[float]) -> int | None:
    """Return the first row from which on two curves differ by more than their scatter; a NaN differs from all."""
    if len(one) < ROWS:
        return None
    scatters = [max(pair) for pair in zip(_scatter(one), _scatter(other), strict=True)]
    apart = [not abs(a - b) <= SCATTERS * s for a, b, s in zip(one, other, scatters, strict=True)]
    return next((i for i in range(len(apart)) if all(apart[i : i + ROWS]) and apart[i : i + ROWS]), None)


def _scatter(losses: Sequence[float]) -> list[float]:
    changes = [abs(b - a) for a, b in itertools.pairwise(losses)]
    return [
        statistics.median([c for c in changes[max(0, i - WINDOW) : i + WINDOW] if c == c] or [0.0])
        for i in range(len(losses))
    ]


def _interval(curve: Mapping[int, float]) -> int:
    steps = sorted(curve)
    return round(statistics.median(b - a for a, b in itertools.pairwise(steps))) if len(steps) > 1 else 0


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Pair]:
    names = dict.fromkeys((*one, *other))
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


def _facts(run: Run) -> dict[str, dict[str, Any]]:
    """Return what is known about a run, by kind and name."""
    spec, attempts = run.spec(), run.attempts()
    environment = next((attempt.environment for attempt in reversed(attempts) if attempt.environment), {})
    code = {name: spec.code.get(name, "") for name in ("version", "commit", "uncommitted", "python", "platform")}
    versions = {**code, **spec.packages, **environment}
    recipe = {key: value for key, value in flatten(run.recipe()).items() if key not in _DESCRIPTION}
    return {
        "recipe": recipe,
        "seed and virtual ranks": _run_facts(spec),
        "data": {"folder": run.data_url(), "train digest": spec.train_digest, "val digest": spec.val_digest},
        "versions": {name: value for name, value in versions.items() if name not in _HARDWARE},
        "hardware": _hardware(run, attempts, environment),
    }


def _run_facts(spec: Spec) -> dict[str, Any]:
    weights = spec.init.sha256[:12] if spec.init else ""
    return {
        "seed": spec.seed,
        "virtual ranks": spec.virtual_ranks,
        "version of the draws": spec.draws,
        "initial weights": weights,
    }


def _hardware(run: Run, attempts: Sequence[Attempt], environment: Mapping[str, str]) -> dict[str, Any]:
    submissions = run.submissions()
    return {
        **{name: environment.get(name, "") for name in _HARDWARE},
        "back end": submissions[-1].backend if submissions else "",
        "ranks": ", ".join(dict.fromkeys(str(attempt.world_size) for attempt in attempts)),
        "GPUs": ", ".join(dict.fromkeys(str(attempt.gpus) for attempt in attempts)),
        "nodes": ", ".join(dict.fromkeys(str(len(attempt.hosts)) for attempt in attempts)),
        "attempts": len(attempts),
    }


def _scores(result: Mapping[str, Any] | None, rows: Sequence[MetricsRow]) -> dict[str, float]:
    """Return the final scores, or those of the last evaluation."""
    if result is None:
        last = next((row for row in reversed(rows) if row.get("kind") == "eval"), {})
        names = {"step": "steps", "top1": "top1", "top5": "top5", "loss": "loss"}
        return {shown: last[name] for name, shown in names.items() if name in last}
    scores = {name: result[name] for name in ("steps", "top1", "top5", "loss") if name in result}
    scores |= {f"EMA {name}": result["ema"][name] for name in ("top1", "top5", "loss") if result.get("ema")}
    return scores | {name: result[name] for name in ("gpu_hours", "images_per_s", "goodput") if name in result}
