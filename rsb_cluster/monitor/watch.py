"""Live status of runs: a progress bar for one run, a table for several, plain lines if the output is no terminal."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import FrameType
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from rsb_cluster.errors import RsbError
from rsb_cluster.monitor import actions
from rsb_cluster.monitor.status import Status, attention_order, format_duration, has_ended, read_status, summary
from rsb_cluster.monitor.table import reason, table
from rsb_cluster.runs.run import Run

POLL_S = 0.5
# For several runs, to keep the load on the file system and the scheduler low.
POLL_MANY_S = 2.0
PLAIN_EVERY_S = 10.0
# How soon Ctrl-C is answered.
TICK_S = 0.02


class _View(Protocol):
    """A display of statuses."""

    def __enter__(self) -> _View: ...
    def __exit__(self, *_: object) -> None: ...
    def update(self, found: Sequence[Status]) -> None: ...


def follow(runs: Sequence[Run], console: Console) -> list[Status] | None:
    """Show runs until they have ended, or until Ctrl-C if their jobs do not depend on this terminal.

    Ctrl-C makes runs on this machine save and stop; a second one kills them. If any run is on Slurm or in a cloud,
    Ctrl-C only stops the display, and all runs continue.

    Args:
        runs: The runs to follow.
        console: Where to show them; standard error, as standard output is for results.

    Returns:
        The final statuses; None if Ctrl-C stopped the display and the runs continue.
    """
    stopping = detached = False

    def stop(active: Sequence[Run]) -> bool:
        nonlocal stopping, detached
        if not stopping and actions.outlives_terminal(active):
            detached = True
            return True
        console.print("Killing the runs." if stopping else "Saving and stopping; press Ctrl-C again to kill the runs.")
        stopping = True
        try:
            actions.cancel(active)
        except RsbError as error:
            sys.stderr.write(f"{error}\n")
        return False

    found = _show(runs, console, on_interrupt=stop)
    return None if detached else found


def watch(runs: Sequence[Run], console: Console) -> list[Status]:
    """Show runs until they have ended, or until Ctrl-C, which only stops the display."""
    return _show(runs, console, on_interrupt=lambda active: True)


def _show(runs: Sequence[Run], console: Console, *, on_interrupt: Callable[[Sequence[Run]], bool]) -> list[Status]:
    """Show runs until they have ended.

    Args:
        runs: The runs to show.
        console: Where to show them.
        on_interrupt: Called for each Ctrl-C with the runs that have not ended; returns whether to stop the display.
    """
    view: _View = _Lines(console)
    if console.is_terminal and not console.is_dumb_terminal:
        view = _Bar(runs[0], console) if len(runs) == 1 else _LiveTable(console)
    interrupts, handled = 0, 0
    found: list[Status] = []

    # Counted instead of raised: a second Ctrl-C may come while the first one is handled.
    def count(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1

    def is_stopped_before(is_over: Callable[[], bool]) -> bool:
        """Wait, and answer each Ctrl-C meanwhile; return whether one of them stops the display."""
        nonlocal handled
        while True:
            while handled < interrupts:
                handled += 1
                ended = {status.run_id for status in found if has_ended(status)}
                if on_interrupt([run for run in runs if run.run_id not in ended]):
                    return True
            if is_over():
                return False
            time.sleep(TICK_S)

    previous = signal.signal(signal.SIGINT, count)
    try:
        with view:
            while True:
                started = time.monotonic()
                reading = _start_reading(runs)
                if is_stopped_before(reading.done):
                    return found
                found = reading.result()
                view.update(found)
                if all(has_ended(status) for status in found):
                    return found
                now = time.monotonic()
                due = now + max(POLL_S if len(runs) == 1 else POLL_MANY_S, now - started)
                if is_stopped_before(lambda due=due: time.monotonic() >= due):  # type: ignore[misc]
                    return found
    finally:
        signal.signal(signal.SIGINT, previous)


def _start_reading(runs: Sequence[Run]) -> Future[list[Status]]:
    """Read statuses on another thread, as Ctrl-C must not wait for a scheduler or a store that does not answer."""
    reading: Future[list[Status]] = Future()

    def read() -> None:
        try:
            reading.set_result(read_status(runs))
        except Exception as error:
            reading.set_exception(error)

    threading.Thread(target=read, name="status", daemon=True).start()
    return reading


def _numbers(status: Status) -> str:
    parts = [f"epoch {status.epoch:.1f}", f"step {status.step}/{status.total_steps}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.images_per_s is not None:
        parts.append(f"{status.images_per_s:,.0f} images/s")
    if status.top1 is not None:
        parts.append(f"top-1 {status.top1:.2f} %")
    if status.eta_s is not None:
        parts.append(f"ETA {format_duration(status.eta_s)}")
    return "  ".join(parts)


class _Fields(ProgressColumn):
    """The run's numbers, right of its bar."""

    def render(self, task: Task) -> Text:
        """Return the numbers as text."""
        return Text(task.fields["numbers"])


class _Bar:
    """A live progress bar of one run."""

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
        """Show the current status."""
        (status,) = found
        self._progress.update(
            self._task,
            completed=status.step,
            total=status.total_steps,
            state=status.state,
            numbers="  ".join(filter(None, (_numbers(status), reason(status)))),
        )


class _LiveTable:
    """A live table of as many runs as the terminal has lines; those that need attention come first."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> _LiveTable:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, found: Sequence[Status]) -> None:
        """Show the current status."""
        self._live.update(overview(found, width=self._console.width, lines=self._console.height), refresh=True)


def overview(found: Sequence[Status], *, width: int, lines: int) -> Group:
    """Return a table that fits a terminal, below the time of day and the counts of all runs."""
    ordered = sorted(found, key=lambda status: attention_order(status.state))
    room = max(1, lines - 3)  # without the counts, the header, and the cursor's line
    shown = ordered if len(found) <= room else ordered[: room - 1]
    parts: list[Text | Table] = [
        Text(f"{time.strftime('%H:%M:%S')}  {summary(found)}", no_wrap=True),
        table(shown, width),
    ]
    if hidden := ordered[len(shown) :]:
        parts.append(Text(f"… and {summary(hidden)}", style="dim", no_wrap=True))
    return Group(*parts)


class _Lines:
    """A line per run when its state changes, and every few seconds while it is active."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, tuple[str, float]] = {}

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, found: Sequence[Status]) -> None:
        """Print a line for each run that is due."""
        now = time.monotonic()
        for status in found:
            state, printed = self._last.get(status.run_id, ("", 0.0))
            if status.state != state or (not has_ended(status) and now - printed >= PLAIN_EVERY_S):
                self._last[status.run_id] = (status.state, now)
                state = ": ".join(filter(None, (status.state, reason(status))))
                line = f"{status.run_id}: {state}, {_numbers(status)}"
                self._console.print(line, soft_wrap=True, highlight=False, markup=False)
