"""Cost estimates before anything is queued: GPU-hours from a throughput, dollars from the price of a node."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from rsb_cluster.backends import Price, backend_of
from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.errors import ConfigError

Rates = Mapping[str, float]  # training images/s of one GPU, by model or glob


def parse_rates(texts: Sequence[str]) -> Rates:
    """Parse ``["resnet18=3000", "1200"]`` to ``{"resnet18": 3000.0, "*": 1200.0}``; the first match applies."""
    found: dict[str, float] = {}
    for text in texts:
        model, _, number = text.rpartition("=")
        try:
            rate = float(number)
        except ValueError:
            rate = 0.0
        if not 0 < rate < math.inf:
            raise ConfigError(f"--images-per-s {text} is neither images/s, such as 1200, nor MODEL=images/s.")
        found.setdefault(model or "*", rate)
    return found


def gpu_hours(recipe: Recipe, rates: Rates) -> float | None:
    """Return the GPU-hours to train on all images of a run; None without a throughput."""
    rate = next((rate for pattern, rate in rates.items() if fnmatchcase(recipe.model.name, pattern)), None)
    return recipe.total_steps * recipe.train.global_batch / rate / 3600 if rate else None


def total(hours: Sequence[float | None]) -> float | None:
    """Return the sum; None if any summand is None."""
    known = [h for h in hours if h is not None]
    return sum(known) if len(known) == len(hours) else None


def cost_usd(parts: Sequence[tuple[Job, float | None]], *, spot: bool) -> float | None:
    """Return the cost of runs in dollars, at today's lowest prices.

    Args:
        parts: The job and the GPU-hours of each run.
        spot: Preemptible instead of on-demand machines.

    Returns:
        None if the hours or the price of any run are unknown.
    """
    known: dict[str, Price | None] = {}
    costs = []
    for job, hours in parts:
        key = job.model_dump_json()
        if key not in known:
            known[key] = backend_of(job).price(job, spot=spot)
        node = known[key]
        costs.append(None if node is None or hours is None else node.usd_per_h * hours / job.ranks_per_node)
    return total(costs)


def describe_price(job: Job, hours: float | None) -> str:
    """Return as text the price of a job's nodes, spot and on demand, and the cost of the GPU-hours on them."""
    lines = []
    for spot, kind in ((True, "spot"), (False, "on demand")):
        node = backend_of(job).price(job, spot=spot)
        if node is not None:
            cost = cost_usd([(job, hours)], spot=spot)
            lines.append(f"${cost:,.2f} {kind}: " if cost is not None else f"{kind}: ")
            lines[-1] += f"${node.usd_per_h:,.2f} per node and hour ({node.source})"
    return "\n".join(lines) or backend_of(job).price_hint
