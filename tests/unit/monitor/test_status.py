"""Status reads little, tells the truth about each run, and fits a terminal."""

import io
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rsb_cluster.config import catalog
from rsb_cluster.monitor.status import STATES, Status, interest, read_status, summary
from rsb_cluster.monitor.watch import overview, table
from rsb_cluster.runs.metrics import MetricsWriter, last_rows, read_rows
from rsb_cluster.runs.run import Attempt, Run, Spec


class Presser(io.StringIO):
    """A screen before which somebody presses Ctrl-C when he reads a text for the first time."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def write(self, text: str) -> int:
        if self._text in text and self._text not in self.getvalue():
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def attempt(number: int, start: int, cause: str = "", message: str = "") -> Attempt:
    return Attempt(
        number=number, job_id="1", world_size=1, hosts=("h",), started=1, start_step=start, cause=cause, message=message
    )  # type: ignore[arg-type]


def row(kind: str, step: int) -> dict[str, object]:
    return {"kind": kind, "step": step, "epoch": step / 22, "loss": 0.5, "images_per_s": 100.0, "top1": step / 10}


@pytest.fixture
def run(tmp_path) -> Run:
    made = Run.at(tmp_path, "digits-resnet10t-s0-00000000")
    spec = Spec(run_id=made.run_id, seed=0, virtual_ranks=4, data="", train_digest="", val_digest="")
    made.create(catalog.load_recipe("digits").recipe, spec)
    return made


def log(run: Run, number: int, *rows: dict[str, object]) -> None:
    writer = MetricsWriter(run.store, number)
    for one in rows:
        writer.add(one)
    writer.flush()


starts = st.lists(st.integers(0, 12), max_size=4)
steps = st.lists(st.tuples(st.integers(0, 15), st.sampled_from(["train", "eval"])), max_size=8)


@given(starts, st.lists(steps, min_size=5, max_size=5))
def test_the_last_rows_are_those_of_all_rows(tmp_path_factory, starts, logged):
    """However attempts overlapped, reading from the end finds what reading all finds."""
    run = Run.at(tmp_path_factory.mktemp("run"), "r")
    attempts = [attempt(i + 1, start) for i, start in enumerate([0, *starts])]
    for one, rows in zip(attempts, logged, strict=False):
        log(run, one.number, *(row(kind, step) for step, kind in sorted(rows) if step >= one.start_step))
    everything = read_rows(run, attempts)
    for kind, found in last_rows(run, attempts).items():
        assert found["step"] == max(r["step"] for r in everything if r["kind"] == kind)
    assert last_rows(run, attempts).keys() == {r["kind"] for r in everything}


def test_a_run_that_was_killed_says_so(run):
    run.write_attempt(attempt(1, 0, "preempted"))
    run.write_attempt(attempt(2, 30))
    log(run, 1, row("train", 30), row("eval", 30), row("train", 40))
    (status,) = read_status([run])
    assert (status.state, status.cause, status.attempt) == ("killed", "killed", 2)
    assert (status.step, status.total_steps, status.top1, status.eta_s) == (30, 550, 3.0, None)


def test_the_cause_of_the_last_end_comes_with_its_message(run):
    run.write_attempt(attempt(1, 0, "preempted"))
    run.write_attempt(attempt(2, 30, "failed", "out of [memory]"))
    (status,) = read_status([run])
    assert (status.state, status.cause) == ("failed", "failed (out of [memory])")


def test_a_run_that_nobody_started(run):
    (status,) = read_status([run])
    assert (status.state, status.cause, status.step, status.total_steps) == ("never started", "", 0, 550)


def test_no_runs_are_no_lines():
    assert read_status([]) == []


def test_counts_begin_with_what_needs_a_look():
    found = [Status("r", "/r", state) for state in ("finished", "running", "finished", "failed", "some new cause")]
    assert summary(found) == "5 runs: 1 some new cause, 1 failed, 1 running, 2 finished"
    assert summary(found[:1]) == "1 run: 1 finished"
    assert interest("missing") < interest("running") < interest("finished") and len(set(STATES)) == len(STATES)


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


@pytest.mark.parametrize("width", [100, 120, 200])
def test_a_line_for_each_run_however_wide_the_terminal(width):
    lines = printed(table(many(8), width), width)
    assert len(lines) == 9 and max(map(len, lines)) <= width
    for line in lines[1:]:
        assert (
            line.startswith("deit-deit_s")
            and "-0123abcd " in line
            and "375000/375300" in line
            and "79.86" in line
            and "12" in line
        )


def test_in_a_file_nothing_is_cut():
    line = printed(table(many(1), 10_000), 10_000)[1]
    assert line.endswith("lost peer (rank 3: [/gloo/pair.cc:545] Read error and more of it)")
    assert line.startswith("deit-deit_small_patch16_224-s0-0123abcd ")


@pytest.mark.parametrize("count", [2, 36, 37, 38, 1000])
def test_what_is_live_fits_the_terminal_and_shows_failures_first(count):
    lines = printed(overview(many(count), width=100, lines=40), 100)
    assert len(lines) < 40 and max(map(len, lines)) <= 100
    assert f"{count} runs: " in lines[0]
    if count == 1000:
        assert all(" failed " in line for line in lines[2:-1])
        hidden = 1000 - len(lines[2:-1])
        assert lines[-1].startswith(f"… and {hidden} runs: ")
    else:
        assert len(lines) == min(count + 2, 39)
