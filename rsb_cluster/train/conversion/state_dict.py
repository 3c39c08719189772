"""Reads files of weights and fits them to a model, without unpickling arbitrary objects."""

from __future__ import annotations

import argparse
import inspect
import io
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pickle import UnpicklingError
from typing import Any, Literal

import safetensors
import safetensors.torch
import timm
import torch
from timm.data import resolve_data_config
from timm.models import clean_state_dict, model_entrypoint
from torch import Tensor, nn

from rsb_cluster.config.recipe import Eval, Recipe
from rsb_cluster.data.index import load_index
from rsb_cluster.data.subset import choose_classes
from rsb_cluster.errors import CheckpointError, ConfigError, RsbError, did_you_mean
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train.conversion.hub import fetch
from rsb_cluster.weights.damage import cut_off, damage, describe, first_line, is_safetensors, refused_object
from rsb_cluster.weights.resolve import WeightsFile, find_weights

Head = Literal["auto", "replace"]

# Keys of the weights in the checkpoints of training scripts, in timm's order.
_EMA_KEYS = ("state_dict_ema", "model_ema")
_KEYS = (*_EMA_KEYS, "state_dict", "model", "model_state_dict")


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights, and the configuration to use them.

    Attributes:
        found: The file, and its source.
        architecture: timm's name of the network, without a tag.
        tensors: The state dict, on the CPU.
        num_classes: Outputs of the classifier.
        eval: The evaluation settings of the run's recipe, or of timm.
        mean: Mean of each channel (RGB) of the training images, on a scale of 0 to 1.
        std: Standard deviation of each channel, likewise.
        said_by: What says ``mean`` and ``std``; what is absent is timm's default for the architecture.
        kwargs: Further arguments of ``timm.create_model``.
        classes: Names of the classes 0, 1, ...; empty if they are unknown.
        tag: timm's tag of pretrained weights, such as ``a1_in1k``.
        entries: The state dicts that the file holds by a name (``model_ema``), the one that is taken by default first.
        entry: The one that was taken; empty for a file that is one.
        run: The run that trained the weights, if any.
        recipe: Its recipe.
    """

    found: WeightsFile
    architecture: str
    tensors: Mapping[str, Tensor]
    num_classes: int
    eval: Eval
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    said_by: Mapping[str, str] = field(default_factory=dict)
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    tag: str = ""
    entries: tuple[str, ...] = ()
    entry: str = ""
    run: Run | None = None
    recipe: Recipe | None = None

    @property
    def name(self) -> str:
        """Name of the weights: the id of the run, timm's name, or the name of the file or folder."""
        return self.run.run_id if self.run else self.found.source.rpartition("/")[2]

    @property
    def url(self) -> str:
        """Source of the weights: a checkpoint, file or folder; a name if timm fetched them."""
        return self.found.source

    @property
    def is_ema(self) -> bool:
        """Whether they are a moving average."""
        return self.found.is_ema or self.entry in _EMA_KEYS

    @property
    def step(self) -> int:
        """Optimizer steps of the run; 0 for other weights."""
        return self.found.step

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the file."""
        return self.found.sha256

    def build(self) -> nn.Module:
        """Return the network with these weights, in evaluation mode.

        Raises:
            ConfigError: The weights do not fit the architecture.
        """
        model: nn.Module = _create(self.architecture, {**self.kwargs, "num_classes": self.num_classes})
        model.load_state_dict(fit_weights(model, self.tensors, self.architecture, self.url).tensors)
        return model.eval()


@dataclass(frozen=True, eq=False)
class FittedWeights:
    """A complete state dict for a model, made of weights and of the model's own tensors.

    Attributes:
        tensors: The state dict.
        new: Names of the model's own tensors: those of a new classifier.
        resized: Names of the tensors that were interpolated for another resolution.
    """

    tensors: Mapping[str, Tensor]
    new: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()


def load_weights(
    source: str, *, runs: str = "", model: str = "", ema: bool | None = False, which: str = "last"
) -> Weights:
    """Find and read weights; `rsb_cluster.weights.resolve` defines the kinds of sources.

    Args:
        source: A run, checkpoint, file, folder, or timm's name of weights.
        runs: The folder of runs, for ids.
        model: The architecture of a file that does not name it.
        ema: For a run: whether to read its moving average; None: if it has one.
        which: For a run: its ``last`` checkpoint, the ``best``, or that of a step.

    Raises:
        ConfigError: The source does not exist, or its architecture is unknown.
        CheckpointError: The run has no weights yet, or they are damaged.
        StorageError: The file could not be read.
    """
    return read_weights(find_weights(source, runs, which=which, ema=ema, fetch=fetch), model)


def read_weights(found: WeightsFile, model: str = "", ema: bool | None = None) -> Weights:
    """Read a file of weights and their configuration.

    Args:
        found: The file.
        model: The architecture, if the file does not name it.
        ema: For a file of no run: whether to read the moving average in it; None: if it has one.

    Raises:
        ConfigError: The architecture is unknown, or the file has no such weights.
        CheckpointError: The weights are damaged.
    """
    name = found.architecture or model
    if not name:
        raise ConfigError(
            f"{found.source} does not name the network of its weights. Add --model, with timm's name of the network."
        )
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model '{name}'.{did_you_mean(name, timm.list_models())}")
    if found.run_url:
        return _from_run(found, parse(found.read(), found))
    state = _parse(found.read(), found, ema)
    try:
        weights = _from_timm(found, name, state.tensors)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        if not found.config:
            raise
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"the config.json of {found.source} has values that timm does not take: {said}.") from error
    return replace(weights, entries=state.entries, entry=state.entry)


def parse(content: bytes, found: WeightsFile) -> dict[str, Tensor]:
    """Return the tensors in a file of weights, by name; the moving average if it has one.

    Raises:
        CheckpointError: The file has no state dict, or objects that are not tensors or plain values; or it holds NaN.
    """
    return _parse(content, found, None).tensors


@dataclass(frozen=True, eq=False)
class _StateDict:
    tensors: dict[str, Tensor]
    entries: tuple[str, ...] = ()  # the state dicts of the file by name, in the order in which they are taken
    entry: str = ""


def _parse(content: bytes, found: WeightsFile, ema: bool | None) -> _StateDict:
    path = f"{found.url}/{found.file}"
    if problem := damage(content):
        raise CheckpointError(f"{path} {problem}")
    try:
        if is_safetensors(content):
            loaded: Any = safetensors.torch.load(content)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # a plain container in timm's own checkpoints
                loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be read as weights without executing code in it: it holds {refused_object(error)}. "
            "Save only the state dict, as .safetensors."
        ) from error
    except Exception as error:  # whatever the bytes of a damaged file lead to
        if isinstance(error, EOFError | IndexError | struct.error) or "unexpected EOF" in str(error):
            raise CheckpointError(f"{path} {cut_off(content)}") from error
        if "TorchScript" in str(error):  # torch's message is how to execute it
            raise CheckpointError(f"{path} is a TorchScript program. Save only its state dict.") from error
        raise CheckpointError(f"{path} cannot be read as weights: {first_line(error)}. Use other weights.") from error
    entries = tuple(key for key in _KEYS if isinstance(loaded.get(key), dict)) if isinstance(loaded, dict) else ()
    chosen = entries if ema is None else tuple(key for key in entries if (key in _EMA_KEYS) == ema)
    if ema is not None and not chosen and (ema or entries):
        raise ConfigError(
            f"{path} has {'no moving average of its weights' if ema else 'only a moving average of its weights'}: "
            f"it holds {' and '.join(entries) or 'one state dict'}. Omit {'--ema' if ema else '--no-ema'}."
        )
    if chosen:
        loaded = loaded[chosen[0]]
    if not isinstance(loaded, dict) or not loaded or not all(map(_is_named_tensor, loaded.items())):
        raise CheckpointError(
            f"{path} has no state dict, which maps names to tensors, nor one as {', '.join(_KEYS)}: it holds "
            f"{describe(loaded)}. Save only the state dict, as .safetensors."
        )
    tensors: dict[str, Tensor] = clean_state_dict(loaded)
    tensors.pop("n_averaged", None)  # of torch's AveragedModel
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.is_quantized or tensor.is_complex() or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{path}: the tensor '{name}' is not stored as plain numbers, but meta, quantized, complex or sparse. "
                "Save the weights as floating point numbers."
            )
        if tensor.is_floating_point() and tensor.isnan().any():
            raise CheckpointError(f"{path}: the tensor '{name}' holds NaN: its training diverged. Use other weights.")
    return _StateDict(tensors, entries, chosen[0] if chosen else "")


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _without_prefix(tensors: Mapping[str, Tensor], own: Collection[str]) -> Mapping[str, Tensor]:
    """Remove the prefix that all names share (``model.`` in a Lightning module), if that gives names of the model."""
    short = tensors
    while not any(name in own for name in short):
        prefixes = {name.partition(".")[0] for name in short}
        short = {name.partition(".")[2]: tensor for name, tensor in short.items()}
        if len(prefixes) != 1 or "" in short:
            return tensors
    return short


def fit_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], architecture: str, source: str, head: Head = "auto"
) -> FittedWeights:
    """Fit weights to a model: convert them as timm does, and resize them for another resolution.

    Args:
        model: A model of the architecture; it may be on torch's meta device.
        tensors: The weights.
        architecture: timm's name of the architecture.
        source: Source of the weights, for messages.
        head: ``auto``: the classifier is kept if the number of classes is the same; ``replace``: it is not.

    Raises:
        ConfigError: A tensor is missing, unknown, or of another shape.
    """
    own: dict[str, Tensor] = model.state_dict()
    tensors = _without_prefix(tensors, own)
    try:
        converted = _convert(tensors, model, architecture)
    except (KeyError, IndexError, RuntimeError, ValueError, AttributeError, AssertionError) as error:
        raise ConfigError(f"{source}: timm cannot read it as {architecture}: {error!r}.") from error
    classifiers = _classifiers(model)
    old_head = {key for key in converted if key.rpartition(".")[0] in classifiers}
    own_head = {key for key in own if key.rpartition(".")[0] in classifiers}
    same = old_head == own_head and all(converted[key].shape == own[key].shape for key in own_head)
    new = set() if same and head == "auto" else own_head
    if new:
        converted = {key: value for key, value in converted.items() if key not in old_head}
    wrong = [
        [f"{key} is missing" for key in own if key not in converted and key not in new],
        [f"{key} is not in the model" for key in converted if key not in own],
        [
            f"{key} has the shape {tuple(value.shape)} and not {tuple(own[key].shape)}"
            for key, value in converted.items()
            if key in own and value.shape != own[key].shape
        ],
        [
            f"{key} has integers ({value.dtype})"
            for key, value in converted.items()
            if key in own and own[key].is_floating_point() and not value.is_floating_point()
        ],
    ]
    if any(wrong):
        shown = [text for kind in wrong for text in kind[:2]]  # of each kind, as the names tell of other prefixes
        more = f"; and {hidden} more" if (hidden := sum(map(len, wrong)) - len(shown)) else ""
        raise ConfigError(f"{source} does not fit {architecture}: {'; '.join(shown)}{more}.")
    resized = tuple(key for key in converted if key in tensors and tensors[key].shape != converted[key].shape)
    return FittedWeights({key: own[key] if key in new else converted[key] for key in own}, tuple(sorted(new)), resized)


def _create(architecture: str, kwargs: Mapping[str, Any]) -> Any:
    try:
        return timm.create_model(architecture, **kwargs)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"timm cannot build {architecture} with {dict(kwargs)}: {error}.") from error


def _classifiers(model: Any) -> tuple[str, ...]:
    """Return the names of a timm model's classifiers: one, or two for a distilled model."""
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _convert(tensors: Mapping[str, Tensor], model: nn.Module, architecture: str) -> dict[str, Tensor]:
    """Apply timm's conversion of old names, and of position embeddings for another number of patches."""
    module = inspect.getmodule(model_entrypoint(architecture))
    convert: Callable[..., dict[str, Tensor]] | None = getattr(module, "checkpoint_filter_fn", None)
    return dict(tensors) if convert is None else convert(dict(tensors), model)


