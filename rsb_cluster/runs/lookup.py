"""Finding runs: all runs of a folder, or those that match ids, globs, sweeps and paths."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rsb_cluster.config.settings import setting
from rsb_cluster.errors import AccessError, ConfigError, did_you_mean, plural
from rsb_cluster.runs import sweep
from rsb_cluster.runs.provenance import DIFFS
from rsb_cluster.runs.run import EVALUATION_JOBS, EVALUATION_PREFIX, EVALUATIONS, READERS, Run
from rsb_cluster.runs.sharing import other_owner
from rsb_cluster.storage.store import Store

_OTHER_FOLDERS = ("submissions", DIFFS, EVALUATIONS, EVALUATION_JOBS, sweep.FOLDER)

_OF_ATTEMPTS = {"attempts", "checkpoints", "metrics", "result.json"}


def runs_folder(*chosen: str) -> str:
    """Return the folder of the runs: the first that was chosen, the user's setting, or ``runs`` in the working folder.

    Raises:
        ConfigError: It is a URL that is only read, or none at all.
    """
    store = Store(next(filter(None, chosen), "") or setting("runs") or Path.cwd() / "runs")
    store.check_not_read_only("runs")
    return store.url


def no_runs(runs_url: str) -> str:
    """Return what to say of a folder without runs."""
    return f"There are no runs in {Store(runs_url).url}. Another folder is named by --runs or RSB_RUNS."


def list_folders(runs_url: str) -> list[Run]:
    """Return the entries of a folder of runs, sorted by id; those that do not exist as runs are not filtered out."""
    return [Run.at(runs_url, name) for name in Store(runs_url).names() if name not in _OTHER_FOLDERS]


def list_runs(runs_url: str) -> list[Run]:
    """Return all runs in a folder of runs, sorted by id, with the folders that another user does not share."""
    runs = list_folders(runs_url)
    with ThreadPoolExecutor(READERS) as pool:
        exist = list(pool.map(_may_exist, runs))
    return [run for run, exists in zip(runs, exist, strict=True) if exists]


def list_evaluations(runs_url: str) -> list[Run]:
    """Return the folders of all evaluations that were submitted as jobs, sorted by id."""
    url = Store(runs_url).child(EVALUATION_JOBS).url
    return [Run.at(url, name) for name in Store(url).names() if name.startswith(EVALUATION_PREFIX)]


def has_lost_its_spec(run: Run) -> bool:
    """Whether a folder without a spec seems to be that of a run: it has a recipe, and what only attempts write."""
    names = set(run.store.names())
    return "recipe.json" in names and bool(_OF_ATTEMPTS & names)


def _may_exist(run: Run) -> bool:
    try:
        return run.exists() or has_lost_its_spec(run)
    except AccessError:
        if not other_owner(run):
            raise
        return True


@dataclass(frozen=True)
class NameMatch:
    """The runs that match a name.

    Attributes:
        name: The name.
        runs: The runs; at least one.
        is_explicit: Whether the name is meant to match several runs: it is a glob or a sweep.
    """

    name: str
    runs: tuple[Run, ...]
    is_explicit: bool = False


def find_runs(runs_url: str, names: Sequence[str], list_all: Callable[[str], list[Run]] = list_runs) -> list[Run]:
    """Return the runs that match the names, each once; all runs if there are no names.

    Args and errors are those of ``match_names``.
    """
    if not names:
        return list_all(runs_url)
    return list({run.url: run for match in match_names(runs_url, names, list_all) for run in match.runs}.values())


def match_names(
    runs_url: str, names: Sequence[str], list_all: Callable[[str], list[Run]] = list_runs
) -> list[NameMatch]:
    """Return the runs that match each name.

    A name is the id of a run or a sweep, a prefix of one that ends before a '-', or a run's glob or path. A prefix must
    consist of whole words: ``a1`` matches ``a1-resnet50-s1-0123abcd`` but not ``a1h-...``, and ``a1-resnet50-s1`` does
    not match seed 10. A sweep matches all of its runs, including those that have no folder (``Run.exists``). What
    begins with ``eval-`` is first looked for among the evaluations that were submitted as jobs.

    Args:
        runs_url: Folder of runs.
        names: Names.
        list_all: Lists the folder; ``list_folders`` if the caller filters out what is not a run.

    Raises:
        ConfigError: A name matches nothing, or both a sweep and other runs.
    """
    matches: list[NameMatch] = []
    known: list[Run] | None = None
    for name in names:
        path = name.rstrip("/")
        if not path:
            raise ConfigError("a run's name is empty. Give an id, a prefix of an id, a glob ('*' for all) or a path.")
        if "/" in path:
            parent, _, last = path.rpartition("/")
            run = Run.at(parent, last)
            if not run.exists():
                raise ConfigError(f"there is no run at {path}. A folder of runs is named by --runs.")
            matches.append(NameMatch(name, (run,)))
            continue
        if path.startswith(EVALUATION_PREFIX) and (evaluations := _match_evaluations(runs_url, path)):
            matches.append(NameMatch(name, tuple(evaluations), is_explicit=_is_glob(path)))
            continue
        sweeps = _sweep_ids(runs_url)
        if path not in sweeps:
            known = list_all(runs_url) if known is None else known
        matches.append(_match_id(runs_url, path, known or [], sweeps))
    return matches


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[")


def _match_evaluations(runs_url: str, name: str) -> list[Run]:
    """Return the submitted evaluations that a name matches, by the rules for runs."""
    known = list_evaluations(runs_url)
    if _is_glob(name):
        return [run for run in known if fnmatch.fnmatchcase(run.run_id, name)]
    return [run for run in known if run.run_id == name] or [r for r in known if sweep.has_prefix(r.run_id, name)]


def _sweep_ids(runs_url: str) -> list[str]:
    """Return the ids of all sweeps; of a folder that another user does not share none, as runs are found without."""
    try:
        return sweep.sweep_ids(runs_url)
    except AccessError:
        if not other_owner(Run.at(runs_url, sweep.FOLDER)):
            raise
        return []


def _match_id(runs_url: str, name: str, known: list[Run], sweeps: list[str]) -> NameMatch:
    """Return the runs that match a name that is not a path."""
    if name in sweeps:
        return NameMatch(name, _members(runs_url, name), is_explicit=True)
    if exact := [run for run in known if run.run_id == name]:
        return NameMatch(name, tuple(exact))
    if is_glob := _is_glob(name):
        runs = [run for run in known if fnmatch.fnmatchcase(run.run_id, name)]
    else:
        runs = [run for run in known if sweep.has_prefix(run.run_id, name)]
    matching_sweeps = [sweep_id for sweep_id in sweeps if sweep.has_prefix(sweep_id, name)]
    if not runs and not matching_sweeps:
        ids = [*(run.run_id for run in known), *sweeps]
        if not ids:
            raise ConfigError(f"{no_runs(runs_url)} So none matches '{name}'.")
        raise ConfigError(
            f"no run or sweep in {Store(runs_url).url} matches '{name}'.{_suggest(name, ids)} "
            f"{plural(len(known), 'run is', 'runs are')} there; 'rsb-cluster status' lists them."
        )
    if not matching_sweeps:
        return NameMatch(name, tuple(runs), is_explicit=is_glob)
    members = {run.url: run for sweep_id in matching_sweeps for run in _members(runs_url, sweep_id)}
    # 'cancel deit' must not end other runs of a sweep 'deit'.
    if len(matching_sweeps) > 1 or (runs and {run.url for run in runs} != members.keys() & {run.url for run in known}):
        also = f", and of the ids of {len(runs)} runs ('{name.rstrip('-')}-*' matches those)" if runs else ""
        raise ConfigError(f"'{name}' is ambiguous: a prefix of {' and '.join(matching_sweeps)}{also}. Use a whole id.")
    return NameMatch(name, tuple(members.values()), is_explicit=True)


def _suggest(name: str, ids: list[str]) -> str:
    """Return a sentence with the id that an unknown name may mean, or an empty string."""
    matching = [id_ for id_ in ids if id_.startswith(name)]
    if not matching:
        return did_you_mean(name, ids)
    more = f" and {len(matching) - 1} more begin" if len(matching) > 1 else " begins"
    return f" {matching[0]}{more} with it, but its last word must be complete."


def _members(runs_url: str, sweep_id: str) -> tuple[Run, ...]:
    return tuple(Run.at(runs_url, member.run_id) for member in sweep.read_sweep(runs_url, sweep_id).members)
