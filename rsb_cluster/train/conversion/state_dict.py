"""What is inside a file of weights, and how it gets into a model. Nothing is ever unpickled."""

from __future__ import annotations

import argparse
import inspect
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from rsb_cluster.errors import CheckpointError, ConfigError, RsbError, did_you_mean
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train.conversion.hub import fetch
from rsb_cluster.weights.resolve import WeightsFile, find_weights

Head = Literal["auto", "replace"]

# Where training scripts put the weights in their checkpoints; timm's order.
_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")


@dataclass(frozen=True, eq=False)
class Weights:
    """Tensors, and what one must know to use them.

    Attributes:
        found: The file, and where it comes from.
        architecture: timm's name of the network, without a tag.
        tensors: Its state dict, on the CPU.
        num_classes: Outputs of its classifier.
        eval: How the run's recipe, or timm, evaluates them.
        mean: Of the red, green and blue of the images they were trained on, of 1.
        std: Likewise.
        kwargs: Further arguments of ``timm.create_model``.
        classes: Names of the classes 0, 1, ...; empty where they are not known.
        tag: timm's tag of pretrained weights, such as ``a1_in1k``.
        run: The run, where they are one's.
        recipe: Its recipe.
    """

    found: WeightsFile
    architecture: str
    tensors: Mapping[str, Tensor]
    num_classes: int
    eval: Eval
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    tag: str = ""
    run: Run | None = None
    recipe: Recipe | None = None

    @property
    def name(self) -> str:
        """What they are called: a run's id, timm's name, a file's or a folder's."""
        return self.run.run_id if self.run else self.found.source.rpartition("/")[2]

    @property
    def url(self) -> str:
        """Where they come from: a checkpoint, file or folder; a name where timm fetched them."""
        return self.found.source

    @property
    def step(self) -> int:
        """The run's optimizer steps; 0 for others."""
        return self.found.step

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the file."""
        return self.found.sha256

    def build(self) -> nn.Module:
        """Return the network with these weights, in evaluation mode.

        Raises:
            ConfigError: They are not those of the architecture.
        """
        model: nn.Module = _create(self.architecture, {**self.kwargs, "num_classes": self.num_classes})
        model.load_state_dict(fit_weights(model, self.tensors, self.architecture, self.url).tensors)
        return model.eval()


@dataclass(frozen=True, eq=False)
class FittedWeights:
    """What a model takes, made of weights and of what it has itself.

    Attributes:
        tensors: All of the model's.
        new: Names of those that are the model's own: a new classifier's.
        resized: Names of those that were interpolated for another resolution.
    """

    tensors: Mapping[str, Tensor]
    new: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()


def load_weights(
    source: str, *, runs: str = "", model: str = "", ema: bool | None = False, which: str = "last"
) -> Weights:
    """Find and read weights; `rsb_cluster.weights.resolve` says what a source is.

    Args:
        source: A run, checkpoint, file, folder, or a name of timm's.
        runs: The folder of runs, for ids.
        model: The architecture of a weight file; such a file does not say it.
        ema: Of a run: its moving average; None: where it has one.
        which: Of a run: its ``last`` checkpoint, the ``best``, or that of a step.

    Raises:
        ConfigError: There is nothing of that name, or it is not said what it is.
        CheckpointError: A run has no weights yet, or they are damaged.
        StorageError: It could not be read.
    """
    return read_weights(find_weights(source, runs, which=which, ema=ema, fetch=fetch), model)


def read_weights(found: WeightsFile, model: str = "") -> Weights:
    """Read a file of weights, and put together what is known of them.

    Args:
        found: The file.
        model: The architecture, where nothing else says it.
    """
    name = found.architecture or model
    if not name:
        raise ConfigError(
            f"{found.source} does not say what network its weights are for. Add --model, with timm's name of it."
        )
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model '{name}'.{did_you_mean(name, timm.list_models())}")
    tensors = parse(found.read(), found)
    return _of_run(found, tensors) if found.run_url else _of_timm(found, name, tensors)


def parse(content: bytes, found: WeightsFile) -> dict[str, Tensor]:
    """Return the tensors in a file of weights, by name.

    Raises:
        CheckpointError: It holds something else, or more than tensors and plain values.
    """
    where = f"{found.url}/{found.file}"
    try:
        if found.file.endswith(".safetensors"):
            return safetensors.torch.load(content)
        with torch.serialization.safe_globals([argparse.Namespace]):  # in timm's own checkpoints; a plain container
            loaded: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        first = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(
            f"{where} holds no weights that can be read without running what is in it: {first} "
            "Save the state dict alone, as .safetensors."
        ) from error
    if isinstance(loaded, dict):
        loaded = next((loaded[key] for key in _KEYS if isinstance(loaded.get(key), dict)), loaded)
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{where} holds no state dict, which is names and a tensor each.")
    tensors: dict[str, Tensor] = clean_state_dict(loaded)
    return tensors


def fit_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], architecture: str, source: str, head: Head = "auto"
) -> FittedWeights:
    """Return weights as a model takes them: converted by timm, and resized for another resolution.

    Args:
        model: Of the same architecture; it may be on torch's meta device.
        tensors: The weights.
        architecture: timm's name of it.
        source: Where the weights come from, for messages.
        head: ``auto``: a classifier of the same number of classes is kept; ``replace``: none is.

    Raises:
        ConfigError: A tensor is missing, too many, or of another shape; it is named.
    """
    own: dict[str, Tensor] = model.state_dict()
    try:
        given = _converted(tensors, model, architecture)
    except (KeyError, IndexError, RuntimeError, ValueError, AttributeError, AssertionError) as error:
        raise ConfigError(f"{source}: timm cannot read it as {architecture}: {error!r}.") from error
    classifiers = _classifiers(model)
    given_head = {key for key in given if key.rpartition(".")[0] in classifiers}
    own_head = {key for key in own if key.rpartition(".")[0] in classifiers}
    same = given_head == own_head and all(given[key].shape == own[key].shape for key in own_head)
    new = set() if same and head == "auto" else own_head
    if new:
        given = {key: value for key, value in given.items() if key not in given_head}
    wrong = [f"{key} is missing" for key in own if key not in given and key not in new]
    wrong += [f"{key} is not in the model" for key in given if key not in own]
    wrong += [
        f"{key} has the shape {tuple(value.shape)} and not {tuple(own[key].shape)}"
        for key, value in given.items()
        if key in own and value.shape != own[key].shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ConfigError(f"{source} does not fit {architecture}: {'; '.join(wrong[:5])}{more}.")
    resized = tuple(key for key in given if key in tensors and tensors[key].shape != given[key].shape)
    return FittedWeights({key: own[key] if key in new else given[key] for key in own}, tuple(sorted(new)), resized)


def _create(architecture: str, kwargs: Mapping[str, Any]) -> Any:
    try:
        return timm.create_model(architecture, **kwargs)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"timm cannot build {architecture} with {dict(kwargs)}: {error}.") from error


def _classifiers(model: Any) -> tuple[str, ...]:
    """Return the names of a timm model's classifiers: one, or two where it was distilled."""
    named = model.pretrained_cfg.get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _converted(tensors: Mapping[str, Tensor], model: nn.Module, architecture: str) -> dict[str, Tensor]:
    """Do what timm does to weights that it fetches: old names, position embeddings for another number of patches."""
    module = inspect.getmodule(model_entrypoint(architecture))
    convert: Callable[..., dict[str, Tensor]] | None = getattr(module, "checkpoint_filter_fn", None)
    return dict(tensors) if convert is None else convert(dict(tensors), model)


