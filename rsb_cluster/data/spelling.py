"""Names that look the same and differ in their bytes: macOS decomposes accents (NFD), other systems do not (NFC)."""

from __future__ import annotations

import os
import unicodedata

from rsb_cluster.data.left_out import printable


def same_name(name: str) -> str:
    """Return what is equal for names that differ only in how they spell accents."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def spelled(name: str) -> str:
    """Return a name for a message; with its bytes if they may differ from those of a name that looks the same."""
    return name if name.isascii() else f"{printable(name)} ({os.fsencode(name)!r})"
