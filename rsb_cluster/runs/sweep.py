"""A sweep that was sent: which runs it wants. One file beside the runs, ``<runs>/sweeps/<sweep_id>.json``.

What the runs did is in their own folders; a sweep only says which of them belong together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from pydantic import Field

from rsb_cluster.config.schema import Section, read_record
from rsb_cluster.errors import ConfigError, MissingError, did_you_mean
from rsb_cluster.storage.store import Store

FOLDER = "sweeps"


class Member(Section):
    """A run that a sweep wants, whether its folder is there or not."""

    run_id: str
    recipe: str
    model: str
    seed: int


class Sweep(Section):
    """What was sent under one name."""

    sweep_id: str
    file: str = Field(description="the sweep file it came from; empty where the command line said it all")
    created: float = Field(description="unix time of the first submit")
    members: tuple[Member, ...]


def sweep_id(name: str, run_ids: Iterable[str]) -> str:
    """Name a sweep after all that it asks for, so that the same sweep sent again is the same sweep.

    Run ids stand for recipe, model, seed and data; the job is not in them, and their order means nothing.
    """
    return f"{name}-{hashlib.sha256(' '.join(sorted(run_ids)).encode()).hexdigest()[:8]}"


def begins(full: str, name: str) -> bool:
    """Whether an id begins with a name's words, whole ones: ``a1`` begins ``a1-resnet50``, and not ``a1h-resnet50``."""
    return full.startswith(f"{name.rstrip('-')}-")


def write_sweep(runs_url: str, sweep: Sweep) -> None:
    """Write a sweep's file where there is none; sent again, a sweep began with its first submit."""
    Store(runs_url).create_json(f"{FOLDER}/{sweep.sweep_id}.json", sweep.model_dump(mode="json"))


def sweep_ids(runs_url: str) -> list[str]:
    """Return the ids of all sweeps in a folder of runs, sorted."""
    return [name.removesuffix(".json") for name in Store(runs_url).names(FOLDER) if name.endswith(".json")]


def list_sweeps(runs_url: str) -> list[Sweep]:
    """Return all sweeps in a folder of runs, sorted by id."""
    return [_read(runs_url, one) for one in sweep_ids(runs_url)]


def read_sweep(runs_url: str, name: str) -> Sweep:
    """Return the sweep of that id, or the one whose id begins with these words.

    Raises:
        ConfigError: None does, or several do.
    """
    try:
        return _read(runs_url, name)
    except MissingError:
        pass
    known = sweep_ids(runs_url)
    hits = [one for one in known if begins(one, name)]
    if len(hits) == 1:
        return _read(runs_url, hits[0])
    if hits:
        raise ConfigError(f"'{name}' is the beginning of {len(hits)} sweeps: {', '.join(hits)}. Name one.")
    raise ConfigError(f"there is no sweep '{name}' in {Store(runs_url).url}.{did_you_mean(name, known)}")


def _read(runs_url: str, one: str) -> Sweep:
    store, path = Store(runs_url), f"{FOLDER}/{one}.json"
    return read_record(Sweep, store.read_json(path), store.locate(path))
