"""The command line: parse the options, make one call, print the result. Heavy imports wait until they are needed."""

from __future__ import annotations

import os
from typing import Any

import click

from rsb_cluster import __version__
from rsb_cluster.cli import catalog, doctor, evaluate, export, results, runs, selftest, shards, submit
from rsb_cluster.errors import RsbError
from rsb_cluster.subprocesses.interpreter import drop_empty_entries


class ErrorGroup(click.Group):
    """Prints an RsbError as a message and sets the exit code; any other exception is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except RsbError as error:
            reported = click.ClickException(str(error))
            reported.exit_code = error.exit_code  # type: ignore[misc]  # Click's documented way to choose the code
            raise reported from error


@click.group(cls=ErrorGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="rsb-cluster")
def main() -> None:
    """Train the recipes of "ResNet strikes back" on a laptop, on Slurm or on preemptible machines.

    \b
    rsb-cluster submit --recipe digits --wait           train a small model on this machine, in minutes
    rsb-cluster submit --recipe a1 --nodes 4 --dry-run  show what would be submitted to Slurm
    rsb-cluster doctor --job cloud-spot                 check what a job needs, before it costs anything
    rsb-cluster sweep resnet-depths --dry-run           show a sweep of many runs as job arrays
    rsb-cluster collect                                 compare finished runs with the paper's numbers
    """
    drop_empty_entries(os.environ)  # for all processes that are started from here


for _command in (
    catalog.recipes,
    catalog.jobs,
    shards.shards,
    catalog.sweeps,
    submit.submit,
    submit.sweep,
    runs.status,
    runs.logs,
    runs.cancel,
    runs.preempt,
    runs.retry,
    evaluate.evaluate,
    export.export,
    results.collect,
    results.report,
    doctor.doctor,
    selftest.selftest,
):
    main.add_command(_command)
