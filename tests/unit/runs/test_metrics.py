"""Rows of a run are in order, none twice and none missing, however its attempts ended."""

import json
import math
import re

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from rsb_cluster.cli import main
from rsb_cluster.errors import StorageError
from rsb_cluster.monitor.status import read_status
from rsb_cluster.results.compare import compare_curves
from rsb_cluster.results.report.history import read_history
from rsb_cluster.runs import metrics
from rsb_cluster.runs.metrics import MetricsWriter, last_rows, read_rows
from rsb_cluster.runs.run import Attempt, Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train.trackers import _read_forwarded
from tests.unit.new_runs import make_run

starts = st.lists(st.integers(0, 12), max_size=4)
steps = st.lists(st.tuples(st.integers(0, 15), st.sampled_from(["train", "eval"])), max_size=8)


@given(starts, st.lists(steps, min_size=5, max_size=5))
def test_the_last_rows_are_those_of_all_rows(tmp_path_factory, starts, logged):
    """However attempts overlapped, reading from the end finds what reading all finds."""
    run = Run.at(tmp_path_factory.mktemp("run"), "r")
    attempts = [attempt(i + 1, start) for i, start in enumerate([0, *starts])]
    for one, rows in zip(attempts, logged, strict=False):
        writer = MetricsWriter(run.store, one.number)
        for step, kind in sorted(rows):
            if step >= one.start_step:
                writer.add({"kind": kind, "step": step})
        writer.flush()
    everything = read_rows(run, attempts)
    for kind, found in last_rows(run, attempts).items():
        assert found["step"] == max(r["step"] for r in everything if r["kind"] == kind)
    assert last_rows(run, attempts).keys() == {r["kind"] for r in everything}


def attempt(number, start_step, cause=""):
    return Attempt(
        number=number, job_id=str(number), world_size=1, hosts=("h",), started=0.0, start_step=start_step, cause=cause
    )


def write(run, number, start, steps, kind="train"):
    """Write an attempt's record and a row for each step."""
    run.write_attempt(attempt(number, start))
    writer = MetricsWriter(run.store, number)
    for step in steps:
        writer.add({"kind": kind, "step": step, "by": number})
    writer.flush()


def pairs(run):
    return [(row["step"], row["attempt"]) for row in read_rows(run)]


def test_what_a_later_attempt_computed_again_is_left_out(anywhere):
    run = Run.at(anywhere.url, "r")
    write(run, 1, 0, range(1, 8))
    write(run, 2, 4, range(5, 11))
    assert pairs(run) == [(step, 1) for step in range(1, 5)] + [(step, 2) for step in range(5, 11)]
    assert all(row["by"] == row["attempt"] for row in read_rows(run))


def test_of_three_attempts_each_step_is_the_last_ones(tmp_path):
    run = Run.at(tmp_path, "r")
    write(run, 1, 0, range(1, 10))
    write(run, 2, 6, range(7, 9))
    write(run, 3, 3, range(4, 6))  # a damaged checkpoint: further back than the second began
    assert pairs(run) == [(1, 1), (2, 1), (3, 1), (4, 3), (5, 3)]


def test_an_attempt_without_rows_still_cuts(tmp_path):
    run = Run.at(tmp_path, "r")
    write(run, 1, 0, range(1, 10))
    run.write_attempt(attempt(2, 4))
    assert pairs(run) == [(1, 1), (2, 1), (3, 1), (4, 1)]
    run.write_attempt(attempt(3, 4))
    assert [row["step"] for row in read_rows(run)] == [1, 2, 3, 4]


def test_rows_that_were_never_flushed_are_no_rows(tmp_path):
    run = Run.at(tmp_path, "r")
    run.write_attempt(attempt(1, 0))
    writer = MetricsWriter(run.store, 1)
    writer.add({"kind": "train", "step": 1})
    assert read_rows(run) == []
    writer.flush()
    writer.add({"kind": "train", "step": 2})
    assert [row["step"] for row in read_rows(run)] == [1]


def test_a_run_without_attempts_has_no_rows(anywhere):
    assert read_rows(Run.at(anywhere.url, "r")) == []


def test_an_evaluation_that_two_attempts_did_counts_once(tmp_path):
    """The second evaluated where it resumed and was killed before it saved, so the third did so, too."""
    run = Run.at(tmp_path, "r")
    write(run, 1, 0, range(1, 5))
    write(run, 2, 4, [4], kind="eval")
    write(run, 3, 4, [4], kind="eval")
    rows = [(row["kind"], row["step"], row["attempt"]) for row in read_rows(run)]
    assert rows == [("train", 1, 1), ("train", 2, 1), ("train", 3, 1), ("train", 4, 1), ("eval", 4, 3)]


def test_ten_attempts_are_in_order(tmp_path):
    run = Run.at(tmp_path, "r")
    for number in range(1, 12):
        write(run, number, number - 1, [number])
    assert pairs(run) == [(number, number) for number in range(1, 12)]


def test_a_chunk_is_closed_when_it_is_full_and_then_left_alone(tmp_path):
    run = Run.at(tmp_path, "r")
    run.write_attempt(attempt(1, 0))
    writer = MetricsWriter(run.store, 1)
    padding = "x" * 1000
    seen = {}
    for step in range(1, 701):
        writer.add({"kind": "train", "step": step, "padding": padding})
        if step % 10 == 0:
            writer.flush()
            names = run.store.files("metrics")
            content = {name: run.store.read_bytes(name) for name in names[:-1]}
            assert seen.items() <= content.items(), "a closed file never changes"
            seen = content
            assert run.store.size(names[-1]) < metrics.CHUNK_BYTES + 11 * 1100
    names = run.store.files("metrics")
    assert names == [f"metrics/0001-{chunk:06d}.jsonl" for chunk in range(3)]
    assert [row["step"] for row in read_rows(run)] == list(range(1, 701))


