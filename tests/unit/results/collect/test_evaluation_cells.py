"""Evaluations in every format, as reviewed."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from rsb_cluster.evaluation.record import ImageGroup
from rsb_cluster.results.collect import Format, collect, render
from tests.unit.results.collect.made import a1, an_evaluation, finished, same_as_golden

FORMATS: dict[Format, str] = {"csv": "csv", "json": "json", "md": "md", "latex": "tex", "html": "html"}


@pytest.fixture
def collected(tmp_path: Path) -> Any:
    runs = [finished(tmp_path, 80.2 + seed / 10, a1("resnet50"), seed=seed) for seed in range(2)]
    for seed, run in enumerate(runs):
        an_evaluation(85.6 + seed / 10, run, labels="real", scored=46_837).save(str(tmp_path))
        an_evaluation(68.4, run, "imagenet-v2").save(str(tmp_path))
    more: dict[str, Any] = {"values": {"recall": 90.0, "precision": 80.5, "top1": 85.0}, "bad": 1}
    an_evaluation(90.0, runs[0], "indl-zollner", metric="recall", **more).save(str(tmp_path))
    an_evaluation(80.38).save(str(tmp_path))
    groups = {"Blur": ImageGroup(value=50.0, scored=2), "Clean": ImageGroup(value=70.0, scored=5)}
    an_evaluation(
        60.0, None, "vizwiz-classification", labels="vizwiz", groups=groups, weights="gn & <b>|", weights_digest="0"
    ).save(str(tmp_path))
    return collect(runs, weights_in=str(tmp_path))


@pytest.mark.parametrize(("format_", "suffix"), FORMATS.items())
def test_every_format_is_golden(collected: Any, tmp_path: Path, format_: Format, suffix: str) -> None:
    same_as_golden(f"evaluations.{suffix}", render(collected, format_), tmp_path)


def test_the_plain_table_is_golden(collected: Any, tmp_path: Path) -> None:
    table = render(collected, "table", terminal=False)
    same_as_golden("evaluations.txt", "\n".join(line.rstrip() for line in table.splitlines()) + "\n", tmp_path)


def test_csv_has_a_line_for_each_evaluation(collected: Any) -> None:
    rows = list(csv.DictReader(io.StringIO(render(collected, "csv"))))
    found = [row for row in rows if row["state"] == "evaluated"]
    assert len(found) == 7
    zollner = next(row for row in found if row["data_set"] == "indl-zollner")
    assert (zollner["metric"], zollner["value"], zollner["recipe"]) == ("recall", "90.0", "a1")
    assert json.loads(render(collected, "json"))["evaluations"][0]["n"] == 2
