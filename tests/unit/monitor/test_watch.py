"""Tables of runs fit a terminal, and Ctrl-C is answered at once."""

import io
import os
import signal
import threading

import pytest
from rich.console import Console

from rsb_cluster.errors import RsbError
from rsb_cluster.monitor import watch as watching
from rsb_cluster.monitor.status import Status
from rsb_cluster.monitor.watch import overview, watch
from rsb_cluster.runs.run import Attempt
from tests.unit.new_runs import make_run


def printed(what: object, width: int, height: int = 40) -> list[str]:
    shown = io.StringIO()
    Console(file=shown, width=width, height=height).print(what)
    return [line.rstrip() for line in shown.getvalue().splitlines()]


def many(count: int) -> list[Status]:
    found = []
    for i in range(count):
        state = ("finished", "running", "queued", "failed")[i % 4]
        found.append(
            Status(
                f"deit-deit_small_patch16_224-s{i}-0123abcd", "/r", state, attempt=12, epoch=299.9, step=375000,
                total_steps=375300, images_per_s=123456.0, eta_s=86400 * 3, top1=79.86,
                cause="lost peer (rank 3: [/gloo/pair.cc:545] Read error\nand more of it)",
            )
        )  # fmt: skip
    return found


@pytest.mark.parametrize("count", [2, 36, 37, 38, 1000])
def test_the_live_table_fits_the_terminal_and_shows_failures_first(count):
    lines = printed(overview(many(count), width=100, lines=40), 100)
    assert len(lines) < 40 and max(map(len, lines)) <= 100
    assert f"{count} runs: " in lines[0]
    if count == 1000:
        assert all(" failed " in line for line in lines[2:-1])
        hidden = 1000 - len(lines[2:-1])
        assert lines[-1].startswith(f"… and {hidden} runs: ")
    else:
        assert len(lines) == min(count + 2, 39)


def test_a_message_with_brackets_does_not_break_the_table(rsb, tmp_path):
    """gloo's errors hold paths in square brackets, which rich takes for markup."""
    run = make_run(tmp_path / "runs")
    message = "another rank is gone: [/gloo/pair.cc:545] Read error"
    run.write_attempt(
        Attempt(
            number=1, job_id="1", world_size=2, hosts=(), started=0, start_step=0, cause="lost peer", message=message
        )
    )
    assert message in rsb("status")


def test_ctrl_c_is_answered_while_a_scheduler_does_not_answer(tmp_path, monkeypatch):
    answered, was_answered = threading.Event(), []

    def read(runs):
        os.kill(os.getpid(), signal.SIGINT)
        was_answered.append(answered.wait(20))
        return [Status("digits-s0", "/r", "finished")]

    monkeypatch.setattr(watching, "read_status", read)
    assert watch([make_run(tmp_path)], Console(file=io.StringIO())) == []
    answered.set()
    while not was_answered:
        pass
    assert was_answered == [True]


def test_an_error_of_reading_ends_the_display(tmp_path, monkeypatch):
    def read(runs):
        raise RsbError("squeue failed")

    monkeypatch.setattr(watching, "read_status", read)
    with pytest.raises(RsbError, match="squeue failed"):
        watch([make_run(tmp_path)], Console(file=io.StringIO()))


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "read_status", lambda runs: [Status("digits-s0", "/r", "finished", step=3)])
    for term, starts in (("dumb", "digits-s0: finished, epoch 0.0  step 3/0\n"), ("xterm", "\x1b[")):
        shown = io.StringIO()
        watch([make_run(tmp_path)], Console(file=shown, force_terminal=True, width=80, _environ={"TERM": term}))
        assert shown.getvalue().startswith(starts)


def test_what_a_run_waits_for_is_shown(tmp_path, monkeypatch):
    """A state that is unknown for hours says why, on a terminal and in a pipe."""
    found = Status("digits-s0", "/r", "failed", cause="failed (no space left)", step=3, total_steps=9)
    monkeypatch.setattr(watching, "read_status", lambda runs: [found])
    for is_terminal in (True, False):
        shown = io.StringIO()
        watch([make_run(tmp_path)], Console(file=shown, force_terminal=is_terminal, width=200))
        assert "no space left" in shown.getvalue() and "step 3/9" in shown.getvalue()