def test_every_file_is_whole_lines_of_json_at_any_time(tmp_path):
    store = Store(tmp_path)
    writer = MetricsWriter(store, 1)
    writer.flush()
    assert store.files() == [], "nothing to write, no file"
    for step in range(20):
        writer.add({"kind": "train", "step": step, "text": "é\n\u2028"})
        writer.flush()
        text = store.read_bytes("metrics/0001-000000.jsonl").decode()
        assert text.endswith("\n")
        assert [json.loads(line)["step"] for line in text.split("\n")[:-1]] == list(range(step + 1))


def test_rows_whose_flush_failed_are_written_by_the_next_even_without_new_ones(tmp_path):
    run = Run.at(tmp_path, "run")
    writer = MetricsWriter(run.store, 1)
    sent = []
    writer.forward = sent.extend
    writer.add({"kind": "train", "step": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics").write_text("in the way")
    for _ in range(2):
        with pytest.raises(StorageError):
            writer.flush()
    (tmp_path / "run" / "metrics").unlink()
    writer.flush()
    assert run.store.read_bytes("metrics/0001-000000.jsonl") == b'{"kind": "train", "step": 1}\n'
    assert sent == [{"kind": "train", "step": 1}]


def test_a_flush_without_new_rows_writes_nothing(tmp_path):
    store = Store(tmp_path)
    writer = MetricsWriter(store, 1)
    writer.add({"kind": "train", "step": 1})
    writer.flush()
    store.delete("metrics/0001-000000.jsonl")
    writer.flush()
    assert store.files() == []


@st.composite
def lives(draw):
    """A run of some steps, killed and resumed at will: (start, last step logged) of each attempt, and the log interval.

    An attempt resumes at a checkpoint that an earlier one took; all that it logged up to there was flushed before.
    """
    total = draw(st.integers(1, 40))
    every = draw(st.integers(1, 4))
    attempts, saved = [], [0]
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.sampled_from(saved[-2:]))
        saved = [step for step in saved if step <= start]
        end = draw(st.integers(start, total))
        saves = sorted(draw(st.sets(st.integers(start, end), max_size=3)))
        flushed = draw(st.integers(max([start, *saves]), end))
        attempts.append((start, flushed))
        saved = sorted({*saved, *saves})
    attempts.append((draw(st.sampled_from(saved[-2:])), total))
    return total, every, attempts


@given(lives())
def test_no_step_is_twice_and_none_is_missing(tmp_path_factory, life):
    total, every, attempts = life
    run = Run.at(tmp_path_factory.mktemp("life"), "r")
    for number, (start, flushed) in enumerate(attempts, 1):
        write(run, number, start, [step for step in range(start + 1, flushed + 1) if step % every == 0])
    rows = read_rows(run)
    assert [row["step"] for row in rows] == [step for step in range(1, total + 1) if step % every == 0]
    for row in rows:  # each from the last attempt that trained it
        assert row["attempt"] == max(n for n, (start, end) in enumerate(attempts, 1) if start < row["step"] <= end)


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind": "tr',
        b"null",
        b"[]",
        b"{}",
        b'{"kind": "train"}',
        b'{"kind": "train", "step": "5"}',
        b"\xff",
        b"[" * 99999,
    ],
    ids=["cut", "null", "list", "empty", "stepless", "text", "bytes", "deep"],
)
def test_a_line_that_is_no_row_is_named_and_everything_that_reads_rows_says_so(tmp_path, line):
    """A file that was cut off when it was copied: a message, and no traceback, in each command."""
    run = make_run(tmp_path)
    run.write_attempt(attempt(1, 0))
    good = {"kind": "train", "step": 1, "epoch": 0.1, "loss": math.nan, "images_per_s": 9.0}
    run.store.write_bytes("metrics/0001-000000.jsonl", json.dumps(good).encode() + b"\n" + line)
    message = r"line 2 of .*/metrics/0001-000000\.jsonl is no row of metrics.*delete the line"
    for read in (read_rows, lambda run: last_rows(run, run.attempts())):
        with pytest.raises(StorageError, match=message):
            read(run)
    for command in (["runs", "show", run.run_id], ["compare", run.run_id, run.run_id]):
        done = CliRunner().invoke(main, [*command, "--runs", str(tmp_path)])
        assert done.exit_code == 1 and re.search(message, done.output), done.output
    assert re.search(message, read_status([run])[0].cause)
    assert re.search(message, read_history(run, run.recipe(), "", points=9).damage)
    assert _read_forwarded(run, 2) == {("train", 1)}, "a damaged file ends no training"


def test_a_row_that_lacks_what_another_version_wrote_is_no_damage(tmp_path):
    run = make_run(tmp_path)
    run.write_attempt(attempt(1, 0))
    rows = [
        {"kind": "train", "step": 5},
        {"kind": "eval", "step": 5},
        {"kind": "train", "step": 6, "images_per_s": math.inf},
    ]
    run.store.write_bytes("metrics/0001-000000.jsonl", "\n".join(map(json.dumps, rows)).encode())
    run.store.write_bytes("metrics/notes.txt", b"mine")
    (status,) = read_status([run])
    assert (status.state, status.step, status.loss, status.top1) == ("killed", 6, None, None)
    found = read_history(run, run.recipe(), "", points=9)
    assert (found.damage, found.images_per_s, found.waiting) == ("", None, None)
    assert compare_curves(read_rows(run), read_rows(run)).common == 0
