"""Following runs on a terminal: a live bar of one, a live table of many, or plain lines where the output is a file."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Protocol

from rich.console import Console, Group, JustifyMethod
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from rsb_cluster.errors import RsbError
from rsb_cluster.monitor import actions
from rsb_cluster.monitor.status import Status, duration, interest, is_over, read_status, summary
from rsb_cluster.runs.run import Run

POLL_S = 0.5
# Of many runs: neither the file system nor the scheduler must feel that somebody looks.
POLL_MANY_S = 2.0
PLAIN_EVERY_S = 10.0

COLOURS = {"finished": "green", "running": "cyan", "starting": "cyan"} | dict.fromkeys(
    ("failed", "crashed", "killed", "broken", "missing"), "red"
)


HEADER = ("run", "state", "try", "epoch", "step", "img/s", "to go", "top-1", "last end")
MIN_ID, MIN_MESSAGE = 24, 10  # characters
ID_END = len("-s0-0123abcd")  # what tells runs of one model apart


class _Shown(Protocol):
    """Where states are shown."""

    def __enter__(self) -> _Shown: ...
    def __exit__(self, *_: object) -> None: ...
    def update(self, found: Sequence[Status]) -> None: ...


def follow(runs: Sequence[Run], console: Console) -> list[Status] | None:
    """Show runs until they have ended, or until Ctrl-C where their jobs do not depend on this terminal.

    Ctrl-C lets runs on this machine save and stop; twice ends them at once. Runs on Slurm or in a cloud go on, and so
    do all where there are both.

    Args:
        runs: What to follow.
        console: Where to show it; standard error, as standard output is for results.

    Returns:
        How they have ended; None where Ctrl-C ended the looking and they go on.
    """
    stopping = left = False

    def stop(working: Sequence[Run]) -> bool:
        nonlocal stopping, left
        if not stopping and actions.outlives_terminal(working):
            left = True
            return True
        console.print("Ending at once." if stopping else "Saving and stopping; press Ctrl-C again to end at once.")
        stopping = True
        try:
            actions.cancel(working)
        except RsbError as error:
            sys.stderr.write(f"{error}\n")
        return False

    found = _look(runs, console, on_interrupt=stop)
    return None if left else found


def watch(runs: Sequence[Run], console: Console) -> list[Status]:
    """Show runs until they have ended, or until Ctrl-C, which ends the looking and nothing else."""
    return _look(runs, console, on_interrupt=lambda working: True)


def _look(runs: Sequence[Run], console: Console, *, on_interrupt: Callable[[Sequence[Run]], bool]) -> list[Status]:
    """Show runs until they have ended.

    Args:
        runs: What to show.
        console: Where.
        on_interrupt: Called for each Ctrl-C with the runs that have not ended; says whether to look no longer.
    """
    shown: _Shown = _Lines(console)
    if console.is_terminal:
        shown = _Bar(runs[0], console) if len(runs) == 1 else _LiveTable(console)
    presses, answered = 0, 0

    # Counted and not raised: the second one would come while the first is being answered.
    def count(number: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1

    before = signal.signal(signal.SIGINT, count)
    try:
        with shown:
            while True:
                started = time.monotonic()
                found = read_status(runs)
                shown.update(found)
                if all(is_over(status) for status in found):
                    return found
                while answered < presses:
                    answered += 1
                    if on_interrupt([run for run, s in zip(runs, found, strict=True) if not is_over(s)]):
                        return found
                took = time.monotonic() - started
                time.sleep(max(POLL_S if len(runs) == 1 else POLL_MANY_S, took))
    finally:
        signal.signal(signal.SIGINT, before)


def _numbers(status: Status) -> str:
    parts = [f"epoch {status.epoch:.1f}", f"step {status.step}/{status.total_steps}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.images_per_s is not None:
        parts.append(f"{status.images_per_s:,.0f} images/s")
    if status.top1 is not None:
        parts.append(f"top-1 {status.top1:.2f} %")
    if status.eta_s is not None:
        parts.append(f"{duration(status.eta_s)} to go")
    return "  ".join(parts)


class _Fields(ProgressColumn):
    """The run's numbers, right of its bar."""

    def render(self, task: Task) -> Text:
        """Return them as one piece of text."""
        return Text(task.fields["numbers"])


