"""What is left out of a data set, counted; and what systems and tools leave beside images, which is no sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

_SHOWN = 3

# In lower case. Of macOS, Windows, Linux, NAS (Synology, QNAP, NetApp), Python and Jupyter.
_DEBRIS = frozenset(
    (
        "__macosx", "icon\r", ".trashes", ".appledouble", "network trash folder", "temporary items",
        "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "system volume information",
        "lost+found",
        "@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "~snapshot",
        "__pycache__", ".ipynb_checkpoints",
    )
)  # fmt: skip
_THUMBNAIL = "SYNOPHOTO_"

DEBRIS = "hidden, or of a system or tool"


def is_debris(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or one that systems and tools put beside the user's files."""
    return name.startswith((".", _THUMBNAIL)) or name.lower() in _DEBRIS


def is_debris_member(name: str) -> bool:
    """Whether a file in a tar is such a file, or lies in such a folder.

    Hidden folders count only if they are a system's: webdataset reads the samples in others.
    """
    folder, _, base = name.rpartition("/")
    return base.startswith(".") or base.lower() in _DEBRIS or _in_debris(folder)


@lru_cache(maxsize=256)  # consecutive members share their folder
def _in_debris(folder: str) -> bool:
    return any(part.lower() in _DEBRIS for part in folder.split("/"))


@dataclass
class LeftOut:
    """Counts what is left out (or else remarkable), by reason, and keeps the first names."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count a file or folder."""
        self._add(reason, 1, [name])

    def merge(self, other: LeftOut, prefix: str = "") -> None:
        """Add the counts of another one; the prefix says where its names are."""
        for reason, count in other.counts.items():
            self._add(reason, count, [f"{prefix}{name}" for name in other.names[reason]])

    def notes(self, what: str = "left out") -> Iterator[str]:
        """Yield a line for each reason."""
        for reason, count in self.counts.items():
            shown = self.names[reason]
            more = f" and {count - len(shown):,} more" if count > len(shown) else ""
            yield f"{what}, {reason}: {count:,} ({', '.join(map(printable, shown))}{more})"

    def _add(self, reason: str, count: int, names: list[str]) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        kept = self.names.setdefault(reason, [])
        kept += names[: _SHOWN - len(kept)]


def printable(name: str) -> str:
    """Return a name as it can be shown in a line: with escapes for what is not printable, or no text at all."""
    return name if name.isprintable() else ascii(name)[1:-1]
