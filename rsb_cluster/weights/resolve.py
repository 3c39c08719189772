"""Resolves weights to initialise, evaluate or export: the file of a name, and its metadata.

A SOURCE is one of

- a run: its id or a prefix of it, its folder or URL;
- a checkpoint: ``<run>/checkpoints/step-00001200-a0001``;
- a weights file: ``.safetensors``, or torch's ``.pth``, ``.pt``, ``.bin``, ``.ckpt`` (Lightning);
- a folder in the format of timm and the Hugging Face Hub: ``config.json`` and ``model.safetensors``;
- a timm name such as ``resnet50.a1_in1k``, or ``hf-hub:owner/model``: fetched from the hub.

All but the last are resolved without torch. `rsb_cluster.train.conversion.state_dict` reads the files.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.errors import CheckpointError, ConfigError
from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.lookup import find_runs
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from rsb_cluster.subprocesses.helper import ask

log = logging.getLogger(__name__)

FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".pth.tar", ".ckpt")
CONFIG = "config.json"
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which timm looks for them
_MODEL, _EMA = "model.safetensors", "ema.safetensors"  # of a checkpoint


@dataclass(frozen=True)
class WeightsFile:
    """A weights file.

    Attributes:
        source: The resolved SOURCE: a URL, or a name on the hub.
        url: Folder of the file.
        file: The file's name in it.
        sha256: SHA-256 of the file.
        architecture: timm's name of the model; empty if unknown.
        config: timm's ``config.json`` of a folder or a name on the hub.
        run_url: The run that wrote it; empty for other weights.
        step: The step of the run; 0 for other weights.
        is_ema: Whether it is the moving average of a run's weights.
        procedure: The paper's procedure that trained them (``A1``), or ``pytorch``; empty if unknown.
    """

    source: str
    url: str
    file: str
    sha256: str
    architecture: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    run_url: str = ""
    step: int = 0
    is_ema: bool = False
    procedure: str = ""

    def read(self) -> bytes:
        """Return the file's content.

        Raises:
            CheckpointError: Its SHA-256 has changed.
        """
        content = Store(self.url).read_bytes(self.file)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise CheckpointError(
                f"{self.url}/{self.file} does not match its SHA-256, {self.sha256[:12]}…. Copy it again, or use other "
                "weights."
            )
        return content


# By timm's tag of released weights; pytorch: torchvision's first weights; fb: DeiT's for its models.
PROCEDURES = {
    "a1_in1k": "A1", "a2_in1k": "A2", "a3_in1k": "A3", "a1h_in1k": "A1h", "fb_in1k": "DeiT", "tv_in1k": "pytorch",
}  # fmt: skip

Fetch = Callable[[str], WeightsFile]


def fetch_from_hub(name: str) -> WeightsFile:
    """Fetch a timm name from the hub in a subprocess, as this one must not import torch.

    Raises:
        ConfigError: There is no such name, or the hub cannot be reached.
    """
    log.info("fetching the weights %s from the Hugging Face Hub, if they are not in its cache ...", name)
    return WeightsFile(**ask("rsb_cluster.train.conversion.hub", name, doing=f"fetching '{name}'"))


def find_weights(
    source: str, runs_url: str, *, which: str = "last", ema: bool | None = None, fetch: Fetch = fetch_from_hub
) -> WeightsFile:
    """Return the weights file of a SOURCE.

    Args:
        source: See the module.
        runs_url: Folder of runs in which an id is looked up.
        which: The checkpoint of a run: ``last``, ``best``, or a step.
        ema: Whether to use the moving average of a run's weights; None: if the run keeps one.
        fetch: Fetches a timm name.

    Raises:
        ConfigError: The source does not exist, or is ambiguous.
        CheckpointError: The run has no such checkpoint, or it is damaged.
    """
    path = source.removeprefix("local-dir:").rstrip("/")
    if not path:
        raise ConfigError("the name of the weights is empty. Name a run, a file or a timm model.")
    if source.startswith(("hf-hub:", "hf_hub:")):
        return fetch(source)
    if path.endswith(FILE_SUFFIXES) and not Path(path).is_dir():
        return _from_file(path)
    if "/" in path or Path(path).exists():
        store = Store(path)
        if store.exists("spec.json"):
            return _from_run(_run_at(store.url), which, ema)
        if store.exists(checkpoint.MANIFEST):
            return _from_checkpoint(store, ema)
        if store.exists(CONFIG):
            return _from_folder(store)
        if not store.exists():
            raise ConfigError(f"there is nothing at {store.url}. Check the path.")
        raise ConfigError(
            f"{store.url} holds no weights: it is neither a run (spec.json), nor a checkpoint ({checkpoint.MANIFEST}), "
            f"nor a folder written by timm ({CONFIG}), nor a file that ends with {', '.join(FILE_SUFFIXES)}."
        )
    if runs := _known_runs(runs_url, path):
        if len(runs) > 1:
            raise ConfigError(f"'{path}' is a prefix of {len(runs)} runs in {runs_url}. Use a longer prefix.")
        return _from_run(runs[0], which, ema)
    try:
        return fetch(path)
    except ConfigError as error:
        raise ConfigError(
            f"'{path}' is neither a run in {runs_url}, nor a file or folder. As a timm name: {error}"
        ) from error


def initial_weights(recipe: Recipe, runs_url: str) -> WeightsFile | None:
    """Return the initial weights of a recipe; None for random weights.

    Raises:
        ConfigError: They do not exist, have another architecture, or are those of an unfinished run.
    """
    source = recipe.init.weights
    if not source:
        return None
    found = find_weights(source, runs_url)
    if found.architecture and found.architecture != recipe.model.name:
        raise ConfigError(
            f"init.weights = '{source}' is a {found.architecture}, model.name is '{recipe.model.name}'. "
            f"Use --model {found.architecture}, or --init with other weights."
        )
    is_named = Store(source).url == found.source
    if found.run_url and not is_named and _run_at(found.run_url).result() is None:
        raise ConfigError(
            f"init.weights = '{source}': the run has not finished, so its last weights will change. Wait for it, or "
            f"name a checkpoint: --init {found.source}"
        )
    return found


def checkpoints(run: Run) -> list[checkpoint.CheckpointId]:
    """Return the checkpoints of a run's history, oldest first."""
    starts = {attempt.number: attempt.start_step for attempt in run.attempts()}
    return checkpoint.list_checkpoints(run.store.child("checkpoints"), starts)


