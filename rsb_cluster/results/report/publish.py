"""Writes a sweep's results next to the sweep, for all who can read the runs."""

from __future__ import annotations

from pathlib import Path

from rsb_cluster.results.collect import collect, render
from rsb_cluster.results.report.page import report
from rsb_cluster.runs.lookup import find_runs
from rsb_cluster.runs.sharing import make_common_folder
from rsb_cluster.runs.sweep import FOLDER, read_sweep
from rsb_cluster.storage.store import Store


def publish(runs_url: str, name: str) -> Store:
    """Write ``collect.json`` and ``report.html`` to ``<runs>/sweeps/<sweep_id>/``; return that folder.

    All who can read the folder of runs can read them, whatever the umask, also where they may not read the runs.

    Raises:
        ConfigError: There is no such sweep.
        StorageError: The folder is another user's.
    """
    sweep = read_sweep(runs_url, name)
    make_common_folder(runs_url, FOLDER, sweep.sweep_id)
    folder = Store(runs_url).child(FOLDER, sweep.sweep_id)
    collected = collect(find_runs(runs_url, (sweep.sweep_id,)), [sweep])
    folder.write_bytes("collect.json", render(collected, "json").encode())
    output = Path(folder.url if folder.is_local else ".") / "report.html"
    folder.write_bytes("report.html", report(collected, title=sweep.sweep_id, output=output).encode())
    return folder
