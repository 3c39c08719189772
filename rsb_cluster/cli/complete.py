"""What the shell completes: names of recipes, jobs, sweeps, runs and models, and files; without S3 and torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import click
from click.shell_completion import CompletionItem

from rsb_cluster.errors import RsbError

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _completer(names: Callable[[click.Context], Iterable[str]], *, is_list: bool = False) -> Completer:
    """Return what click calls for the words that an incomplete one may become.

    Args:
        names: All names.
        is_list: Whether the word is names with commas between, of which the last is completed.
    """

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if "/" in incomplete or incomplete.startswith((".", "~")):
            return [CompletionItem(incomplete, type="file")]
        done, comma, last = incomplete.rpartition(",") if is_list else ("", "", incomplete)
        found: list[str] = []
        with suppress(RsbError, OSError):  # a completion says nothing where it cannot look
            found = sorted({name for name in names(ctx) if name.startswith(last)})
        return [CompletionItem(f"{done}{comma}{name}") for name in found]

    return complete


def _of_kind(kind: str) -> Callable[[click.Context], Iterable[str]]:
    def names(ctx: click.Context) -> Iterable[str]:
        from rsb_cluster.config import catalog

        return catalog.available(kind)  # type: ignore[arg-type]  # one of its kinds

    return names


def _runs(ctx: click.Context) -> Iterable[str]:
    from rsb_cluster.runs.lookup import list_evaluations, list_folders, runs_folder
    from rsb_cluster.runs.sweep import sweep_ids

    url = runs_folder(ctx.params.get("runs") or "")
    if "://" in url:
        return []
    return [*(run.run_id for run in (*list_folders(url), *list_evaluations(url))), *sweep_ids(url)]


def _models(ctx: click.Context) -> Iterable[str]:
    from rsb_cluster.results.references import known_models

    return known_models()  # timm's own list would need torch


def folders(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Have the shell complete the name of a folder; there is nothing to offer for a URL."""
    return [] if "://" in incomplete else [CompletionItem(incomplete, type="dir")]


recipes = _completer(_of_kind("recipes"))
recipe_list = _completer(_of_kind("recipes"), is_list=True)
jobs = _completer(_of_kind("jobs"))
sweeps = _completer(_of_kind("sweeps"))
runs = _completer(_runs)
models = _completer(_models)
model_list = _completer(_models, is_list=True)
weights = _completer(lambda ctx: [*_runs(ctx), *_models(ctx)])
