"""The command that shows the user's settings."""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import replace

import click

from rsb_cluster.cli.terminal import console, log, new_table
from rsb_cluster.config.environment import PREFIX, VARIABLES


@click.group()
def config() -> None:
    """Show your defaults, and where each comes from."""


@config.command("show")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def config_show(as_json: bool) -> None:
    """Show each setting, its value here, and what says so.

    A setting is used where neither an option nor a job file says anything. An environment variable (RSB_RUNS, ...)
    comes before ./rsb-cluster.toml, and this before ~/.config/rsb-cluster/config.toml; both files are lines such as
    account = "vision".

    \b
    rsb-cluster config show
    """
    from rich.text import Text

    from rsb_cluster.backends import default_job
    from rsb_cluster.config.settings import HERE, Settings, data_root, settings, user_file
    from rsb_cluster.runs.lookup import runs_folder

    defaults = {"runs": runs_folder(), "data": data_root(), "job": default_job(1), "share": "private"}
    found = {n: s if s.value else replace(s, value=defaults.get(n, "")) for n, s in settings().items()}
    if as_json:
        click.echo(json.dumps({name: vars(setting) for name, setting in found.items()}, indent=2))
        return
    table = new_table("setting", "value", "from", "meaning")
    for name, setting in found.items():
        meaning = Settings.model_fields[name].description or ""
        table.add_row(name, *map(Text, (setting.value, setting.source, meaning)))
    console().print(table)
    for name in sorted(os.environ.keys() - VARIABLES.keys()):
        if name.startswith(PREFIX) and (meant := difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.85)):
            log(f"note: {name} is set, and means nothing here. Did you mean {meant[0]}?")
    log(f"change them in ./{HERE} or {user_file()}")
