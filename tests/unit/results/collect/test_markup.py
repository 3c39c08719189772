"""Markdown, LaTeX and HTML, as reviewed."""

from __future__ import annotations

from pathlib import Path

from rsb_cluster.results.collect import collect, render
from rsb_cluster.runs.run import Run
from tests.unit.results.collect.made import attempt, finish, make_run, same_as_golden


def test_markdown_is_golden(runs: list[Run], tmp_path: Path) -> None:
    same_as_golden("collect.md", render(collect(runs), "md"), tmp_path)


def test_latex_is_golden(runs: list[Run], tmp_path: Path) -> None:
    same_as_golden("collect.tex", render(collect(runs), "latex"), tmp_path)


def test_html_is_golden(runs: list[Run], tmp_path: Path) -> None:
    same_as_golden("collect.html", render(collect(runs), "html"), tmp_path)


def test_markdown_rows_have_as_many_cells_as_the_heading(runs: list[Run], tmp_path: Path) -> None:
    odd = finish(make_run(tmp_path, tag="-p", spec={"modified": {"model.kwargs": ("a|b", "c|d")}}), 78.0)
    lines = render(collect([*runs, odd]), "md").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 9
    assert {line.replace(r"\|", "").count("|") for line in table} == {17}
    assert any(r"model.kwargs=c\|d" in line for line in table)


def test_messages_and_names_stay_what_they_are(tmp_path: Path) -> None:
    """In Markdown '<stdin>' would vanish, in LaTeX '--mean' get a dash, and a line break end a row."""
    run = make_run(tmp_path)
    message = "KeyError: <stdin>.__init__ got `x*y` [1](2)\nfor --mean ~a_b~ a\\|b &lt; $n$"
    attempt(run, cause="failed", message=message)
    collected = collect([run])
    markdown = render(collected, "md")
    assert (
        r"KeyError: \<stdin>.\_\_init\_\_ got \`x\*y\` \[1](2) for --mean \~a_b\~ a\\\|b \&lt; \$n\$ (attempt 1"
    ) in markdown
    latex = render(collected, "latex")
    assert r"\textless{}stdin\textgreater{}" in latex and r"for -{}-mean" in latex and r"`x{*}y`" in latex
    assert "&lt;stdin&gt;.__init__" in render(collected, "html")
