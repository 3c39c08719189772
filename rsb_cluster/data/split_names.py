"""Which split the name of a file or folder tells: the words of the Hugging Face Hub, and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from rsb_cluster.errors import ConfigError

# The Hub's words (docs: "Structure your repository"); ours are train and val.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_PATTERNS = {
    split: re.compile(rf"(^|[^a-z])({'|'.join(words)})([^a-z]|$)", re.IGNORECASE) for split, words in _WORDS.items()
}

T = TypeVar("T")


def splits_in(name: str) -> list[str]:
    """Return the splits whose words a name has."""
    return [split for split, pattern in _PATTERNS.items() if pattern.search(name)]


def split_of(name: str, where: str) -> str:
    """Return the split in a name: ``train``, ``validation`` or ``test``; empty if it has none.

    Args:
        name: The name of a file or folder, or of a split.
        where: What it is the name of, for the message.

    Raises:
        ConfigError: It has the words of several splits.
    """
    found = splits_in(name)
    if len(found) > 1:
        raise ConfigError(f"the name of {where} has the words of several splits: {', '.join(found)}. Rename it.")
    return found[0] if found else ""


def as_ours(splits: Mapping[str, T]) -> tuple[dict[str, T], list[str]]:
    """Return what is train and val to us, and the names of the splits that are left out.

    Val is the validation split, and the test split where there is no other.

    Args:
        splits: What belongs to each split, by the names that `split_of` returns.
    """
    val = "validation" if "validation" in splits else "test"
    chosen = {ours: splits[theirs] for ours, theirs in (("train", "train"), ("val", val)) if theirs in splits}
    return chosen, [name for name in splits if name not in ("train", val)]
