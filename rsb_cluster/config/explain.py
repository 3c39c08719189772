"""Says what is wrong in a user's file, and which key was probably meant."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rsb_cluster.errors import did_you_mean

# What other programs call a field.
OTHER_NAMES = {
    "learning_rate": "optimizer.lr", "base_lr": "optimizer.lr", "wd": "optimizer.weight_decay", "opt": "optimizer.name",
    "batch_size": "train.global_batch", "batch": "train.global_batch", "global_batch_size": "train.global_batch",
    "num_epochs": "schedule.epochs", "max_epochs": "schedule.epochs", "warmup": "schedule.warmup_epochs",
    "sched": "schedule.name", "image_size": "augment.resolution", "img_size": "augment.resolution",
    "dropout": "model.drop_rate", "drop_path": "model.drop_path_rate", "label_smoothing": "loss.smoothing",
    "precision": "train.amp", "aa": "augment.rand_augment", "reprob": "augment.erase_prob",
    "pretrained": "init.weights", "dataset": "data.set",
    "gpus": "gpus_per_node", "num_gpus": "gpus_per_node", "time": "time_min", "time_limit": "time_min",
    "walltime": "time_min", "mem": "mem_gb", "memory": "mem_gb", "cpus": "cpus_per_task",
    "workers": "loader_workers", "num_workers": "loader_workers", "modules": "setup",
    "partition": "slurm.partition", "account": "slurm.account", "qos": "slurm.qos",
    "constraint": "slurm.constraint", "reservation": "slurm.reservation", "nodelist": "slurm.nodelist",
    "spot": "cloud.spot", "accelerators": "cloud.accelerators",
}  # fmt: skip

_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_BOUNDS = {
    "greater_than_equal": ("≥", "ge"), "greater_than": (">", "gt"),
    "less_than_equal": ("≤", "le"), "less_than": ("<", "lt"),
}  # fmt: skip
# Errors that the description of the field explains better than pydantic does.
_OF_THE_VALUE = (
    "_type", "_parsing", "_from_float", "greater_than", "greater_than_equal", "less_than", "less_than_equal",
    "literal_error", "missing", "too_long", "bool_as_number", "finite_number", "_size",
)  # fmt: skip


def explain(kind: type[BaseModel], error: Mapping[str, Any], where: str) -> str:
    """Return a line that says what is wrong with a value.

    Args:
        kind: The model that was validated.
        error: One of pydantic's errors.
        where: The file.
    """
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key '{location}'.{suggest_key(location, kind)}"
    field, depth = _field(kind, error["loc"])
    if error["type"] == "missing" and depth == len(error["loc"]):
        return f"{where}: '{location}' is missing. It must be set."
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}."
    if error["type"] in _BOUNDS and depth < len(error["loc"]):  # of an element of a list
        sign, name = _BOUNDS[error["type"]]
        return f"{where}: {location} = {error['input']!r}: must be {sign} {_number(error['ctx'][name])}."
    named = ".".join(str(part) for part in error["loc"][:depth])
    expected = _expected(field, named) if field is not None and error["type"].endswith(_OF_THE_VALUE) else ""
    if expected:
        return f"{where}: {named} = {error['input']!r}: must be {expected}."
    message = error["msg"].replace("Tuple", "list")
    return f"{where}: {location} = {error['input']!r}: {message[0].lower()}{message[1:]}."


def suggest_key(location: str, kind: type[BaseModel]) -> str:
    """Return ``" Did you mean 'optimizer.lr'?"`` for an unknown key, or an empty string."""
    known = known_keys(kind)
    table, _, leaf = location.rpartition(".")
    meant = OTHER_NAMES.get(leaf.replace("-", "_").lower(), "")
    if meant and (meant in known or meant.partition(".")[0] in known):
        return f" Did you mean '{meant}'?"
    elsewhere = [key for key in known if key.rpartition(".")[2] == leaf]
    if len(elsewhere) == 1 or (elsewhere and table not in known):
        return f" Did you mean {' or '.join(repr(key) for key in elsewhere)}?"
    # A name that resembles another only as a word of the wrong table is no help.
    beside = [key for key in known if key.rpartition(".")[0] == table]
    return did_you_mean(location, beside) or did_you_mean(location, known)


def known_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the paths of all fields of a model, those of its tables included."""
    keys: list[str] = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        for inner in (field.annotation, *get_args(field.annotation)):  # a section, or a tuple of them
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                keys += known_keys(inner, f"{prefix}{name}.")
    return keys


def describe_type(field: FieldInfo) -> str:
    """Return what a field takes: ``an integer ≥ 0``, ``a list such as [0.9, 0.999]``; empty if that is not simple."""
    return _expected(field, "")


def _field(kind: type[BaseModel], location: tuple[str | int, ...]) -> tuple[FieldInfo | None, int]:
    """Return the field that an error is in, and how many parts of the location name it."""
    model: Any = kind
    found = None
    for depth, part in enumerate(location):
        if isinstance(part, int) and model is not None and found is not None and _is_list(found):
            continue  # one of several tables
        if not isinstance(part, str) or model is None or part not in model.model_fields:
            return found, depth
        found = model.model_fields[part]
        model = _table_of(found)
    return found, len(location)


def _is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _table_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a field that is a table, or a list of such."""
    for inner in (field.annotation, *(get_args(field.annotation) if _is_list(field) else ())):
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            return inner
    return None


def _expected(field: FieldInfo, name: str) -> str:
    annotation = field.annotation
    bounds = _bounds(field.metadata)
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [_KINDS.get(kind) or _choices(kind) for kind in get_args(annotation)]
        return ", or ".join(kinds) if all(kinds) else ""
    if get_origin(annotation) is Literal:
        return _choices(annotation)
    if annotation in _KINDS:
        return _KINDS[annotation] + bounds
    if get_origin(annotation) is tuple:
        return _list(field, get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a table: [{name}], or {name}.KEY = VALUE"
    return "a table of names and values" if get_origin(annotation) is dict else ""


def _choices(annotation: Any) -> str:
    """Return ``'a', 'b' or 'c'`` of a literal; empty if it is none."""
    values = [repr(value) for value in get_args(annotation)] if get_origin(annotation) is Literal else [""]
    return " or ".join(filter(None, [", ".join(values[:-1]), values[-1]]))


def _list(field: FieldInfo, items: tuple[Any, ...]) -> str:
    if isinstance(field.default, tuple) and field.default:
        values = ", ".join(f"{value:.4g}" if isinstance(value, float) else repr(value) for value in field.default)
        return f"a list such as [{values}]"
    if len(items) == 2 and items[1] is Ellipsis:
        return "a list of texts" if items[0] is str else "a list"
    return f"a list of {len(items)}"


def _bounds(metadata: list[Any]) -> str:
    """Return `` ≥ 0 and ≤ 1`` of a field's constraints."""
    found = [
        f"{sign} {_number(getattr(constraint, name))}"
        for constraint in metadata
        for sign, name in _BOUNDS.values()
        if getattr(constraint, name, None) is not None
    ]
    return " " + " and ".join(found) if found else ""


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"
