"""The options that `submit` and `sweep` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from rsb_cluster.cli import complete
from rsb_cluster.cli.parameters import Nodes
from rsb_cluster.cli.site_options import site_options
from rsb_cluster.cli.terminal import set_option

_OPTIONS = (
    click.option(
        "--job",
        default="",
        shell_complete=complete.jobs,
        help="Where to train: a name or a .toml file.  [default: slurm where it is installed, else local; local for "
        "recipes that make their own data]",
    ),
    click.option(
        "--nodes",
        type=Nodes(),
        default="",
        help="Number of nodes; 2-4: at least 2, and up to 4 if they are free.  [default: the job's]",
    ),
    site_options(),
    click.option("--exclude-failed-hosts", is_flag=True, help="Exclude nodes on which ranks of these runs failed."),
    click.option("--gpus-per-node", type=click.IntRange(0), help="GPUs per node; 0: CPUs.  [default: the job's]"),
    click.option(
        "--parallel",
        default=0,
        type=click.IntRange(0),
        help="Runs of a job array at the same time, at most.  [default: 256]",
    ),
    click.option(
        "--max-gpu-hours",
        type=click.FloatRange(0, min_open=True),
        help="GPU-hour budget of each run over all attempts (process-hours on CPUs). A run that reaches it saves a "
        "checkpoint and stops.",
    ),
    click.option(
        "--data",
        default="",
        shell_complete=complete.folders,
        help="Folder or s3:// URL with train/ and val/. If these are not the recipe's own data, its numbers of classes "
        "and images are replaced.  [default: data/<set>]",
    ),
    click.option(
        "--stats",
        is_flag=True,
        help="Measure mean and std of the training images, and normalise by these instead of the recipe's.",
    ),
    click.option(
        "--runs", default="", help="Folder or s3:// URL of the runs.  [default: runs, or that of 'config show']"
    ),
    click.option(
        "--share",
        type=click.Choice(["private", "group"]),
        help="Who may read the runs: only you, or also the group of the folder of runs.  [default: the job's]",
    ),
    click.option(
        "--init",
        default="",
        metavar="SOURCE",
        shell_complete=complete.weights,
        help="Initial weights: a run, a weight file, or a timm model name.",
    ),
    click.option(
        "--save-diff",
        is_flag=True,
        help="Save uncommitted changes of rsb-cluster's own checkout beside the runs (diffs/). Their SHA-256 is always "
        "recorded.",
    ),
    click.option("--cache-dir", default="", help="Cache shards in this folder on each node's local disk."),
    click.option(
        "--virtual-ranks",
        default=0,
        type=click.IntRange(0),
        help="Number of micro-batches of a step, over all processes. It makes another run, marked as modified.  "
        "[default: the recipe's]",
    ),
    set_option("KEY=VALUE", "Override a field of the recipe, or with job.KEY of the job."),
    click.option(
        "--resubmit", is_flag=True, help="Cancel the queued jobs of these runs and submit them anew, to change options."
    ),
    click.option("--dry-run", is_flag=True, help="Check and print everything, submit nothing."),
    click.option(
        "--wait",
        is_flag=True,
        help="Show progress until the runs have ended. Ctrl-C saves and stops runs on this machine; on Slurm and in a "
        "cloud they continue, and the exit code is 130.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON."),
)


def submit_options(command: Callable[..., Any]) -> Any:
    """Add the options; the command gets those of the site as ``site``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
