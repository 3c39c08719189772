"""The user's defaults: of the environment, of ``./rsb-cluster.toml`` and of ``~/.config/rsb-cluster/config.toml``.

They are used where neither the command line nor a job file says anything, in this order. Nothing here can change a
run's result.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from rsb_cluster.config.environment import PREFIX
from rsb_cluster.config.schema import Section, no_variable, parse_toml, validate
from rsb_cluster.errors import expand_home

HERE = "rsb-cluster.toml"
BUILT_IN = "built in"


class Settings(Section):
    """What a file of settings may hold; an empty value says nothing."""

    runs: str = Field("", description="folder or s3:// URL of the runs; empty: runs in the working folder")
    data: str = Field("", description="folder or s3:// URL of the data sets; empty: data in the working folder")
    job: str = Field("", description="where to train; empty: slurm where it is installed, else local")
    account: str = Field("", description="Slurm account, where the job file names none")
    partition: str = Field("", description="Slurm partition, where the job file names none")
    share: Literal["", "private", "group"] = Field("", description="who may read the runs; empty: private")
    notify: str = Field("", description="command that is told when a run is over (job.notify_command)")

    _are_written_out = field_validator("runs", "data", "job")(no_variable)


@dataclass(frozen=True)
class Setting:
    """A setting as it applies here.

    Attributes:
        value: Its value; empty if nothing says anything.
        source: The variable or the file that says so, or ``built in``.
    """

    value: str
    source: str


def settings() -> dict[str, Setting]:
    """Return all settings.

    Raises:
        ConfigError: A file is wrong, or a variable.
    """
    found = {name: Setting("", BUILT_IN) for name in Settings.model_fields}
    for path in (user_file(), Path.cwd() / HERE):
        if _is_there(path):
            found |= _said(parse_toml(path.expanduser()), {}, str(path))
    variables = {name: f"{PREFIX}{name.upper()}" for name in found}
    given = {name: os.environ[variable] for name, variable in variables.items() if os.environ.get(variable)}
    return found | _said(given, variables, "the environment")


def setting(name: str) -> str:
    """Return the value of a setting; empty if nothing says anything. Raises ConfigError as `settings` does."""
    return settings()[name].value


def data_root() -> str:
    """Return the folder or URL of the data sets where no other is named."""
    return setting("data") or str(Path.cwd() / "data")


def user_file() -> Path:
    """Return the user's own file, which need not exist."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "rsb-cluster" / "config.toml"


def _is_there(path: Path) -> bool:
    """Whether there is such a file; where nobody may look, or the user has no home, there is none."""
    try:
        return path.expanduser().is_file()
    except (OSError, RuntimeError):
        return False


def _said(values: Mapping[str, Any], variables: Mapping[str, str], where: str) -> dict[str, Setting]:
    """Return the settings that are not empty, of a file or of variables."""
    checked = validate(Settings, values, where)
    found = {}
    for name in values:
        if value := getattr(checked, name):
            is_path = name in ("runs", "data", "job") and value.startswith("~")
            found[name] = Setting(str(expand_home(value)) if is_path else value, variables.get(name, where))
    return found
