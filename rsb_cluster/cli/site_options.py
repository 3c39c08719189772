"""The options that say where in a cluster a job runs: of trainings, and of evaluations as jobs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from rsb_cluster.cli.parameters import TimeLimit

_DEFAULT = "  [default: the job's, else the site's]"
_OR_SETTING = "  [default: the job's, else that of 'config show', else the site's]"


def site_options(condition: str = "") -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that adds the options; the command gets them as ``site``: a `submission.site.Site`.

    Args:
        condition: What they need, as the beginning of each help text.
    """
    options = (
        click.option("--partition", default="", help=f"{condition}Slurm partition.{_OR_SETTING}"),
        click.option("--account", default="", help=f"{condition}Slurm account.{_OR_SETTING}"),
        click.option("--qos", default="", help=f"{condition}Slurm QOS.{_DEFAULT}"),
        click.option(
            "--time",
            "time_min",
            type=TimeLimit(),
            default=0,
            show_default=False,
            help=f"{condition}Time limit of an attempt; the next one resumes.  [default: the job's]",
        ),
        click.option(
            "--gpu-type", default="", help=f"{condition}Slurm's name of the GPUs, such as a100.  [default: the job's]"
        ),
    )
    names = ("partition", "account", "qos", "time_min", "gpu_type")

    def add(command: Callable[..., Any]) -> Any:
        @functools.wraps(command)
        def with_site(*args: Any, **given: Any) -> Any:
            from rsb_cluster.submission.site import Site

            return command(*args, site=Site(**{name: given.pop(name) for name in names}), **given)

        decorated: Any = with_site
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return add
