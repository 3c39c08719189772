"""Finding runs: all of a folder, or those that names, globs, sweeps and paths stand for."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rsb_cluster.errors import ConfigError, did_you_mean
from rsb_cluster.runs import sweep
from rsb_cluster.runs.run import EVALUATIONS, READERS, Run
from rsb_cluster.storage.store import Store

_NO_RUNS = ("submissions", EVALUATIONS, sweep.FOLDER)


def default_runs() -> str:
    """Return where runs go when nobody says: a folder here."""
    return str(Path.cwd() / "runs")


def list_folders(runs_url: str) -> list[Run]:
    """Return what lies in a folder of runs, sorted by id; without a look into each, so some may be no run at all."""
    return [Run.at(runs_url, name) for name in Store(runs_url).names() if name not in _NO_RUNS]


def list_runs(runs_url: str) -> list[Run]:
    """Return all runs below a folder of runs, sorted by id."""
    runs = list_folders(runs_url)
    with ThreadPoolExecutor(READERS) as pool:
        exist = list(pool.map(Run.exists, runs))
    return [run for run, there in zip(runs, exist, strict=True) if there]


@dataclass(frozen=True)
class NameMatch:
    """What one name stands for.

    Attributes:
        name: The name as it was given.
        runs: The runs; at least one.
        says_several: Whether the name says that it may be several: it is a glob, or a sweep.
    """

    name: str
    runs: tuple[Run, ...]
    says_several: bool = False


def find_runs(runs_url: str, names: Sequence[str], listed: Callable[[str], list[Run]] = list_runs) -> list[Run]:
    """Return the runs that names stand for, each once; all runs where no name is given.

    Args and errors are those of ``find_named``.
    """
    if not names:
        return listed(runs_url)
    return list({run.url: run for named in match_names(runs_url, names, listed) for run in named.runs}.values())


def match_names(runs_url: str, names: Sequence[str], listed: Callable[[str], list[Run]] = list_runs) -> list[NameMatch]:
    """Return what each name stands for.

    A name is a run's id, glob, path, or the beginning of its id up to a '-'; or a sweep's id, or the beginning of that
    up to a '-'. Words are whole: ``a1`` is the beginning of ``a1-resnet50-s1-0123abcd`` and not of ``a1h-...``, and
    ``a1-resnet50-s1`` does not mean the seed 10. A sweep stands for all the runs it wants, those without a folder
    included (``Run.exists``).

    Args:
        runs_url: Folder of runs.
        names: Names.
        listed: What looks into the folder; ``list_folders`` where the caller finds out itself which are runs.

    Raises:
        ConfigError: A name matches nothing, or the runs of a sweep and others.
    """
    found: list[NameMatch] = []
    known: list[Run] | None = None
    for name in names:
        path = name.rstrip("/")
        if not path:
            raise ConfigError("a run's name is empty. Name one by id, beginning, glob ('*' for all) or path.")
        if "/" in path:
            parent, _, last = path.rpartition("/")
            run = Run.at(parent, last)
            if not run.exists():
                raise ConfigError(f"there is no run at {path}.")
            found.append(NameMatch(name, (run,)))
            continue
        sweeps = sweep.sweep_ids(runs_url)
        if path not in sweeps:
            known = listed(runs_url) if known is None else known
        found.append(_named(runs_url, path, known or [], sweeps))
    return found


def _named(runs_url: str, name: str, known: list[Run], sweeps: list[str]) -> NameMatch:
    """Return what a name that is no path stands for."""
    if name in sweeps:
        return NameMatch(name, _members(runs_url, name), says_several=True)
    if exact := [run for run in known if run.run_id == name]:
        return NameMatch(name, tuple(exact))
    if is_glob := any(sign in name for sign in "*?["):
        runs = [run for run in known if fnmatch.fnmatchcase(run.run_id, name)]
    else:
        runs = [run for run in known if sweep.begins(run.run_id, name)]
    begun = [one for one in sweeps if sweep.begins(one, name)]
    if not runs and not begun:
        ids = [*(run.run_id for run in known), *sweeps]
        raise ConfigError(
            f"no run or sweep in {Store(runs_url).url} matches '{name}'.{_near(name, ids)} "
            f"{len(known)} runs are there; 'rsb-cluster status' lists them."
        )
    if not begun:
        return NameMatch(name, tuple(runs), says_several=is_glob)
    wanted = {run.url: run for one in begun for run in _members(runs_url, one)}
    # 'cancel deit' must not end the runs of a sweep 'deit' that has others too.
    if len(begun) > 1 or (runs and {run.url for run in runs} != wanted.keys() & {run.url for run in known}):
        also = f", and of the ids of {len(runs)} runs ('{name.rstrip('-')}-*' names those)" if runs else ""
        raise ConfigError(f"'{name}' is the beginning of {' and '.join(begun)}{also}. Say more of the one you mean.")
    return NameMatch(name, tuple(wanted.values()), says_several=True)


def _near(name: str, ids: list[str]) -> str:
    """Return what may have been meant by a name that stands for nothing, as a sentence, or an empty string."""
    begun = [one for one in ids if one.startswith(name)]
    if not begun:
        return did_you_mean(name, ids)
    more = f" and {len(begun) - 1} more begin" if len(begun) > 1 else " begins"
    return f" Its last word must be whole: {begun[0]}{more} so."


def _members(runs_url: str, sweep_id: str) -> tuple[Run, ...]:
    return tuple(Run.at(runs_url, member.run_id) for member in sweep.read_sweep(runs_url, sweep_id).members)
