"""The report: what it says of runs, and that it works in a real browser without asking anybody for anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from rsb_cluster.results.collect import collect
from rsb_cluster.results.report import report
from rsb_cluster.runs.lookup import list_folders
from rsb_cluster.runs.run import Run
from tests.made_runs import make_runs

EVIL = '</script><script>document.title = "owned"</script><img src=x onerror=document.title="owned"> & "quoted"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 runs, two of each group; one says something evil, one is broken, and one was never sent."""
    folder = tmp_path_factory.mktemp("report")
    runs = make_runs(folder / "runs", 30, rows=20)
    failed = next(run for run in runs if run.attempts()[-1].cause == "failed")
    failed.write_attempt(failed.attempts()[-1].model_copy(update={"message": EVIL}))
    (folder / "runs" / runs[3].run_id / "spec.json").unlink()
    (folder / "runs" / runs[3].run_id / "result.json").unlink(missing_ok=True)
    (folder / "runs" / runs[4].run_id / "metrics" / "0001-000000.jsonl").write_text("{")
    found = [*list_folders(str(folder / "runs")), Run.at(folder / "runs", "a1-vit-s0-00000000")]
    output = folder / "report.html"
    output.write_text(report(collect(found), title="depths & <more>", output=output), encoding="utf-8")
    return folder


def data_of(folder: Path) -> dict[str, Any]:
    page = (folder / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    value: dict[str, Any] = json.loads(found.group(1))
    return value


# ---- what it says ------------------------------------------------------------------------------------------


def test_the_page_has_every_run_with_its_attempts_and_curves(folder: Path) -> None:
    runs = {run["id"]: run for run in data_of(folder)["runs"]}
    folders = {run.run_id: run for run in list_folders(str(folder / "runs"))}
    assert runs.keys() == folders.keys() | {"a1-vit-s0-00000000"}
    whole = 0
    for run_id, run in runs.items():
        if "recipe" not in run or run["damage"]:
            continue
        whole += 1
        attempts = folders[run_id].attempts()
        assert [span["number"] for span in run["spans"]] == [a.number for a in attempts]
        assert all(span["queued"] <= span["started"] <= span["ended"] for span in run["spans"])
        assert len(run["loss"][0]) == len(run["loss"][1]) == 20
        assert run["logs"][0][1] == f"runs/{run_id}/logs/0001-rank00000.log"
        assert (folder / run["logs"][0][1]).is_file()
    assert whole == 28
    assert sorted(run["state"] for run in runs.values() if "recipe" not in run) == ["missing", "unreadable"]
    (damaged,) = [run for run in runs.values() if run["damage"]]
    assert damaged["loss"] == [[], []]


def test_equal_recipes_are_kept_once(folder: Path) -> None:
    data = data_of(folder)
    assert len(data["recipes"]) == 15
    assert {recipe["model.name"] for recipe in data["recipes"]} == {f"resnet{n}" for n in (18, 34, 50, 101, 152)}
    assert len(data["environments"]) == 1


def test_nothing_is_loaded_from_elsewhere(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    head, _, _ = page.partition('<script id="data"')
    assert not re.search(r'(src|href)="(?!#|data:)', head)
    assert "default-src 'none'" in head
    assert "depths &amp; &lt;more&gt;" in head
    assert "</script><script>document" not in page


def test_a_page_of_no_runs_is_a_page(tmp_path: Path) -> None:
    assert "0 runs" in report(collect([]), title="nothing", output=tmp_path / "x.html")


# ---- in a browser ------------------------------------------------------------------------------------------


@pytest.fixture
def page(browser: Browser, folder: Path) -> Iterator[Page]:
    """The report, open; what it says on the console and whom it asks is checked at the end."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, offline=True)
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: complaints.append(request.url))
    url = (folder / "report.html").as_uri()
    opened.goto(url)
    opened.wait_for_selector("html[data-drawn]")
    yield opened
    context.close()
    assert complaints == [url]


def visible(page: Page, table: str) -> list[str]:
    return page.locator(f"#{table} tbody tr:visible > th").all_inner_texts()


@pytest.mark.browser
def test_it_opens_and_draws_all_charts(page: Page) -> None:
    assert page.title() == "depths & <more>"
    assert len(visible(page, "runs")) == 31
    assert page.locator("figure .main-svg").count() >= 6
    lines = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('figure')].map(f => [f.id, f.data.length]))"
    )
    assert lines.keys() == {"seeds", "loss", "top1", "cost", "speed", "timeline"}
    assert all(lines.values())


@pytest.mark.browser
def test_the_tables_sort_by_keyboard(page: Page) -> None:
    for column, key in (("top-1", "top1"), ("seed", "seed")):
        head = page.locator("#runs thead button", has_text=column)
        for pressed, order in ((1, "ascending"), (2, "descending")):
            head.press("Enter")
            assert page.locator("#runs thead th[aria-sort]").get_attribute("aria-sort") == order, pressed
            places = [
                int(i) for i in page.locator("#runs tbody tr").evaluate_all("rows => rows.map(r => r.dataset.run)")
            ]
            values = page.evaluate(f"JSON.parse(document.getElementById('data').textContent).runs.map(r => r.{key})")
            known = [values[i] for i in places if values[i] is not None]
            assert known == sorted(known, reverse=order == "descending")
            assert all(values[i] is None for i in places[len(known) :]), "what has no value comes last"


@pytest.mark.browser
def test_a_filter_narrows_tables_and_charts(page: Page) -> None:
    drawn = "document.getElementById('cost').data.length"
    before = page.evaluate(drawn)
    page.keyboard.press("/")
    page.keyboard.type("a3 resnet50")
    assert visible(page, "groups") == ["a3"]
    assert all(name.startswith("a3-resnet50-") for name in visible(page, "runs"))
    assert page.inner_text("#shown") == f"{len(visible(page, 'runs'))} of 31 runs"
    page.wait_for_selector(f"html[data-drawn='{len(visible(page, 'runs'))}']")
    assert page.evaluate(drawn) < before
    page.fill("#filter", "no such run")
    assert visible(page, "runs") == []
    page.wait_for_selector("html[data-drawn='0']")
    assert page.locator("#cost .empty").is_visible()
    page.fill("#filter", "")
    page.wait_for_selector("html[data-drawn='31']")
    assert page.evaluate(drawn) == before
    page.click(".state[data-state=finished]")
    assert len(visible(page, "runs")) == 31 - page.evaluate(
        "JSON.parse(document.getElementById('data').textContent).runs.filter(r => r.state === 'finished').length"
    )


@pytest.mark.browser
def test_a_runs_name_opens_its_details_and_evil_text_stays_text(page: Page) -> None:
    page.fill("#filter", "owned")
    (name,) = visible(page, "runs")
    page.locator("#runs tbody tr:visible .open").press("Enter")
    assert page.inner_text("#details-title") == name
    said = page.inner_text("#details-body")
    assert EVIL in said
    for part in ("optimizer.lr", "torch", "2.8.0", "attempt", f"rsb-cluster logs {name}"):
        assert part in said
    assert page.title() == "depths & <more>"
    page.keyboard.press("Escape")
    assert not page.locator("#details").is_visible()


@pytest.mark.browser
def test_it_prints_in_the_colours_of_paper(page: Page) -> None:
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark", media="print")
    assert (dark, page.evaluate("getComputedStyle(document.body).backgroundColor")) == (
        "rgb(15, 19, 24)",
        "rgb(255, 255, 255)",
    )
    assert not page.locator(".toolbar").is_visible()
    assert page.pdf().startswith(b"%PDF")
