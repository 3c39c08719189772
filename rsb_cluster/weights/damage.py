"""Files that are no weights: what was saved in their place, or what is missing, and what to do about it."""

from __future__ import annotations

import io
import json
import re
import zipfile
from typing import Any

from rsb_cluster.storage.store import LFS_POINTER

_AGAIN = "Copy or download it again."
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # how torch's files begin, and how they did before version 1.6


def is_safetensors(content: bytes) -> bool:
    """Whether a file is one of safetensors, whatever its name: a number, then JSON."""
    return content[8:9] == b"{" and not content.startswith(_ZIP)


def damage(content: bytes) -> str:
    """Return what is wrong with the content of a weights file, to follow its name; empty if it may be whole."""
    start = content[:512].lstrip().lower()
    if not content:
        return f"is empty. {_AGAIN}"
    if content.startswith(LFS_POINTER):
        return "is a pointer of git-LFS, not the weights. Run 'git lfs pull' in its repository."
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"<!--")):
        return "is a web page, not the weights. Download the file itself: on GitHub or the Hub, by its download link."
    if is_safetensors(content):
        return _missing_of_safetensors(content)
    if content.startswith(_ZIP):
        return "" if zipfile.is_zipfile(io.BytesIO(content)) else cut_off(content)
    if not content.startswith(_PICKLE):
        return f"cannot be read as weights: it begins with {content[:24]!r}, as no file of safetensors or torch does."
    return ""


def cut_off(content: bytes, expected: int = 0) -> str:
    """Return what is wrong with a file that lacks its end."""
    return f"was cut off: it has {len(content):,} {f'of {expected:,} ' if expected else ''}bytes. {_AGAIN}"


def describe(loaded: Any) -> str:
    """Return what is in a file in the place of a state dict."""
    if not isinstance(loaded, dict):
        return f"a {type(loaded).__name__}"
    names = [repr(name) for name in loaded]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}" if names else "nothing"


def refused_object(error: Exception) -> str:
    """Return the name of the first object that is no tensor, without torch's advice to execute it."""
    match = re.search(r"GLOBAL ([\w.]+)", str(error))
    return match[1] if match else "objects that are no tensors"


def first_line(error: Exception) -> str:
    """Return the beginning of a library's message, without what it says to its own developers."""
    return re.split(r"\n| \(Could this| This is an internal", str(error).strip())[0][:200].strip(" .")


def _missing_of_safetensors(content: bytes) -> str:
    stop = 8 + int.from_bytes(content[:8], "little")
    expected = stop
    if stop <= len(content):
        try:
            header = json.loads(content[8:stop])
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = stop + max(ends, default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return ""  # the reader says what is wrong
    return cut_off(content, expected) if expected > len(content) else ""
