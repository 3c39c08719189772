"""A folder on NFS as a second machine sees it: what the first has made is missing in listings, but can be opened."""

from __future__ import annotations

from pathlib import Path

from rsb_cluster.storage.store import Store


class LateStore(Store):
    """A store whose listings are those of the moment when it was made.

    Args:
        url: The folder.
        listed: The files of that moment, if it is a folder below one of that kind.
    """

    def __init__(self, url: str | Path, listed: frozenset[str] | None = None) -> None:
        super().__init__(url)
        self._listed = frozenset(Store(self.url).locate(name) for name in Store(self.url).files())
        if listed is not None:
            self._listed = listed

    def child(self, *parts: str) -> LateStore:
        """Return the folder below this one, as late."""
        return LateStore(super().child(*parts).url, self._listed)

    def files(self, folder: str = "") -> list[str]:
        """Return the files that were there."""
        return [name for name in super().files(folder) if self.locate(name) in self._listed]

    def entries(self, folder: str = "") -> dict[str, bool]:
        """Return the names that were there."""
        root = self.locate(folder)
        return {
            name: is_file
            for name, is_file in super().entries(folder).items()
            if any(path == f"{root}/{name}" or path.startswith(f"{root}/{name}/") for path in self._listed)
        }
