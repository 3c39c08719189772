"""Commands that turn runs into tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rsb_cluster.cli.terminal import find_with_sweeps, run_arguments, runs_option, runs_url, say
from rsb_cluster.errors import ConfigError


@click.command()
@run_arguments
@runs_option
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "csv", "json", "md", "latex", "html"]),
    default="table",
    show_default=True,
    help="How to print it.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write to a file.")
@click.option("--publish", is_flag=True, help="Write collect.json and report.html next to each sweep that is named.")
def collect(names: tuple[str, ...], runs: str, format_: Any, output: Path | None, publish: bool) -> None:
    """Make a table of runs: final top-1, mean ± std over seeds, against the paper's number.

    A second table has what 'evaluate' found: other labels, other data sets, and weights that are no run's.
    """
    from rsb_cluster.results.collect import collect as verb
    from rsb_cluster.results.collect import render

    if publish:
        _publish(names, runs)
        return
    collected = verb(*find_with_sweeps(names, runs), weights_in="" if names else runs_url(runs))
    if output is None:
        click.echo(render(collected, format_), nl=False)
    else:
        _write(output, render(collected, format_, terminal=False))


def _publish(names: tuple[str, ...], runs: str) -> None:
    from rsb_cluster.results.report import publish

    if not names:
        raise ConfigError("--publish writes next to a sweep: name one.")
    for name in names:
        say(f"wrote collect.json and report.html to {publish(runs_url(runs), name).url}")


@click.command()
@run_arguments
@runs_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File.  [default: report.html]")
@click.option("--title", default="", help="Heading.  [default: what was named]")
def report(names: tuple[str, ...], runs: str, output: Path | None, title: str) -> None:
    """Write one HTML file on runs or sweeps: verdicts, curves, cost, timeline. It opens without a network."""
    from rsb_cluster.results.collect import collect as verb
    from rsb_cluster.results.report import default_output
    from rsb_cluster.results.report import report as page

    output = output or default_output()
    collected = verb(*find_with_sweeps(names, runs))
    _write(output, page(collected, title=title or ", ".join(names) or "All runs", output=output))


def _write(output: Path, text: str) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}. Name another file with -o.") from error
    say(f"wrote {output}")
