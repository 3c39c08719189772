"""A run's folder as it is at one moment, for commands that look at thousands of runs.

In an object store each small file costs a request, and each folder that is looked through another one. A snapshot makes
one listing, which has a tag (ETag) of each file, and reads ``summary.json``, in which the attempts bundle the small
files of their run with the tags that they had. What has the same tag is taken from there, and everything else is read:
so the summary is never believed where it is old, and a run without one costs more requests. On disks there is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Literal

from pydantic import Field

from rsb_cluster.config.schema import Section
from rsb_cluster.errors import MissingError, StorageError
from rsb_cluster.runs.metrics import MetricsRow, last_rows
from rsb_cluster.runs.run import Attempt, Run
from rsb_cluster.storage.store import Store

SUMMARY = "summary.json"
FEW_RUNS = 8  # are listed one by one: a page that they share holds the files of their neighbours, too
_BUNDLED = re.compile(r"(spec|recipe|result)\.json|submissions/[^/]+\.json|attempts/(\d+|start-[^/]+)\.json")
_ROWS = re.compile(r"metrics/.*|attempts/\d+\.json")  # what the last rows follow from


class _Summary(Section):
    """The summary of a run."""

    format: Literal[1] = 1
    tags: dict[str, str] = Field({}, description="of the files when they were read")
    files: dict[str, str] = Field({}, description="contents of small files")
    last_rows: dict[str, MetricsRow] = Field({}, description="last row of metrics, by kind")


Listings = Mapping[str, Mapping[str, str]]  # of folders of runs, by URL: their files, with the tag of each


def list_together(runs: Sequence[Run]) -> Listings:
    """Return the listings of many runs in object stores: of neighbours, several fit into the page of one request."""
    stores: dict[str, list[Run]] = {}
    for run in runs:
        if not run.store.is_local:
            stores.setdefault(run.runs_url, []).append(run)
    found: dict[str, Mapping[str, str]] = {}
    for url, inside in stores.items():
        if len(inside) < FEW_RUNS:
            continue
        with suppress(StorageError):  # each by itself then, so that one which cannot be listed leaves the others
            tags = Store(url).list_tags_of([run.run_id for run in inside])
            found |= {run.url: tags[run.run_id] for run in inside}
    return found


class Snapshot(Run):
    """A run whose ``store`` answers from one listing of its folder and from the summary, where that is current.

    It is only read, and does not change: make another one to see what has changed.
    """

    @staticmethod
    def of(run: Run, listed: Listings | None = None) -> Run:
        """Return the snapshot of a run; on a disk the run itself.

        Args:
            run: The run.
            listed: Listings of many runs (`list_together`); a run that is in none of them is listed by itself.
        """
        if run.store.is_local:
            return run
        tags = (listed or {}).get(run.url)
        return Snapshot(_Listed(run.store, run.store.list_tags() if tags is None else tags), run.run_id)

    def summarise(self) -> bytes:
        """Return the content of the run's summary."""
        tags, store = self._listed.tags, self.store
        files = {name: store.read_small(name).decode() for name in tags if _BUNDLED.fullmatch(name)}
        used = {name: tag for name, tag in tags.items() if name in files or _ROWS.fullmatch(name)}
        rows = self.last_rows(self.attempts())
        return _Summary(tags=used, files=files, last_rows=rows).model_dump_json().encode()

    def last_rows(self, attempts: Sequence[Attempt]) -> dict[str, MetricsRow]:
        """Return what ``metrics.last_rows`` does, from the summary if rows and attempts are those of then."""
        then, now = (
            {name: tag for name, tag in tags.items() if _ROWS.fullmatch(name)}
            for tags in (self._listed.summary.tags, self._listed.tags)
        )
        return self._listed.summary.last_rows if then == now else last_rows(self, attempts)

    @property
    def _listed(self) -> _Listed:
        assert isinstance(self.store, _Listed)
        return self.store


def read_last_rows(run: Run, attempts: Sequence[Attempt]) -> dict[str, MetricsRow]:
    """Return the last training row and the last evaluation row of a run or a snapshot, by kind."""
    return run.last_rows(attempts) if isinstance(run, Snapshot) else last_rows(run, attempts)


def write_summary(run: Run) -> None:
    """Bring the summary of a run in an object store up to date. Raises StorageError if that fails."""
    snapshot = Snapshot.of(run)
    if isinstance(snapshot, Snapshot) and snapshot.exists():
        run.store.write_bytes(SUMMARY, snapshot.summarise())


class _Listed(Store):
    """A folder with the names of one listing.

    Attributes:
        tags: All files in it, sorted, with the tag of each.
        summary: The summary; an empty one if there is none, or it is damaged or of another version.
    """

    def __init__(self, folder: Store, tags: Mapping[str, str]) -> None:
        super().__init__(folder.url)
        self.tags = dict(sorted(tags.items()))
        self.summary = _read_summary(folder) if SUMMARY in self.tags else _Summary()
        then = self.summary.tags
        self._known = {
            name: text.encode() for name, text in self.summary.files.items() if then.get(name) == self.tags.get(name)
        }

    def read_small(self, path: str) -> bytes:
        """Return a file's content, by a request if it is not known."""
        if path not in self._known:
            self._known[path] = self._read(path)
        return self._known[path]

    def read_bytes(self, path: str) -> bytes:
        """Return a file's content, by a request."""
        return self._read(path)

    def exists(self, path: str = "") -> bool:
        """Whether a file or folder is in the listing."""
        return any(name == path or not path or name.startswith(f"{path}/") for name in self.tags)

    def files(self, folder: str = "") -> list[str]:
        """Return the files of the listing below a folder."""
        shown = (name for name in self.tags if not name.rpartition("/")[2].startswith("."))
        return [name for name in shown if not folder or name.startswith(f"{folder}/")]

    def entries(self, folder: str = "") -> dict[str, bool]:
        """Return the names of the listing directly below a folder, and whether each is a file."""
        start = len(folder) + 1 if folder else 0
        inside = [name[start:] for name in self.tags if not folder or name.startswith(f"{folder}/")]
        found = {name.partition("/")[0]: "/" not in name for name in inside}
        return {name: is_file for name, is_file in found.items() if name and not name.startswith(".")}

    def _read(self, path: str) -> bytes:
        if path not in self.tags:
            raise MissingError(f"there is nothing at {self.locate(path)}.")
        return super().read_small(path)


def _read_summary(folder: Store) -> _Summary:
    try:
        return _Summary.model_validate_json(folder.read_small(SUMMARY))
    except (StorageError, ValueError):
        return _Summary()