def _of_run(found: WeightsFile, tensors: Mapping[str, Tensor]) -> Weights:
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
        kwargs=recipe.model.kwargs,
        classes=_classes_of(run),
        run=run,
        recipe=recipe,
    )


def _classes_of(run: Run) -> tuple[str, ...]:
    """Return the names of the classes, where the data is still there and is the data that the run was trained on."""
    spec = run.spec()
    try:
        index = load_index(Store(spec.data).child("train"))
    except RsbError:
        return ()
    return index.classes if index.digest == spec.train_digest else ()


def _of_timm(found: WeightsFile, architecture: str, tensors: Mapping[str, Tensor]) -> Weights:
    """Return weights with what their config.json says, or timm by default says, of the architecture."""
    kwargs = dict(found.config.get("model_args") or {})
    with torch.device("meta"):
        blank = _create(architecture, kwargs)
    stated = {key: value for key, value in found.config.get("pretrained_cfg", {}).items() if value is not None}
    config = {**blank.pretrained_cfg, **stated}
    seen = resolve_data_config(pretrained_cfg=config)
    if seen["interpolation"] not in ("bicubic", "bilinear"):
        seen["interpolation"] = "bicubic"
    weight = tensors.get(f"{next(iter(_classifiers(blank)), '')}.weight")
    outputs = found.config.get("num_classes") or blank.num_classes if weight is None else weight.shape[0]
    names = found.config.get("label_names") or stated.get("label_names") or ()
    return Weights(
        found,
        architecture,
        tensors,
        int(outputs),
        Eval(resolution=seen["input_size"][-1], crop=seen["crop_pct"], interpolation=seen["interpolation"]),
        tuple(seen["mean"]),
        tuple(seen["std"]),
        kwargs=kwargs,
        classes=tuple(names.values() if isinstance(names, dict) else names),
        tag=str(stated.get("tag") or ""),
    )
