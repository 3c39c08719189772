"""Tables of runs fit a terminal."""

import io

import pytest
from rich.console import Console

from rsb_cluster.monitor.status import Status
from rsb_cluster.monitor.watch import overview, table
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


@pytest.mark.parametrize("width", [100, 120, 200])
def test_a_run_takes_one_line_at_any_width_of_the_terminal(width):
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


def test_in_a_file_nothing_is_shortened():
    line = printed(table(many(1), 10_000), 10_000)[1]
    assert line.endswith("lost peer (rank 3: [/gloo/pair.cc:545] Read error and more of it)")
    assert line.startswith("deit-deit_small_patch16_224-s0-0123abcd ")


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
