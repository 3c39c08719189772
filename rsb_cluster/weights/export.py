"""Exports a run: a folder that timm loads, with a model card for the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import tomlkit

from rsb_cluster.errors import ConfigError
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from rsb_cluster.subprocesses.helper import ask
from rsb_cluster.weights.model_card import public_recipe, write_card
from rsb_cluster.weights.resolve import CONFIG, WeightsFile, find_weights

log = logging.getLogger(__name__)

RECIPE, CARD = "recipe.toml", "README.md"


def export(
    run: Run, to: Literal["timm", "hf"], dest: str, *, which: str = "last", ema: bool | None = None
) -> WeightsFile:
    """Write a run's weights in timm's format; for the hub with a model card and the recipe.

    Args:
        run: The run.
        to: ``timm``: ``model.safetensors`` and ``config.json``; ``hf``: also ``README.md`` and ``recipe.toml``.
        dest: Folder or URL that does not exist or is empty.
        which: The checkpoint: ``last``, ``best``, or a step.
        ema: Whether to export the moving average of the weights; None: if the run keeps one.

    Returns:
        The exported weights.

    Raises:
        ConfigError: The destination is not empty, or is only read.
        CheckpointError: There is no such checkpoint, or it is damaged.
        StorageError: The destination cannot be written.
    """
    target = Store(dest)
    target.check_not_read_only("weights")
    if target.names() or (target.is_local and not _is_free(Path(target.url))):
        raise ConfigError(f"{target.url} already exists and is not empty. Choose another folder.")
    found = find_weights(run.url, run.runs_url, which=which, ema=ema)
    with _atomic_folder(target) as folder:
        _convert(found, folder)
        if to == "hf":
            recipe = public_recipe(run.recipe()).model_dump(mode="json")
            (folder / RECIPE).write_text(tomlkit.dumps(recipe), encoding="utf-8")
            (folder / CARD).write_text(write_card(run, found), encoding="utf-8")
    return found


def _is_free(path: Path) -> bool:
    """Whether a folder can be created at a path: nothing is there, or an empty folder."""
    if path.is_symlink() or not path.is_dir():
        return not (path.is_symlink() or path.exists())
    return not any(path.iterdir())


@contextlib.contextmanager
def _atomic_folder(target: Store) -> Iterator[Path]:
    """Yield a temporary folder, which becomes the target unless an error is raised.

    In an object store the files are written one by one; config.json, which timm requires, is the last.
    """
    if target.is_local:
        final = Path(target.url)
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.mkdir(parents=True)
            yield temporary
            temporary.rename(final)
        except OSError as error:
            raise ConfigError(f"cannot write {final}: {error.strerror}. Choose another folder.") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return
    with tempfile.TemporaryDirectory(prefix="rsb-export-") as staging:
        yield Path(staging)
        for path in sorted(Path(staging).iterdir(), key=lambda path: path.name == CONFIG):
            target.write_bytes(path.name, path.read_bytes())


def _convert(found: WeightsFile, folder: Path) -> None:
    """Write the weights and their description in a subprocess, as this one must not import torch."""
    request = {"found": asdict(found), "folder": str(folder)}
    log.info("exporting ...")
    ask("rsb_cluster.train.conversion.convert", request, doing="the export")
