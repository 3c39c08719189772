"""How this package starts Python: with the modules that are installed, and none of the folder that somebody stands in.

``python -m`` imports from the current folder first, and so would an empty entry of ``PYTHONPATH``: a ``timm/`` or
``random.py`` that lies there would be executed and trained with.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import MutableMapping
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder

import rsb_cluster
from rsb_cluster.errors import ConfigError

# They decide what is trained.
_CHECKED = ("torch", "torchvision", "timm", "numpy")


def interpreter() -> list[str]:
    """Return the command of this Python for the processes of this package, to be followed by ``-m`` and a module.

    It does not import from the current folder, unless that is where this package itself comes from: a checkout that is
    not installed.
    """
    return [sys.executable, *(["-P"] if sys.flags.safe_path or _imports_safely() else [])]


@cache
def _imports_safely() -> bool:
    """Whether this very package is found without the current folder."""
    code = "import rsb_cluster; print(rsb_cluster.__file__)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    found = done.stdout.strip().rpartition("\n")[2]  # a site's sitecustomize may print, too
    return done.returncode == 0 and os.path.realpath(found) == os.path.realpath(rsb_cluster.__file__)


def drop_empty_entries(environment: MutableMapping[str, str]) -> None:
    """Remove the empty entries of ``PYTHONPATH``, as in ``/a:``: they stand for the current folder."""
    if "PYTHONPATH" in environment:
        environment["PYTHONPATH"] = os.pathsep.join(_entries(environment["PYTHONPATH"]))


def check_python_path() -> None:
    """Refuse a ``PYTHONPATH`` with a package in it that hides an installed one which decides what is trained.

    Raises:
        ConfigError: There is one. One that is only in ``PYTHONPATH``, as a cluster's module may put it there, is fine.
    """
    entries = _entries(os.environ.get("PYTHONPATH", ""))
    real = {os.path.realpath(entry) for entry in entries}
    others = [folder for folder in sys.path if folder and os.path.realpath(folder) not in real]
    for name in _CHECKED:
        first, installed = _find(name, entries), _find(name, others)
        if first is not None and installed is not None:
            raise ConfigError(
                f"PYTHONPATH: {first.origin} would be imported as '{name}', instead of the installed "
                f"{installed.origin}. Take its folder out of PYTHONPATH, or rename it."
            )


def _entries(python_path: str) -> list[str]:
    return [entry for entry in python_path.split(os.pathsep) if entry]


def _find(name: str, folders: list[str]) -> ModuleSpec | None:
    """Return the module or package of a name in some folders; a folder without ``__init__.py`` hides none."""
    spec = PathFinder.find_spec(name, folders)
    return spec if spec is not None and spec.origin is not None else None
