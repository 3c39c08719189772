"""The program that runs a user's ``job.notify_command`` with a run's end as JSON on its standard input.

Its own request comes as JSON on standard input (`rsb_cluster.node.notify`), and its exit code is the command's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from rsb_cluster.errors import RsbError
from rsb_cluster.results.collect import collect, render
from rsb_cluster.runs.run import Run


def message(run: Run, state: str, reason: str) -> dict[str, Any]:
    """Return what the command is told: ``run_id``, ``url``, ``state``, ``reason``, and ``row``.

    The row is that of ``collect --format json``; null if it cannot be made.
    """
    return {"run_id": run.run_id, "url": run.url, "state": state, "reason": reason, "row": _row(run)}


def _row(run: Run) -> dict[str, Any] | None:
    try:
        table = json.loads(render(collect([run], []), "json"))
    except RsbError as error:
        sys.stderr.write(f"no row of the table: {error}\n")
        return None
    rows: list[dict[str, Any]] = [row for group in table["groups"] for row in group["runs"]]
    return next(iter([*rows, *table["unfinished"]]), None)


def main() -> int:
    """Run the command of the request, and return its exit code."""
    request = json.load(sys.stdin)
    runs_url, _, run_id = request["run_url"].rpartition("/")
    told = message(Run.at(runs_url, run_id), request["state"], request["reason"])
    # In the session of this process, which ends with it.
    return subprocess.run(["sh", "-c", request["command"]], input=json.dumps(told).encode()).returncode


if __name__ == "__main__":
    sys.exit(main())
