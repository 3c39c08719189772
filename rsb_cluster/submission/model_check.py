"""Check that timm can build the models and transforms of recipes.

The check runs in a process of its own, as importing torch takes seconds. Models that passed are cached in the user's
cache folder, until a library or this package's code changes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.subprocesses.helper import ask
from rsb_cluster.weights.resolve import WeightsFile

log = logging.getLogger(__name__)

# A new version of any of these invalidates the cache.
_LIBRARIES = ("torch", "torchvision", "timm", "opencv-python-headless", "safetensors")


def check_models(models: Sequence[tuple[Recipe, WeightsFile | None]], recompute: Sequence[bool] = ()) -> list[int]:
    """Build the models and transforms of recipes, in one process for all that are not in the cache.

    Args:
        models: Recipes, each with its initial weights.
        recompute: Whether each is for a job with gradient checkpointing, which not all can; empty: none is.

    Returns:
        The number of parameters of each model.

    Raises:
        ConfigError: A model cannot be built; the message explains each problem.
    """
    asked = [(*pair, flag) for pair, flag in zip(models, recompute or [False] * len(models), strict=True)]
    keys = [_cache_key(*question) for question in asked]
    cached = _read_cache()
    new = {key: question for key, question in zip(reversed(keys), reversed(asked), strict=True) if key not in cached}
    if new:
        cached |= dict(zip(new, _build(list(new.values())), strict=True))
        _write_cache(cached)
    return [cached[key] for key in keys]


def _cache_key(recipe: Recipe, init: WeightsFile | None, recompute: bool) -> str:
    """Return a digest of the fields that the check depends on."""
    plain = recipe.model_dump(include={"model", "init", "data", "augment", "eval"}, mode="json")
    text = json.dumps([plain, recipe.optimizer.name, init.sha256 if init else "", recompute], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _build(models: Sequence[tuple[Recipe, WeightsFile | None, bool]]) -> list[int]:
    names = ", ".join(dict.fromkeys(recipe.model.name for recipe, _, _ in models))
    log.info("checking that timm can build %s (takes a moment; the answer is remembered) ...", names)
    request = [[recipe.model_dump(mode="json"), asdict(init) if init else None, flag] for recipe, init, flag in models]
    answer = ask("rsb_cluster.train.preflight", request, doing="the check of the models")
    return [int(count) for count in answer["parameters"]]


def _cache_path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsb-cluster" / "models.json"


def _versions() -> str:
    """Return a digest of the libraries' versions and of this package's files."""
    package = Path(__file__).parents[1]
    code = [(str(path.relative_to(package)), path.stat().st_mtime_ns) for path in sorted(package.rglob("*.py"))]
    text = json.dumps([sys.version, [version(library) for library in _LIBRARIES], code])
    return hashlib.sha256(text.encode()).hexdigest()


def _read_cache() -> dict[str, int]:
    try:
        found = json.loads(_cache_path().read_text())
        return {str(key): int(value) for key, value in found["good"].items()} if found["by"] == _versions() else {}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # the cache only saves time


def _write_cache(good: dict[str, int]) -> None:
    try:
        file = _cache_path()
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"by": _versions(), "good": good}))
        temporary.replace(file)
    except (OSError, RuntimeError):
        pass
