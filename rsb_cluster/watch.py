"""Following runs on a terminal, as live bars, or as plain lines where the output is a file."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from rsb_cluster import control
from rsb_cluster.errors import SubmitError
from rsb_cluster.run import Run
from rsb_cluster.status import Status, duration, is_over, read_status

POLL_S = 0.5
PLAIN_EVERY_S = 10.0


class _Fields(ProgressColumn):
    """The run's numbers, right of its bar."""

    def render(self, task: Task) -> Text:
        """Return them as one piece of text."""
        return Text(task.fields["numbers"])


def follow(runs: Sequence[Run], console: Console) -> list[Status]:
    """Show runs until they have ended. Ctrl-C lets them save and stop; twice ends them at once.

    Args:
        runs: What to follow.
        console: Where to show it; standard error, as standard output is for results.
    """
    presses, answered = 0, 0

    # Counted and not raised: the second one would come while the first is being answered.
    def count(number: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1

    before = signal.signal(signal.SIGINT, count)
    shown = _Bars(runs, console) if console.is_terminal else _Lines(runs, console)
    try:
        with shown:
            while True:
                while answered < presses:
                    answered += 1
                    console.print(
                        "Saving and stopping; press Ctrl-C again to end at once."
                        if answered == 1
                        else "Ending at once."
                    )
                    _stop(runs)
                found = read_status(runs)
                shown.update(found)
                if all(is_over(status) for status in found):
                    return found
                time.sleep(POLL_S)
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(runs: Sequence[Run]) -> None:
    for run in runs:
        try:
            control.cancel(run)
        except SubmitError as error:
            sys.stderr.write(f"{error}\n")


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


class _Bars:
    """One live bar per run."""

    def __init__(self, runs: Sequence[Run], console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            TextColumn("{task.fields[state]}"),
            BarColumn(20),
            _Fields(),
            console=console,
        )
        self._tasks = {
            run.run_id: self._progress.add_task(run.run_id, state="", numbers="", total=None) for run in runs
        }

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, found: Sequence[Status]) -> None:
        """Show the present state."""
        for status in found:
            self._progress.update(
                self._tasks[status.run_id],
                completed=status.step,
                total=status.total_steps,
                state=status.state,
                numbers=_numbers(status),
            )


class _Lines:
    """A line per run, when something changed and at most every few seconds."""

    def __init__(self, runs: Sequence[Run], console: Console) -> None:
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
            if status.state != state or now - when >= PLAIN_EVERY_S:
                self._last[status.run_id] = (status.state, now)
                line = f"{status.run_id}: {status.state}, {_numbers(status)}"
                self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def table(found: Sequence[Status]) -> Table:
    """Return a table with one line per run."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state", "attempt", "epoch", "step", "images/s", "to go", "top-1", "job", "last end"):
        shown.add_column(
            name, justify="left" if name in ("run", "state", "job", "last end") else "right", overflow="fold"
        )
    colours = {"finished": "green", "running": "cyan", "failed": "red", "crashed": "red"}
    for s in found:
        cells = (
            str(s.attempt or "–"),
            f"{s.epoch:.1f}",
            f"{s.step}/{s.total_steps}",
            f"{s.images_per_s:,.0f}" if s.images_per_s else "–",
            duration(s.eta_s),
            f"{s.top1:.2f}" if s.top1 is not None else "–",
            s.job_id or "–",
            s.cause or "–",
        )
        # Text and not str: a message may hold brackets, which rich would take for markup.
        shown.add_row(Text(s.run_id), Text(s.state, style=colours.get(s.state, "")), *map(Text, cells))
    return shown