def _from_run(found: WeightsFile, tensors: Mapping[str, Tensor]) -> Weights:
    run = Run.at(*found.run_url.rsplit("/", 1))
    recipe = run.recipe()
    return Weights(
        found,
        recipe.model.name,
        tensors,
        recipe.data.num_classes,
        recipe.eval,
        recipe.data.mean,
        recipe.data.std,
        dict.fromkeys(("mean", "std"), "the run's recipe"),
        kwargs=recipe.model.kwargs,
        classes=_class_names(run),
        run=run,
        recipe=recipe,
    )


def _class_names(run: Run) -> tuple[str, ...]:
    """Return the names of the classes, if the run's training data is still there and unchanged."""
    try:
        store = Store(run.data_url()).child("train")
        index = choose_classes(load_index(store), run.recipe().data.classes, store.url)
    except RsbError:
        return ()
    return index.classes if index.has_digest(run.spec().train_digest) else ()


def _from_timm(found: WeightsFile, architecture: str, tensors: Mapping[str, Tensor]) -> Weights:
    """Return weights with the settings of their config.json, and timm's defaults for the architecture."""
    kwargs = dict(found.config.get("model_args") or {})
    with torch.device("meta"):
        blank = _create(architecture, kwargs)
    tensors = _without_prefix(tensors, blank.state_dict())
    stated = {key: value for key, value in found.config.get("pretrained_cfg", {}).items() if value is not None}
    config = {**blank.pretrained_cfg, **stated}
    data = resolve_data_config(pretrained_cfg=config)
    if data["interpolation"] not in ("bicubic", "bilinear"):
        data["interpolation"] = "bicubic"
    weight = tensors.get(f"{next(iter(_classifiers(blank)), '')}.weight")
    outputs = found.config.get("num_classes") or blank.num_classes if weight is None else weight.shape[0]
    names = found.config.get("label_names") or stated.get("label_names") or ()
    return Weights(
        found,
        architecture,
        tensors,
        int(outputs),
        Eval(resolution=data["input_size"][-1], crop=data["crop_pct"], interpolation=data["interpolation"]),
        tuple(data["mean"]),
        tuple(data["std"]),
        {name: f"the settings of {found.source}" for name in ("mean", "std") if name in stated},
        kwargs=kwargs,
        classes=tuple(names.values() if isinstance(names, dict) else names),
        tag=str(stated.get("tag") or ""),
    )
