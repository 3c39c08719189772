"""A recipe's file for other data: a copy with the values that the data decide, and a comment at each."""

from __future__ import annotations

import re
from typing import Any

from rsb_cluster.config.catalog import Resolved, load_job, load_recipe
from rsb_cluster.config.schema import flatten, read_text
from rsb_cluster.submission.data_location import find_data, require_data
from rsb_cluster.submission.own_data import filled, fit_to_data


def recipe_for_data(name: str, data: str, new_name: str, *, stats: bool) -> tuple[str, Resolved, dict[str, Any]]:
    """Return the text of a recipe's file with the values of a data set.

    Args:
        name: The recipe, a name or a path.
        data: Folder of the data set, or of data sets.
        new_name: Name of the copy, which tells its runs apart; ignored if it cannot be a recipe's.
        stats: Also measure mean and standard deviation of the training images.

    Returns:
        The text, the recipe as it was, and the fields that were replaced, with their values.

    Raises:
        ConfigError: There is no such recipe, or it cannot be trained on the data.
        DataError: There are no shards.
    """
    resolved = load_recipe(name)
    location = find_data(resolved.recipe.data.set, data, load_job("local")[0])
    require_data(location)
    fitted = fit_to_data(resolved, location, stats=stats).recipe
    changes = filled(resolved.recipe, fitted)
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]*", new_name):
        changes = {"name": new_name} | changes
    text = _with_values(read_text(resolved.path), changes, flatten(resolved.recipe), location.url)
    return text, resolved, changes


def _with_values(text: str, changes: dict[str, Any], before: dict[str, Any], data: str) -> str:
    """Return TOML with some values replaced, each with a comment that says what it was."""
    import tomlkit

    document = tomlkit.parse(text)
    for path, value in changes.items():
        *tables, key = path.split(".")
        table: Any = document
        for part in tables:
            table = table.setdefault(part, tomlkit.table())
        item = tomlkit.item(list(value) if isinstance(value, tuple) else value)
        was = ", ".join(map(str, before[path])) if isinstance(before[path], tuple) else before[path]
        item.comment(f"from {data}; was {was}" if path != "name" else f"was {was}")
        item.trivia.comment_ws = "  "
        table[key] = item
    return tomlkit.dumps(document)
