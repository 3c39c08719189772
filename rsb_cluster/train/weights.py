"""Weights from anywhere: a run, a checkpoint, a file, a folder of timm's, or a name that timm downloads.

All become the same thing: a timm architecture, its tensors, and how images have to look for them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pickle import UnpicklingError
from typing import Any, cast

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import clean_state_dict
from torch import Tensor, nn

from rsb_cluster import checkpoint
from rsb_cluster.checkpoint import MANIFEST, Saved
from rsb_cluster.data.index import load_index
from rsb_cluster.errors import CheckpointError, ConfigError, RsbError, StorageError, did_you_mean
from rsb_cluster.recipe import Eval, Recipe
from rsb_cluster.run import Run, find_runs, list_folders
from rsb_cluster.storage import Store
from rsb_cluster.train.state import from_files

FILES = (".safetensors", ".pth", ".pt", ".bin")
CONFIG = "config.json"
_TIMM_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Weights:
    """Tensors, and what one must know to use them.

    Attributes:
        name: What they are called: a run's id, timm's name, a file's or a folder's.
        architecture: timm's name of the network, without a tag.
        tensors: Its state dict, on the CPU.
        num_classes: Outputs of its classifier.
        eval: How timm, or the run's recipe, evaluates them.
        mean: Of the red, green and blue of the images they were trained on, of 1.
        std: Likewise.
        kwargs: Further arguments of ``timm.create_model``.
        classes: Names of the classes 0, 1, ...; empty where they are not known.
        url: Where they come from; empty for what timm downloads.
        tag: timm's tag of pretrained weights, such as ``a1_in1k``.
        run: The run, where they are one's.
        recipe: Its recipe.
        step: Its optimizer steps.
    """

    name: str
    architecture: str
    tensors: Mapping[str, Tensor]
    num_classes: int
    eval: Eval
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    url: str = ""
    tag: str = ""
    run: Run | None = None
    recipe: Recipe | None = None
    step: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the tensors' names, types, shapes and bytes."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def build(self) -> nn.Module:
        """Return the network with these weights.

        Raises:
            ConfigError: They are not those of the architecture.
        """
        try:
            model: nn.Module = timm.create_model(self.architecture, num_classes=self.num_classes, **self.kwargs)
            model.load_state_dict(self.tensors)
        except (TypeError, RuntimeError) as error:
            lines = str(error).splitlines()
            raise ConfigError(
                f"{self.name}: these are no weights of {self.architecture}: {' '.join(lines[:2])[:300]} "
                "Name the right architecture with --model."
            ) from error
        return model


def load_weights(source: str, *, runs: str = "", model: str = "", ema: bool = False) -> Weights:
    """Find and read weights.

    Args:
        source: A run's id, folder or URL; a checkpoint's folder; a weight file (.safetensors, .pth); a folder of
            timm's (config.json and model.safetensors); or a name of timm's, which is downloaded (``resnet50.a1_in1k``).
        runs: The folder of runs, for ids.
        model: The architecture of a weight file; such a file does not say it.
        ema: Take a run's moving average.

    Raises:
        ConfigError: There is nothing of that name, or it is not said what it is.
        CheckpointError: A run has no weights yet, or they are damaged.
        StorageError: It could not be read.
    """
    if source.endswith(FILES):
        return _from_file(source, model)
    store = Store(source)
    if "/" in source or store.is_local:
        for name, read in (
            ("spec.json", lambda: _from_run(Run(store, store.url.rpartition("/")[2]), None, ema)),
            (MANIFEST, lambda: _from_checkpoint(store, ema)),
            (CONFIG, lambda: _from_timm_folder(store)),
        ):
            if store.exists(name):
                return read()
    if "/" not in source and any(run.run_id.startswith(source) for run in list_folders(runs)):
        found = find_runs(runs, (source,))
        if len(found) > 1:
            raise ConfigError(f"'{source}' is the beginning of {len(found)} runs. Say more of the one you mean.")
        return _from_run(found[0], None, ema)
    if timm.is_model(source):
        return _from_timm(source)
    known = [run.run_id for run in list_folders(runs)] + timm.list_models(pretrained=True)
    raise ConfigError(
        f"'{source}' is no run in {Store(runs).url}, no file or folder with weights, and no model of timm's."
        f"{did_you_mean(source, known)}"
    )


# --- runs ---------------------------------------------------------------------------------------------------------


def _from_run(run: Run, saved: Saved | None, ema: bool) -> Weights:
    recipe, folder = run.recipe(), run.store.child("checkpoints")
    if saved is None:
        listed = checkpoint.listed(folder, {attempt.number: attempt.start_step for attempt in run.attempts()})
        if not listed:
            raise CheckpointError(f"{run.url} has no checkpoint yet. 'rsb-cluster status' tells how far it is.")
        saved = listed[-1]
    _, tensors = from_files(checkpoint.read(folder, saved), torch.device("cpu"))
    if ema and "ema" not in tensors:
        raise ConfigError(f"{run.run_id} keeps no moving average of its weights (train.ema_decay = 0).")
    return Weights(
        name=run.run_id,
        architecture=recipe.model.name,
        tensors=tensors["ema" if ema else "model"],
        num_classes=recipe.data.num_classes,
        eval=recipe.eval,
        mean=recipe.data.mean,
        std=recipe.data.std,
        kwargs=recipe.model.kwargs,
        classes=_classes_of(run),
        url=folder.locate(saved.folder),
        run=run,
        recipe=recipe,
        step=saved.step,
    )


def _from_checkpoint(store: Store, ema: bool) -> Weights:
    parent, _, name = store.url.rpartition("/")
    saved, run_url = Saved.of(name), parent.removesuffix("/checkpoints")
    if saved is None or run_url == parent:
        raise ConfigError(f"{store.url} is not in a run's folder, which would say what it is. Name the run.")
    return _from_run(Run(Store(run_url), run_url.rpartition("/")[2]), saved, ema)


def _classes_of(run: Run) -> tuple[str, ...]:
    """Return the names of the classes, where the data is still there and is the data that the run was trained on."""
    spec = run.spec()
    try:
        index = load_index(Store(spec.data).child("train"))
    except RsbError:
        return ()
    return index.classes if index.digest == spec.train_digest else ()


# --- files and names ----------------------------------------------------------------------------------------------


def _from_file(url: str, model: str) -> Weights:
    if not model:
        raise ConfigError(f"{url} does not say what network its weights are for. Add --model, with timm's name of it.")
    _check_name(model)
    folder, _, name = Store(url).url.rpartition("/")
    tensors = _tensors(Store(folder), name)
    blank = _blank(model, {})
    return _as_timm(name.rpartition(".")[0], model, tensors, _outputs(blank, tensors), blank.pretrained_cfg, url=url)


def _from_timm_folder(store: Store) -> Weights:
    try:
        said = store.read_json(CONFIG)
        architecture, config = str(said["architecture"]), dict(said["pretrained_cfg"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{store.locate(CONFIG)} is not one of timm's: {error!r}.") from error
    _check_name(architecture)
    file = next((name for name in _TIMM_FILES if store.exists(name)), None)
    if file is None:
        raise ConfigError(f"there is neither of {' and '.join(_TIMM_FILES)} in {store.url}.")
    tensors, kwargs = _tensors(store, file), dict(said.get("model_args") or {})
    return _as_timm(
        store.url.rpartition("/")[2],
        architecture,
        tensors,
        int(said.get("num_classes") or _outputs(_blank(architecture, kwargs), tensors)),
        config,
        kwargs=kwargs,
        classes=tuple(config.get("label_names") or said.get("label_names") or ()),
        url=store.url,
        tag=str(config.get("tag") or ""),
    )


def _from_timm(name: str) -> Weights:
    try:
        made = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the hub's client, its network and its cache may raise
        raise StorageError(
            f"timm could not get the weights '{name}': {str(error).splitlines()[0][:200]} They are downloaded from the "
            "model hub once. Give a weight file with --model instead where this machine has no way to it."
        ) from error
    config = cast(dict[str, Any], made.pretrained_cfg)
    architecture, tag = config["architecture"], str(config.get("tag") or "")
    full = f"{architecture}.{tag}" if tag else architecture
    return _as_timm(full, architecture, made.state_dict(), int(cast(Any, made).num_classes), config, tag=tag)


def _as_timm(name: str, model: str, tensors: Mapping[str, Tensor], outputs: int, config: Any, **known: Any) -> Weights:
    found = resolve_data_config(pretrained_cfg=dict(config))
    if found["interpolation"] not in ("bicubic", "bilinear"):
        found["interpolation"] = "bicubic"
    return Weights(
        name=name,
        architecture=model,
        tensors=tensors,
        num_classes=outputs,
        eval=Eval(resolution=found["input_size"][-1], crop=found["crop_pct"], interpolation=found["interpolation"]),
        mean=found["mean"],
        std=found["std"],
        **known,
    )


def _check_name(model: str) -> None:
    if not timm.is_model(model):
        raise ConfigError(f"timm has no model '{model}'.{did_you_mean(model, timm.list_models())}")


def _blank(model: str, kwargs: Mapping[str, Any]) -> Any:
    with torch.device("meta"):
        return timm.create_model(model, **kwargs)


def _outputs(blank: Any, tensors: Mapping[str, Tensor]) -> int:
    """Return how many classes a state dict's classifier has."""
    heads = blank.pretrained_cfg.get("classifier")
    head = heads if isinstance(heads, str) else next(iter(heads or ("",)))
    weight = tensors.get(f"{head}.weight")
    return int(blank.num_classes if weight is None else weight.shape[0])


def _tensors(store: Store, name: str) -> dict[str, Tensor]:
    """Read a state dict. Nothing is ever unpickled but tensors and plain containers."""
    content = store.read_bytes(name)
    try:
        if name.endswith(".safetensors"):
            return safetensors.torch.load(content)
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            found = found.get(key, found)
        return dict(clean_state_dict(found))
    except (SafetensorError, ValueError, RuntimeError, AttributeError, UnpicklingError) as error:
        first = str(error).splitlines()[0][:200]
        raise CheckpointError(f"{store.locate(name)} holds no weights that can be read: {first}") from error
