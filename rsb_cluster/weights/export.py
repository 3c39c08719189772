"""Giving a run away: a folder that timm loads, with a model card for the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import tomlkit

from rsb_cluster.errors import ConfigError, RsbError
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from rsb_cluster.weights.model_card import write_card
from rsb_cluster.weights.resolve import CONFIG, WeightsFile, find_weights

RECIPE, CARD = "recipe.toml", "README.md"


def export(
    run: Run, to: Literal["timm", "hf"], dest: str, *, which: str = "last", ema: bool | None = None
) -> WeightsFile:
    """Write a run's weights as timm loads them; for the hub with a model card and the recipe.

    Args:
        run: The run.
        to: ``timm``: ``model.safetensors`` and ``config.json``; ``hf``: also ``README.md`` and ``recipe.toml``.
        dest: Folder or URL; new, or empty.
        which: Of its checkpoints the ``last``, the ``best``, or that of a step.
        ema: The moving average of its weights; None: where it has one.

    Returns:
        What was exported.

    Raises:
        ConfigError: The destination is not empty.
        CheckpointError: There is no such checkpoint, or it is damaged.
        StorageError: The destination cannot be written.
    """
    target = Store(dest)
    if target.names() or (target.is_local and not _is_free(Path(target.url))):
        raise ConfigError(f"{target.url} is there already and not empty. Give another folder.")
    found = find_weights(run.url, run.runs_url, which=which, ema=ema)
    with _whole_or_not(target) as folder:
        _convert(found, folder)
        if to == "hf":
            recipe = run.recipe().model_dump(mode="json")
            (folder / RECIPE).write_text(tomlkit.dumps(recipe), encoding="utf-8")
            (folder / CARD).write_text(write_card(run, found), encoding="utf-8")
    return found


def _is_free(path: Path) -> bool:
    """Whether a folder can be put there: where nothing is, or an empty folder."""
    if path.is_symlink() or not path.is_dir():
        return not (path.is_symlink() or path.exists())
    return not any(path.iterdir())


@contextlib.contextmanager
def _whole_or_not(target: Store) -> Iterator[Path]:
    """Give a folder to write in, which becomes the target if nothing goes wrong.

    In an object store the files are written one by one; config.json, without which timm takes it for nothing, is last.
    """
    if target.is_local:
        final = Path(target.url)
        beside = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
        try:
            beside.mkdir(parents=True)
            yield beside
            beside.rename(final)
        except OSError as error:
            raise ConfigError(f"cannot write {final}: {error.strerror}. Give another folder.") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return
    with tempfile.TemporaryDirectory(prefix="rsb-export-") as aside:
        yield Path(aside)
        for path in sorted(Path(aside).iterdir(), key=lambda path: path.name == CONFIG):
            target.write_bytes(path.name, path.read_bytes())


def _convert(found: WeightsFile, folder: Path) -> None:
    """Write the weights and their description, in a process of its own: this one must stay light."""
    asked = json.dumps({"found": asdict(found), "folder": str(folder)})
    command = [sys.executable, "-m", "rsb_cluster.train.conversion.convert"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    try:
        answer: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise RsbError(f"the export did not work:\n{done.stderr.strip()}") from error
    if "error" in answer:
        raise RsbError(answer["error"])
