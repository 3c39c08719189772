"""The table in a terminal: as reviewed, and as wide as there is room."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsb_cluster.results.collect import collect, render
from rsb_cluster.runs.run import Run
from tests.unit.results.collect.made import same_as_golden


def test_plain_table_is_golden(runs: list[Run], tmp_path: Path) -> None:
    table = render(collect(runs), "table", terminal=False)
    assert "\x1b" not in table
    same_as_golden("collect.txt", "\n".join(line.rstrip() for line in table.splitlines()) + "\n", tmp_path)


def test_a_narrow_terminal_gets_fewer_columns_and_is_told_which(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    text = render(collect(runs[:3]), "table", terminal=True)
    assert "\x1b[32mreproduced" in text
    heading = text.splitlines()[0]
    assert "verdict" in heading
    assert "attempts" not in heading
    assert "attempts" in text.partition("Columns omitted, as the terminal is too narrow")[2]
    monkeypatch.setenv("COLUMNS", "200")
    wide = render(collect(runs[:3]), "table", terminal=True)
    assert "attempts" in wide.splitlines()[0]
    assert "Left out" not in wide


def test_a_terminal_has_no_columns_in_which_nothing_stands(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (own,) = (run for run in runs if run.run_id.startswith("mine-"))
    for terminal in (True, False):
        heading = render(collect([own]), "table", terminal=terminal).splitlines()[0]
        assert "top-1" in heading
        assert ("paper" in heading) == ("delta" in heading) == (not terminal), "a pipe has the same columns always"


def test_no_number_is_cut_however_narrow_the_terminal(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """It wraps the lines instead: 375,000 that reads 375 would be wrong."""
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "dumb")
    table = render(collect(runs[:3]), "table", terminal=True).partition("Compared")[0]
    assert "…" not in table and "78.03 ± 0.11" in table and "reproduced" in table
    assert "\x1b" not in table, "a dumb terminal shows the codes of colours"
