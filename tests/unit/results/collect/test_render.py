"""The formats of a table, as reviewed, with every run in them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from rsb_cluster.results.collect import collect, render
from rsb_cluster.results.collect.render import EVALUATION_COLUMNS
from rsb_cluster.runs.run import Run
from tests.unit.results.collect.made import attempt, make_run, same_as_golden


def test_csv_is_golden(runs: list[Run], tmp_path: Path) -> None:
    same_as_golden("collect.csv", render(collect(runs), "csv"), tmp_path)


def test_json_is_golden(runs: list[Run], tmp_path: Path) -> None:
    same_as_golden("collect.json", render(collect(runs), "json"), tmp_path)


def test_csv_has_one_line_per_run_and_no_number_for_the_unfinished(runs: list[Run]) -> None:
    rows = list(csv.DictReader(io.StringIO(render(collect(runs), "csv"))))
    assert sorted(row["run_id"] for row in rows) == sorted(run.run_id for run in runs)
    by_id = {row["run_id"]: row for row in rows}
    assert float(by_id["a3-resnet50-s1"]["top1"]) == 77.91
    assert float(by_id["a3-resnet50-s0"]["ema_top1"]) == 77.98
    assert by_id["a3-resnet50-s0-lr"]["modified"] == "optimizer.lr 0.008 → 0.004"
    failed = by_id["a3-resnet50-s3"]
    assert (failed["state"], failed["counted"], failed["top1"]) == ("failed", "False", "")
    assert failed["reason"] == 'loss is NaN, "twice"\n[red] | in a row (attempt 1, step 1250)'
    counted = {row["run_id"] for row in rows if row["counted"] == "True"}
    assert counted == {run.run_id for run in runs[:9]} - {"a3-resnet34-s0"}
    assert by_id["a1-resnet152-s0"]["gpu_hours"] == "8.0"
    assert by_id["a1-resnet152-s0"]["steps"] == "700"
    assert all(None not in row for row in rows)
    empty = [name for name in rows[0] if not any(row[name] for row in rows)]
    assert empty == list(EVALUATION_COLUMNS)  # there are none here


def test_json_has_every_run_and_is_strict(runs: list[Run]) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    value = json.loads(render(collect(runs), "json"), parse_constant=refuse)
    inside = [run["run_id"] for group in value["groups"] for run in group["runs"]]
    outside = [run["run_id"] for run in value["unfinished"]]
    assert sorted(inside + outside) == sorted(run.run_id for run in runs)
    assert {run["run_id"]: run["state"] for run in value["unfinished"]} == {
        "a1-resnet152-s0": "killed",
        "a3-resnet50-s3": "failed",
        "a3-resnet50-s4": "running",
        "a3-resnet50-s5": "queued",
        "a3-resnet50-s6": "missing",
        "a3-resnet50-s7": "broken",
    }
    (diverged,) = [group["runs"][0] for group in value["groups"] if group["model"] == "resnet101"]
    assert diverged["loss"] is None


@pytest.mark.parametrize("format", ["table", "md"])
def test_runs_without_a_result_are_named_below_the_table(runs: list[Run], format: Any) -> None:
    lines = render(collect(runs), format).splitlines()
    below = [line.strip(" -").replace("\\", "") for line in lines[lines.index("No result:") :]]
    assert 'a3-resnet50-s3: failed: loss is NaN, "twice" [red] | in a row (attempt 1, step 1250)' in below
    assert "a3-resnet50-s4: running: attempt 1 on node-a; or killed without a last word" in below
    assert any(line.startswith("a3-resnet50-s5: queued: ") for line in below)
    assert any(line.startswith("a3-resnet50-s6: missing: ") for line in below)


def test_a_long_reason_is_cut_in_the_table_and_whole_in_json(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    attempt(run, cause="failed", message="x" * 5000, end_step=1)
    assert "x" * 5000 in render(collect([run]), "json")
    assert "x" * 300 not in render(collect([run]), "table")
    assert "x" * 299 + "…" in render(collect([run]), "table")


def test_nothing_at_all_is_said_so() -> None:
    assert render(collect([]), "table") == "No run has a result.\n"
    assert json.loads(render(collect([]), "json")) == {"groups": [], "unfinished": [], "evaluations": []}
    assert render(collect([]), "csv").count("\n") == 1
