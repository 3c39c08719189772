"""The command line: parse the options, make one call, print the result. Heavy imports wait until they are needed."""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Any

import click

from rsb_cluster import __version__
from rsb_cluster.cli import (
    catalog,
    compare,
    config,
    doctor,
    evaluate,
    export,
    results,
    run_folders,
    runs,
    selftest,
    shards,
    shards_make,
    submit,
    sweep,
)  # fmt: skip
from rsb_cluster.config.environment import VARIABLES
from rsb_cluster.errors import RsbError
from rsb_cluster.storage import patience
from rsb_cluster.subprocesses.interpreter import drop_empty_entries

# Errors of writing that the user can mend; click itself handles a broken pipe.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# What an option is called elsewhere: by sbatch, torchrun, and timm's train.py.
_OTHER_OPTIONS = {
    "--gpu": "--gpus-per-node", "--gpus": "--gpus-per-node",
    "--ngpus": "--gpus-per-node", "--nproc-per-node": "--gpus-per-node",
    "--nproc_per_node": "--gpus-per-node", "--gres": "--gpus-per-node", "--nnodes": "--nodes", "--num-nodes": "--nodes",
    "--time-limit": "--time", "--walltime": "--time", "--timeout": "--time", "--queue": "--partition",
    "--lr": "--set optimizer.lr=LR", "--learning-rate": "--set optimizer.lr=LR", "--opt": "--set optimizer.name=NAME",
    "--batch-size": "--set train.global_batch=N", "--epochs": "--set schedule.epochs=N",
    "--data-dir": "--data", "--dataset": "--data", "--output": "--runs", "--pretrained": "--init",
    "--weights": "--init", "--config": "--recipe", "--workers": "--set job.loader_workers=N",
}  # fmt: skip


# Hyphens and dashes of typography, from U+2010 to U+2015, and the minus sign.
_DASHES = (*map(chr, range(0x2010, 0x2016)), "\N{MINUS SIGN}")


class ErrorGroup(click.Group):
    """Prints an RsbError as a message and sets the exit code; any other exception is a bug and keeps its traceback."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line, on whatever standard output there is."""
        _write_to_any_output()
        try:
            return super().main(*args, **options)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            click.echo(f"Error: cannot write {error.filename or 'the output'}: {error.strerror}.", err=True)
            # What is left in the buffer would fail again at the exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse an option that was copied from a text that has made its hyphens into dashes."""
        for arg in args:
            if arg.startswith(_DASHES):
                raise click.UsageError(
                    f"'{arg}' begins with a typographic dash. Type it again: options begin with '--'."
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            if meant := _OTHER_OPTIONS.get(error.option_name.lower()):
                message = f"No such option '{error.option_name}'. Did you mean '{meant}'?"
                raise click.NoSuchOption(error.option_name, message, ctx=error.ctx) from error
            raise
        except RsbError as error:
            reported = click.ClickException(str(error))
            reported.exit_code = error.exit_code  # type: ignore[misc]  # Click's documented way to choose the code
            raise reported from error


def _write_to_any_output() -> None:
    """Replace characters that the terminal's encoding does not have, and do without an output that is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123 - for the rest of the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


_WIDTH = max(map(len, VARIABLES)) + 2
_ENVIRONMENT = "\n".join(["\b", "Environment:", *(f"  {name:<{_WIDTH}}{what}" for name, what in VARIABLES.items())])


@click.group(
    cls=ErrorGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=_ENVIRONMENT,
)
@click.version_option(__version__, prog_name="rsb-cluster")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Train the recipes of "ResNet strikes back" on a laptop, on Slurm or on preemptible machines.

    \b
    rsb-cluster submit --recipe digits --wait           train a small model on this machine, in minutes
    rsb-cluster submit --recipe a1 --nodes 4 --dry-run  show what would be submitted to Slurm
    rsb-cluster doctor --job cloud-spot                 check what a job needs, before it costs anything
    rsb-cluster sweep resnet-depths --dry-run           show a sweep of many runs as job arrays
    rsb-cluster collect                                 compare finished runs with the paper's numbers
    """
    ctx.with_resource(patience.brief())
    drop_empty_entries(os.environ)  # for all processes that are started from here
    _say_what_is_done()


class _ToStandardError(logging.Handler):
    """Prints messages to the standard error of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        click.echo(self.format(record), err=True)


def _say_what_is_done() -> None:
    """Show what this package is doing where it may take more than a moment."""
    logger = logging.getLogger("rsb_cluster")
    if not logger.handlers:
        logger.addHandler(_ToStandardError())
        logger.setLevel(logging.INFO)


shards.shards.add_command(shards_make.make)
for _command in (
    catalog.recipes,
    catalog.jobs,
    shards.shards,
    catalog.sweeps,
    submit.submit,
    sweep.sweep,
    runs.status,
    runs.logs,
    run_folders.runs,
    runs.cancel,
    runs.preempt,
    runs.retry,
    evaluate.evaluate,
    export.export,
    results.collect,
    compare.compare,
    results.report,
    config.config,
    doctor.doctor,
    selftest.selftest,
):
    main.add_command(_command)
