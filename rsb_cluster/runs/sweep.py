"""The record of a submitted sweep: the list of its runs, in ``<runs>/sweeps/<sweep_id>.json`` beside the runs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from contextlib import suppress

from pydantic import Field

from rsb_cluster.config.schema import Section, read_record
from rsb_cluster.errors import AccessError, ConfigError, MissingError, RsbError, did_you_mean
from rsb_cluster.runs.sharing import make_common_folder
from rsb_cluster.storage.store import Store

log = logging.getLogger(__name__)

FOLDER = "sweeps"


class Member(Section):
    """A run of a sweep; its folder need not exist."""

    run_id: str
    recipe: str
    model: str
    seed: int


class Sweep(Section):
    """A submitted sweep."""

    sweep_id: str
    file: str = Field(description="the sweep file; empty: the sweep was given on the command line")
    created: float = Field(description="unix time of the first submit")
    members: tuple[Member, ...]


def sweep_id(name: str, run_ids: Iterable[str]) -> str:
    """Return the id of a sweep, which depends on its runs, so that a sweep that is submitted again has the same id.

    Run ids depend on recipe, model, seed and data, but not on the job. Their order does not matter.
    """
    return f"{name}-{hashlib.sha256(' '.join(sorted(run_ids)).encode()).hexdigest()[:8]}"


def has_prefix(full: str, name: str) -> bool:
    """Whether an id begins with the words of a name: ``a1`` is a prefix of ``a1-resnet50``, not of ``a1h-resnet50``."""
    return full.startswith(f"{name.rstrip('-')}-")


def write_sweep(runs_url: str, sweep: Sweep) -> bool:
    """Write a sweep's file unless it exists, so it keeps the time of the first submit; return whether it is new."""
    make_common_folder(runs_url, FOLDER)
    return Store(runs_url).create_json(f"{FOLDER}/{sweep.sweep_id}.json", sweep.model_dump(mode="json"))


def delete_sweep(runs_url: str, sweep: Sweep) -> None:
    """Remove a sweep's file."""
    Store(runs_url).delete_file(f"{FOLDER}/{sweep.sweep_id}.json")


def sweep_ids(runs_url: str) -> list[str]:
    """Return the ids of all sweeps in a folder of runs, sorted."""
    return [name.removesuffix(".json") for name in Store(runs_url).names(FOLDER) if name.endswith(".json")]


def list_sweeps(runs_url: str) -> list[Sweep]:
    """Return all sweeps in a folder of runs, sorted by id, without those that another user does not share.

    One that is damaged, or of a newer version, is named and left out: tables of other runs do not need it.
    """
    found = []
    with suppress(AccessError):
        for id_ in sweep_ids(runs_url):
            try:
                found.append(_read(runs_url, id_))
            except AccessError:
                pass
            except RsbError as error:
                log.warning("a sweep is left out: %s", error)
    return found


def read_sweep(runs_url: str, name: str) -> Sweep:
    """Return the sweep with an id, or the only sweep whose id has the name as a prefix.

    Raises:
        ConfigError: No sweep matches, or several do.
    """
    try:
        return _read(runs_url, name)
    except MissingError:
        pass
    known = sweep_ids(runs_url)
    matching = [id_ for id_ in known if has_prefix(id_, name)]
    if len(matching) == 1:
        return _read(runs_url, matching[0])
    if matching:
        raise ConfigError(f"'{name}' is a prefix of {len(matching)} sweeps: {', '.join(matching)}. Name one.")
    raise ConfigError(f"there is no sweep '{name}' in {Store(runs_url).url}.{did_you_mean(name, known)}")


def _read(runs_url: str, id_: str) -> Sweep:
    store, path = Store(runs_url), f"{FOLDER}/{id_}.json"
    return read_record(Sweep, store.read_json(path), store.locate(path))
