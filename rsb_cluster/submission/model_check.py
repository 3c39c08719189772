"""Whether timm can build what recipes name, with the answers of earlier submits.

Only a process that imports torch can tell, which takes it seconds. What it found good is remembered in the user's cache
folder, for as long as neither the libraries nor this package's own code change.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.errors import ConfigError, RsbError
from rsb_cluster.weights.resolve import WeightsFile

# Whose versions decide the answer.
_LIBRARIES = ("torch", "torchvision", "timm", "opencv-python-headless", "safetensors")


def check_models(asked: Sequence[tuple[Recipe, WeightsFile | None]]) -> list[int]:
    """Build the models and transforms of recipes, in one process for all that are not known to be good.

    Args:
        asked: Recipes, each with the weights that it starts from.

    Returns:
        Numbers of parameters.

    Raises:
        ConfigError: One cannot be built; each mistake is explained.
    """
    texts = [_what_is_checked(recipe, init) for recipe, init in asked]
    known = _remembered()
    new = {text: pair for text, pair in zip(reversed(texts), reversed(asked), strict=True) if text not in known}
    if new:
        known |= dict(zip(new, _build(list(new.values())), strict=True))
        _remember(known)
    return [known[text] for text in texts]


def _what_is_checked(recipe: Recipe, init: WeightsFile | None) -> str:
    """Name what the check looks at; numbers of the optimizer and schedule are checked by the recipe."""
    plain = recipe.model_dump(include={"model", "init", "data", "augment", "eval"}, mode="json")
    text = json.dumps([plain, recipe.optimizer.name, init.sha256 if init else ""], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _build(asked: Sequence[tuple[Recipe, WeightsFile | None]]) -> list[int]:
    command = [sys.executable, "-m", "rsb_cluster.train.preflight"]
    text = json.dumps([[recipe.model_dump(mode="json"), asdict(init) if init else None] for recipe, init in asked])
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    try:
        answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise RsbError(f"the check of the model did not work:\n{done.stderr.strip()}") from error
    if errors := [answer["error"] for answer in answers if "error" in answer]:
        raise ConfigError("\n".join(dict.fromkeys(errors)))
    return [int(answer["parameters"]) for answer in answers]


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsb-cluster" / "models.json"


def _toolkit() -> str:
    """Name what answers: the libraries' versions, and this package's code as it is in the folder."""
    package = Path(__file__).parents[1]
    code = [(str(path.relative_to(package)), path.stat().st_mtime_ns) for path in sorted(package.rglob("*.py"))]
    text = json.dumps([sys.version, [version(library) for library in _LIBRARIES], code])
    return hashlib.sha256(text.encode()).hexdigest()


def _remembered() -> dict[str, int]:
    try:
        found = json.loads(_file().read_text())
        return {str(key): int(value) for key, value in found["good"].items()} if found["by"] == _toolkit() else {}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # it only saves time


def _remember(good: dict[str, int]) -> None:
    try:
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"by": _toolkit(), "good": good}))
        temporary.replace(file)
    except (OSError, RuntimeError):
        pass
