"""Runs as a table that fits a terminal, as tab-separated values, and filtered and sorted."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from rsb_cluster.errors import ConfigError, did_you_mean
from rsb_cluster.monitor.status import STATES, Status, attention_order, format_duration
from rsb_cluster.node.processes import Process

COLOURS = {"finished": "green", "running": "cyan", "starting": "cyan"} | dict.fromkeys(
    ("failed", "crashed", "stuck", "killed", "broken", "missing"), "red"
)

MIN_ID, MIN_REASON = 24, 10  # characters
ID_END = len("-s0-0123abcd")  # the part of an id that distinguishes runs of one model
_LEFT = ("run", "state", "job", "engine", "host", "reason")
# Columns that a narrow terminal does without, the first ones first.
_LESS_NEEDED = ("epoch", "attempt", "img/s", "host", "job", "engine", "ETA", "top-1", "step", "reason")
_MAX_HOST = 24

# The fields of a status in its tab-separated line, by their names in JSON.
TSV_FIELDS = (
    "run_id", "state", "job_id", "engine", "hosts", "attempt", "epoch", "step", "total_steps", "images_per_s", "loss",
    "eta_s", "top1", "cause",
)  # fmt: skip

# Each best or newest first, runs without a value last.
SORT_KEYS: dict[str, Callable[[Status], Any]] = {
    "run": lambda s: s.run_id,
    "state": lambda s: attention_order(s.state),
    "recipe": lambda s: (s.recipe, s.model),
    "model": lambda s: (s.model, s.recipe),
    "updated": lambda s: -s.updated,
    "progress": lambda s: -s.step / s.total_steps if s.total_steps else 1.0,
    "top1": lambda s: 1.0 if s.top1 is None else -s.top1,
    "eta": lambda s: float("inf") if s.eta_s is None else s.eta_s,
}


@dataclass(frozen=True)
class Filter:
    """Which runs to show.

    Attributes:
        states: Their states; empty: all.
        recipes: Names of their recipes, or globs; empty: all.
        models: Names of their models, or globs; empty: all.
        since: Unix time of their last submit, start or end at the earliest.

    Raises:
        ConfigError: There is no such state.
    """

    states: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    since: float = 0.0

    def __post_init__(self) -> None:
        for state in self.states:
            if state not in STATES:
                raise ConfigError(
                    f"--state: no run has the state '{state}'.{did_you_mean(state, STATES)} Known: {', '.join(STATES)}."
                )

    def takes(self, status: Status) -> bool:
        """Whether a run is to be shown."""
        return (
            (not self.states or status.state in self.states)
            and _matches(status.recipe, self.recipes)
            and _matches(status.model, self.models)
            and status.updated >= self.since
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def tsv(found: Sequence[Status]) -> str:
    """Return a line per run, and one with the names of the fields above; fields without a value are empty."""
    lines = ["\t".join(TSV_FIELDS)]
    lines += ["\t".join(_field(getattr(status, name)) for name in TSV_FIELDS) for status in found]
    return "\n".join(lines)


def _field(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    return " ".join(text.split())  # without tabs and newlines


def table(found: Sequence[Status], width: int) -> Table:
    """Return a table with one line per run, without columns that are empty.

    Args:
        found: The statuses of the runs.
        width: Characters per line; reasons are shortened first, then ids; then less important columns are left out.
    """
    columns: dict[str, list[str]] = {
        "run": [s.run_id for s in found],
        "state": [s.state for s in found],
        "engine": [s.engine for s in found],
        "job": [short_job(s.job_id) for s in found],
        "host": [short_hosts(s.hosts) for s in found],
        "attempt": [str(s.attempt or "") for s in found],
        "epoch": [f"{s.epoch:.1f}" if s.total_steps else "" for s in found],
        "step": [f"{s.step}/{s.total_steps}" if s.total_steps else "" for s in found],
        "img/s": [f"{s.images_per_s:,.0f}" if s.images_per_s else "" for s in found],
        "ETA": [format_duration(s.eta_s) if s.eta_s is not None else "" for s in found],
        "top-1": [f"{s.top1:.2f}" if s.top1 is not None else "" for s in found],
        "reason": [reason(s) for s in found],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells) or name in ("run", "state")}
    widths = _fit(columns, width)
    built = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, column_width in widths.items():
        justify: JustifyMethod = "left" if name in _LEFT else "right"
        built.add_column(name, justify=justify, width=column_width, no_wrap=True, overflow="ellipsis")
    for i, status in enumerate(found):
        # Text and not str: a message may hold brackets, which rich would take for markup.
        cells = [Text(columns[name][i] or ("" if name == "reason" else "–")) for name in widths]
        cells[0] = _middle_cut(cells[0], widths["run"])
        cells[1].style = COLOURS.get(status.state, "")
        built.add_row(*cells)
    return built


def reason(status: Status) -> str:
    """Return the cause of a run's state in one line, without the state itself: that is in a column of its own."""
    text = status.cause.replace("\n", " ")
    if status.job_id:
        text = text.replace(status.job_id, short_job(status.job_id))
    if text == status.state:
        return ""
    start = f"{status.state} ("
    return text[len(start) : -1] if text.startswith(start) and text.endswith(")") else text


def _fit(columns: dict[str, list[str]], width: int) -> dict[str, int]:
    """Return the widths of the columns that fit a line. A column of numbers is whole or left out, never cut."""
    widths = {name: max(len(name), *map(len, cells)) for name, cells in columns.items()}
    smallest = {"run": min(widths["run"], MIN_ID), "reason": min(widths.get("reason", 0), MIN_REASON)}
    for name in _LESS_NEEDED:
        if sum((widths | {k: v for k, v in smallest.items() if k in widths}).values()) <= width - 2 * (len(widths) - 1):
            break
        widths.pop(name, None)
    room = width - 2 * (len(widths) - 1) - sum(w for name, w in widths.items() if name not in smallest)
    widths["run"] = max(1, min(widths["run"], room - smallest["reason"] if "reason" in widths else room))
    if "reason" in widths:
        widths["reason"] = max(1, min(widths["reason"], room - widths["run"]))
    return widths


def short_job(job_id: str) -> str:
    """Return a job's id for a table: of a job on a machine without scheduler the PID of its process."""
    process = Process.parse(job_id)
    return job_id if process is None else f"pid {process.pid}"


def short_hosts(hosts: Sequence[str]) -> str:
    """Return ``n1``, or ``n1 +3`` of four hosts."""
    if not hosts:
        return ""
    first = hosts[0] if len(hosts[0]) <= _MAX_HOST else hosts[0][: _MAX_HOST - 1] + "…"
    return first if len(hosts) == 1 else f"{first} +{len(hosts) - 1}"


def _middle_cut(text: Text, width: int) -> Text:
    """Return an id that fits; the middle is cut, as its end distinguishes runs."""
    if len(text) <= width:
        return text
    end = min(ID_END, width - 1)
    return text[: width - end - 1] + Text("…") + text[len(text) - end :]
