"""The commands that summarize runs as tables and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rsb_cluster.cli.terminal import find_runs_and_sweeps, log, run_arguments, runs_option, runs_url
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
    help="Output format.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; as --format json.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write to this file.  [default: standard output]")
@click.option("--publish", is_flag=True, help="Write collect.json and report.html next to each SWEEP.")
def collect(names: tuple[str, ...], runs: str, format_: Any, as_json: bool, output: Path | None, publish: bool) -> None:
    """Print a table of results. For each model: mean ± std of the final top-1 over seeds, and the paper's number.

    A second table shows the results of 'evaluate': other labels, other data sets, and weights from elsewhere.
    """
    from rsb_cluster.results.collect import collect as collect_runs
    from rsb_cluster.results.collect import render

    if as_json and format_ not in ("table", "json"):
        raise click.UsageError(f"--json and --format {format_} contradict each other. Use one of them.")
    format_ = "json" if as_json else format_
    if publish:
        if output or format_ != "table":
            raise click.UsageError("--publish writes collect.json and report.html, without -o, --format and --json.")
        _publish(names, runs)
        return
    collected = collect_runs(*find_runs_and_sweeps(names, runs), weights_in="" if names else runs_url(runs))
    if format_ in ("csv", "json"):  # the tables have them below
        for problem in collected.unreadable:
            log(f"an evaluation is left out: {problem}")
    if output is None:
        click.echo(render(collected, format_), nl=False)
    else:
        _write(output, render(collected, format_, terminal=False))


def _publish(names: tuple[str, ...], runs: str) -> None:
    from rsb_cluster.results.report import publish

    if not names:
        raise ConfigError("--publish writes next to a sweep: name a sweep.")
    for name in names:
        log(f"wrote collect.json and report.html to {publish(runs_url(runs), name).url}")


@click.command()
@run_arguments
@runs_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write to this file.  [default: report.html]")
@click.option("--title", default="", help="Title of the page.  [default: the names given]")
def report(names: tuple[str, ...], runs: str, output: Path | None, title: str) -> None:
    """Write an HTML report on runs or sweeps. It has verdicts, curves, cost and a timeline, and works offline."""
    from rsb_cluster.results.collect import collect as collect_runs
    from rsb_cluster.results.report import default_output
    from rsb_cluster.results.report import report as render_report

    output = output or default_output()
    collected = collect_runs(*find_runs_and_sweeps(names, runs), weights_in="" if names else runs_url(runs))
    _write(output, render_report(collected, title=title or ", ".join(names) or "All runs", output=output))


def _write(output: Path, text: str) -> None:
    if not output.parent.is_dir():
        raise ConfigError(
            f"cannot write {output}: there is no folder {output.parent}. Make it, or name another with -o."
        )
    try:
        output.write_text(text, encoding="utf-8", errors="replace")  # an argument may be no UTF-8
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}. Name another file with -o.") from error
    log(f"wrote {output}")
