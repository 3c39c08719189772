"""The report: what it says of runs, and that it works in a real browser without asking anybody for anything."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from rsb_cluster.results.collect import collect
from rsb_cluster.results.report import report
from rsb_cluster.runs.lookup import list_folders
from rsb_cluster.runs.run import Run, Submission
from tests.made_runs import make_runs
from tests.servers.daemons import GUARD_S
from tests.unit.results.collect.made import an_evaluation

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


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 15 groups whose first run has one logged step, arguments of its model, and data that moved."""
    folder = tmp_path_factory.mktemp("odd")
    runs = make_runs(folder / "runs", 15, rows=3, endings=("finished",))
    first = runs[0]
    for name in first.store.files("metrics"):
        first.store.write_bytes(name, b"")
    rows = [{"kind": "train", "loss": 0.5}, {"kind": "eval", "top1": 12.0}]
    text = "\n".join(json.dumps(row | {"step": 1, "epoch": 1.0, "time": 1.0, "data_wait_s": 0.1}) for row in rows)
    first.store.write_bytes(f"metrics/{first.attempt_numbers()[-1]:04d}-000000.jsonl", text.encode())
    first.add_submission(Submission(backend="slurm", job_id="9", folder="f", shape="", time=2e9, data="s3://moved"))
    result = first.result()
    assert result is not None
    result["science"]["recipe"]["model"]["kwargs"] = {"drop_rate": 0.30000000000000004, "layers": [1, 2]}
    first.store.write_json("result.json", result | {"top1": 99.72144846796657})
    for run in runs:
        an_evaluation(71.0, run).save(str(folder / "runs"))
        an_evaluation(85.123456789, run, labels="real").save(str(folder / "runs"))
    an_evaluation(80.38).save(str(folder / "runs"))
    output = folder / "report.html"
    found = collect(runs, weights_in=str(folder / "runs"))
    output.write_text(report(found, title="odd", output=output), encoding="utf-8")
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
        assert run["measured"]["slowest rank"].startswith("3 on node-07, in 100% of the intervals")
        assert run["logs"][0][1] == f"runs/{run_id}/logs/0001-rank00000.log"
        assert (folder / run["logs"][0][1]).is_file()
    assert whole == 28
    assert sorted(run["state"] for run in runs.values() if "recipe" not in run) == ["broken", "missing"]
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


def test_values_are_rounded_and_data_are_where_the_last_submit_found_them(odd: Path) -> None:
    data = data_of(odd)
    run = next(run for run in data["runs"] if run["top1"] > 99)
    assert run["top1"] == 99.7214
    assert data["environments"][run["environment"]]["data"] == "s3://moved"
    others = [data["environments"][r["environment"]]["data"] for r in data["runs"] if r is not run]
    assert set(others) == {"s3://data/imagenet-1k"}
    assert run["evaluations"] == [
        ["imagenet-1k/val, 224 px", "top1 71.00"], ["imagenet-1k/val, real, 224 px", "label set top1 85.12"],
    ]  # fmt: skip


def test_columns_that_say_nothing_are_left_out(tmp_path: Path, folder: Path) -> None:
    """Of what nothing is published on, as all of a user's own recipes."""
    (run,) = make_runs(tmp_path, 1, rows=3, endings=("finished",))
    result = run.result()
    assert result is not None
    result["science"]["recipe"]["paper"] = ""
    run.store.write_json("result.json", result)
    page = report(collect([run]), title="own", output=tmp_path / "x.html")
    known = (folder / "report.html").read_text(encoding="utf-8")
    for column in ("paper", "timm", "delta"):
        assert f'<button type="button">{column}</button>' in known and f">{column}</button>" not in page
    assert ">top-1</button>" in page


# ---- in a browser ------------------------------------------------------------------------------------------


def opened_page(browser: Browser, folder: Path) -> Iterator[Page]:
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


@pytest.fixture
def page(browser: Browser, folder: Path) -> Iterator[Page]:
    yield from opened_page(browser, folder)


@pytest.fixture
def odd_page(browser: Browser, odd: Path) -> Iterator[Page]:
    yield from opened_page(browser, odd)


def until(page: Page, condition: str) -> None:
    """Wait until a condition holds. The page's security policy lets Playwright not do that itself."""
    deadline = time.monotonic() + GUARD_S
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(50)


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
    page.keyboard.type("a3-resnet50")
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
    for part in (
        "Speed and hardware",
        "3 on node-07",
        "kWh",
        "optimizer.lr",
        "torch",
        "2.8.0",
        "attempt",
        f"rsb-cluster logs {name}",
    ):
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


@pytest.mark.browser
def test_evaluations_are_a_table_that_follows_the_filter(odd_page: Page) -> None:
    assert len(visible(odd_page, "evaluations")) == 31
    assert "real" in odd_page.inner_text("#evaluations") and "agrees" in odd_page.inner_text("#evaluations")
    odd_page.fill("#filter", "a2 resnet34")
    assert visible(odd_page, "evaluations") == ["a2", "a2", "resnet50.a1_in1k"]


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280, 1440, 1920])
def test_no_page_is_wider_than_its_screen_and_only_on_a_phone_a_table_is(
    browser: Browser, odd: Path, width: int
) -> None:
    opened = browser.new_page(viewport={"width": width, "height": 900}, offline=True)
    opened.goto((odd / "report.html").as_uri())
    opened.wait_for_selector("html[data-drawn]")
    until(opened, f"document.documentElement.scrollWidth == {width}")
    tables = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert opened.evaluate(tables) == (3 if width == 390 else 0)
    # Names are not broken into letters, and titles of charts not cut.
    assert opened.evaluate("Math.max(...[...document.querySelectorAll('#runs tr')].map(r => r.clientHeight))") < 80
    cut = "(t) => t.getBoundingClientRect().right > t.closest('.main-svg').getBoundingClientRect().right"
    assert opened.evaluate(f"[...document.querySelectorAll('.gtitle')].filter({cut}).map(t => t.textContent)") == []
    opened.close()


@pytest.mark.browser
def test_a_table_among_values_is_spelled_out_and_a_single_point_has_a_marker(odd_page: Page) -> None:
    marked = "(id) => document.getElementById(id).data.filter(t => t.mode === 'markers' && t.x.length === 1).length"
    assert [odd_page.evaluate(marked, name) for name in ("loss", "top1")] == [1, 1]
    odd_page.locator("#runs tbody tr", has_text="99.72").locator(".open").click()
    said = odd_page.inner_text("#details-body")
    assert "drop_rate = 0.3, layers = 1, 2" in said and "[object" not in said
    assert not re.search(r"\d\.\d{8}", said)


@pytest.mark.browser
def test_on_paper_a_chart_fits_the_page_of_its_heading_and_has_no_buttons(page: Page) -> None:
    page.emulate_media(media="print")
    until(page, "document.querySelector('#seeds .main-svg').getBoundingClientRect().width <= 1030")
    sizes = page.evaluate(
        "[...document.querySelectorAll('.charts')].map(s => [s.id, getComputedStyle(s).breakInside, s.clientHeight])"
    )
    assert len(sizes) == 4
    assert all(inside == "avoid" and height < 700 for _, inside, height in sizes), sizes  # A4 landscape has 703 px
    assert page.locator(".modebar-container:visible").count() == 0
    # Chromium does not repeat a table's head with buttons in it on each page.
    assert page.evaluate("getComputedStyle(document.querySelector('#runs thead button')).display") == "contents"
    page.emulate_media(media="screen")
    until(page, "document.querySelector('#seeds .main-svg').getBoundingClientRect().width > 1100")