def _run_at(url: str) -> Run:
    parent, _, run_id = url.rpartition("/")
    return Run.at(parent, run_id)


def _known_runs(runs_url: str, name: str) -> list[Run]:
    try:
        return [run for run in find_runs(runs_url, (name,)) if run.exists()]
    except ConfigError:
        return []


def _from_run(run: Run, which: str, ema: bool | None) -> WeightsFile:
    saved = checkpoints(run)
    if not saved:
        when = "yet" if run.result() is None else "any more: 'runs delete' or somebody removed them"
        raise CheckpointError(f"{run.url} has no checkpoint {when}.")
    if which == "last":
        chosen = saved[-1]
    else:
        if which != "best" and not which.isdecimal():
            raise ConfigError(f"'{which}' is not a checkpoint. Use last, best, or a step.")
        step = _best_step(run, saved[-1]) if which == "best" else int(which)
        of_step = [candidate for candidate in saved if candidate.step == step]
        if not of_step:
            steps = ", ".join(str(candidate.step) for candidate in saved)
            raise CheckpointError(f"{run.url} has no checkpoint of step {step}. It has those of steps {steps}.")
        chosen = of_step[-1]
    return _from_checkpoint(run.store.child("checkpoints", chosen.folder), ema)


def _best_step(run: Run, last: checkpoint.CheckpointId) -> int:
    folder = run.store.child("checkpoints", last.folder)
    file, _ = _files(folder)["progress.json"]
    return int(folder.read_json(file)["best_step"]) or last.step


def _files(store: Store) -> dict[str, tuple[str, str]]:
    """Return the files of a checkpoint, by their name in its manifest: the stored file name, and its SHA-256."""
    try:
        entries = store.read_json(checkpoint.MANIFEST)["files"]
        return {name: (entry["file"], entry["sha256"]) for name, entry in entries.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{store.locate(checkpoint.MANIFEST)} is damaged: {error!r}. Use another checkpoint."
        ) from error


def _from_checkpoint(store: Store, ema: bool | None) -> WeightsFile:
    run_url, _, folder = store.url.rpartition("/checkpoints/")
    saved = checkpoint.CheckpointId.of(folder)
    if not run_url or saved is None:
        raise ConfigError(
            f"{store.url} is not in the folder of a run, which has the recipe. Copy the whole run, and name that."
        )
    run, files = _run_at(run_url), _files(store)
    if ema and _EMA not in files:
        raise ConfigError(f"{run.run_id} keeps no moving average of its weights (train.ema_decay = 0).")
    recipe = run.recipe()
    name = _MODEL if ema is False or _EMA not in files else _EMA
    file, sha256 = files[name]
    return WeightsFile(
        source=store.url,
        url=store.url,
        file=file,
        sha256=sha256,
        architecture=recipe.model.name,
        run_url=run.url,
        step=saved.step,
        is_ema=name == _EMA,
        procedure="" if run.spec().modified else recipe.paper,
    )


def _from_folder(store: Store) -> WeightsFile:
    config = store.read_json(CONFIG)
    file = next((name for name in FOLDER_FILES if store.exists(name)), None)
    if file is None or not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ConfigError(f"{store.url} needs a {CONFIG} with an architecture, and {' or '.join(FOLDER_FILES)}.")
    config = {key: value for key, value in config.items() if value is not None}
    for table in ("pretrained_cfg", "model_args"):
        if not isinstance(config.get(table, {}), dict):
            raise ConfigError(f"{store.locate(CONFIG)}: {table} is no table of names and values.")
    tag = config.get("pretrained_cfg", {}).get("tag", "")
    return WeightsFile(
        source=store.url,
        url=store.url,
        file=file,
        sha256=_sha256(store, file),
        architecture=config["architecture"],
        config=config,
        procedure=PROCEDURES.get(tag, ""),
    )


def _from_file(path: str) -> WeightsFile:
    folder, _, name = Store(path).url.rpartition("/")
    return WeightsFile(f"{folder}/{name}", folder, name, _sha256(Store(folder), name))


def _sha256(store: Store, file: str) -> str:
    sha256 = hashlib.sha256()
    for chunk in store.stream(file):
        sha256.update(chunk)
    return sha256.hexdigest()