class _Bar:
    """A live bar of one run."""

    def __init__(self, run: Run, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            TextColumn("{task.fields[state]}"),
            BarColumn(20),
            _Fields(),
            console=console,
        )
        self._task = self._progress.add_task(run.run_id, state="", numbers="", total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, found: Sequence[Status]) -> None:
        """Show the present state."""
        (status,) = found
        self._progress.update(
            self._task,
            completed=status.step,
            total=status.total_steps,
            state=status.state,
            numbers=_numbers(status),
        )


class _LiveTable:
    """A live table of as many runs as the terminal has lines, those that need a person first."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> _LiveTable:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, found: Sequence[Status]) -> None:
        """Show the present state."""
        self._live.update(overview(found, width=self._console.width, lines=self._console.height), refresh=True)


def overview(found: Sequence[Status], *, width: int, lines: int) -> Group:
    """Return a table that fits a terminal, with the counts of all runs and the time of day above."""
    by_interest = sorted(found, key=lambda status: interest(status.state))
    room = max(1, lines - 3)  # the counts, the header, and the cursor's line
    shown = by_interest if len(found) <= room else by_interest[: room - 1]
    parts: list[Text | Table] = [
        Text(f"{time.strftime('%H:%M:%S')}  {summary(found)}", no_wrap=True),
        table(shown, width),
    ]
    if hidden := by_interest[len(shown) :]:
        parts.append(Text(f"… and {summary(hidden)}", style="dim", no_wrap=True))
    return Group(*parts)


class _Lines:
    """A line per run, when something changed and at most every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, tuple[str, float]] = {}

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, found: Sequence[Status]) -> None:
        """Print what changed."""
        now = time.monotonic()
        for status in found:
            state, when = self._last.get(status.run_id, ("", 0.0))
            if status.state != state or (not is_over(status) and now - when >= PLAIN_EVERY_S):
                self._last[status.run_id] = (status.state, now)
                line = f"{status.run_id}: {status.state}, {_numbers(status)}"
                self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def table(found: Sequence[Status], width: int) -> Table:
    """Return a table with one line per run.

    Args:
        found: How the runs are.
        width: Characters of a line; what does not fit is cut from messages first, then from ids.
    """
    engines = any(s.engine for s in found)
    header = (*HEADER[:2], "engine", *HEADER[2:]) if engines else HEADER
    rows = [
        (
            s.run_id,
            s.state,
            *([s.engine or "–"] if engines else []),
            str(s.attempt or "–"),
            f"{s.epoch:.1f}",
            f"{s.step}/{s.total_steps}" if s.total_steps else "–",
            f"{s.images_per_s:,.0f}" if s.images_per_s else "–",
            duration(s.eta_s),
            f"{s.top1:.2f}" if s.top1 is not None else "–",
            s.cause.replace("\n", " ") or "–",
        )
        for s in found
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    room = width - sum(widths[1:-1]) - 2 * (len(widths) - 1)
    widths[0] = min(widths[0], max(MIN_ID, room - MIN_MESSAGE))
    widths[-1] = max(1, min(widths[-1], room - widths[0]))
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, of in zip(header, widths, strict=True):
        justify: JustifyMethod = "left" if name in ("run", "state", "engine", "last end") else "right"
        shown.add_column(name, justify=justify, width=of, no_wrap=True, overflow="ellipsis")
    for status, cells in zip(found, rows, strict=True):
        # Text and not str: a message may hold brackets, which rich would take for markup.
        run_id, state, *others = map(Text, cells)
        shown.add_row(_middle_cut(run_id, widths[0]), Text(state.plain, style=COLOURS.get(status.state, "")), *others)
    return shown


def _middle_cut(text: Text, width: int) -> Text:
    """Return an id that fits: its end is what tells runs apart."""
    if len(text) <= width:
        return text
    return text[: width - ID_END - 1] + Text("…") + text[-ID_END:]
