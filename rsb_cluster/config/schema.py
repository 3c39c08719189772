"""Validation of the TOML files that users write and of the JSON files that this package writes.

An error in a user's file is reported with its location. An unknown key is an error, as it may be a typo; in a file that
this package wrote it means that a newer version wrote it.
"""

from __future__ import annotations

import codecs
import copy
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from rsb_cluster.config.explain import explain
from rsb_cluster.errors import ConfigError, NewerVersionError, is_text

Count = Annotated[int, Field(gt=0)]
SEEDS = 2**32  # numpy splits a larger seed into several of 32 bits, which are the draws of other seeds, too
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
Override = tuple[str, Any]  # the path of a field, such as optimizer.lr, and its value


class Section(BaseModel):
    """A table: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _bool_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation in (int, float):
            raise PydanticCustomError("bool_as_number", "input should be a valid number")
        return value


S = TypeVar("S", bound=BaseModel)


def no_variable(path: str, info: ValidationInfo) -> str:
    """Return a path of a user's file. Raises ValueError if it has a variable, which only a shell would replace."""
    if re.search(r"\$\{?[A-Za-z_]", path):
        value = os.path.expandvars(path)
        advice = "Write it out" + (f": '{value}'" if value != path and "$" not in value else "")
        raise ValueError(f"{info.field_name} = '{path}': variables are not replaced here. {advice}")
    return path


def parse_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; a syntax error names file and line."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        hint = ' Text stands in straight quotes: key = "text".' if "Invalid value" in str(error) else ""
        raise ConfigError(f"{path} is not valid TOML: {error}.{hint}") from error


def read_text(path: Path) -> str:
    """Read a user's text file, which is UTF-8, with or without the byte order mark that some editors write.

    Raises:
        ConfigError: It cannot be read, or has another encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise ConfigError(f"{path} is in UTF-16 or no text. Save it as UTF-8.")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}: line {line} is not UTF-8 (byte 0x{content[error.start]:02x}); perhaps the file is in Latin-1. "
            "Save it as UTF-8."
        ) from error


def validate(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """Validate what a user wrote; each error is reported with its location.

    Args:
        kind: The model to validate against.
        values: Plain values.
        where: The file, for messages.

    Raises:
        ConfigError: A field is wrong, missing or unknown.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [explain(kind, dict(e), where) for e in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def read_record(kind: type[S], values: Any, where: str) -> S:
    """Validate what some version of this package wrote.

    Args:
        kind: The model to validate against.
        values: Plain values, or the bytes of a JSON file.
        where: The file, for messages.

    Raises:
        NewerVersionError: A key or value is unknown to this version.
        ConfigError: A field is wrong or missing: the file was edited by hand, or is damaged.
    """
    try:
        return kind.model_validate_json(values) if isinstance(values, bytes) else kind.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
        if unknown := [error for error in errors if _is_unknown(error)]:
            raise newer_version(where, _location(unknown[0])) from error
        lines = dict.fromkeys(_explain_damage(kind, dict(e), where) for e in errors)
        raise ConfigError("\n".join([*lines, "Was it cut off, or edited by hand? Restore it from a copy."])) from error


def newer_version(where: str, unknown: str) -> NewerVersionError:
    """Return the error for a file with content that this version does not know.

    Args:
        where: The file.
        unknown: The unknown key or value.
    """
    import rsb_cluster

    return NewerVersionError(
        f"{where} was written by a newer version of rsb-cluster: '{unknown}' in it is not known to "
        f"{rsb_cluster.__version__}. Upgrade this installation: pip install --upgrade rsb-cluster."
    )


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """Read ``--set a.b=value`` options.

    A value is read as TOML (``5e-3``, ``true``, ``[1, 2]``), and as a plain string where that fails; a number for
    sbatch (``job.slurm.account=1_000``) stays as it is written.
    """
    found: list[Override] = []
    for text in texts:
        if not is_text(text):
            raise ConfigError(f"--set {text!r} is not UTF-8.")
        path, separator, value = text.partition("=")
        if not separator or not path.strip():
            raise ConfigError(f"--set {text!r} is not of the form key=value, for example optimizer.lr=4e-3.")
        name = path.strip()
        try:
            read = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            read = value
        is_changed = isinstance(read, int | float) and not isinstance(read, bool) and str(read) != value.strip()
        found.append((name, value.strip() if is_changed and name.removeprefix("job.").startswith("slurm.") else read))
    return found


def override(values: Mapping[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """Return nested plain values with some fields replaced; the last override of a field wins."""
    result = copy.deepcopy(dict(values))
    for path, value in overrides:
        *tables, key = path.split(".")
        target = result
        for table in tables:
            target = target.setdefault(table, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {path}={value}: '{table}' is a value, not a table.")
        target[key] = copy.deepcopy(value)
    return result


def descriptions(kind: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Return what each field of a model is for, by its path."""
    found: dict[str, str] = {}
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= descriptions(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.description or ""
    return found


def flatten(section: Section) -> dict[str, Any]:
    """Return all fields of a recipe or job as ``{"optimizer.lr": 0.005, ...}``."""
    result: dict[str, Any] = {}
    for name, value in section:
        if isinstance(value, Section):
            result |= {f"{name}.{key}": v for key, v in flatten(value).items()}
        else:
            result[name] = value
    return result


def finite(value: Any) -> Any:
    """Return plain values without NaN and infinity, which JSON lacks: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def _is_unknown(error: Mapping[str, Any]) -> bool:
    """Whether it is of a key, or a value of the right type, that another version may have added."""
    if error["type"] == "literal_error":
        return type(error["input"]) is (str if error["ctx"]["expected"].startswith("'") else int)
    return bool(error["type"] == "extra_forbidden")


def _location(error: Mapping[str, Any]) -> str:
    # Of a value that may be of several types, pydantic names the type, too.
    return ".".join(str(part) for part in error["loc"] if "[" not in str(part))


def _explain_damage(kind: type[BaseModel], error: Mapping[str, Any], where: str) -> str:
    """Return what is wrong with a file that a user did not write."""
    if not error["loc"]:
        return f"{where} is no JSON object." if error["type"] == "model_type" else f"{where}: {error['msg']}."
    return f"{where}: '{_location(error)}' is missing." if error["type"] == "missing" else explain(kind, error, where)
