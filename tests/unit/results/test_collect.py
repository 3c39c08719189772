"""Collecting from folders: little is read, what is broken is named, and nothing heavy is imported."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rsb_cluster.results.collect import Collection, collect, render
from rsb_cluster.runs.lookup import list_folders
from rsb_cluster.runs.run import Run
from rsb_cluster.runs.sweep import Member, Sweep
from rsb_cluster.storage.store import Store
from tests.unit.results.collect.made import attempt, finish, finished, make_run, only


def test_a_finished_run_costs_one_file_and_all_their_evaluations_one_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, old, waiting = finished(tmp_path, 78.0), finished(tmp_path, 78.0, seed=1), make_run(tmp_path, seed=2)
    old.store.write_json("result.json", {k: v for k, v in old.store.read_json("result.json").items() if k != "science"})
    attempt(run, cause="finished", ended=2e9)
    attempt(waiting, cause="preempted", ended=2e9)
    read: list[str] = []
    read_bytes, read_many, files_of = Store.read_bytes, Store.read_many, Store.files

    def spy_read(self: Store, path: str) -> bytes:
        read.append(self.locate(path).removeprefix(f"{tmp_path}/"))
        return read_bytes(self, path)

    def spy_many(self: Store, paths: Any) -> Any:
        paths = list(paths)
        read.extend(self.locate(path).removeprefix(f"{tmp_path}/") for path in paths)
        return read_many(self, paths)

    def spy_files(self: Store, folder: str = "") -> list[str]:
        read.append(self.locate(folder).removeprefix(f"{tmp_path}/") + "/")
        return files_of(self, folder)

    monkeypatch.setattr(Store, "read_bytes", spy_read)
    monkeypatch.setattr(Store, "read_many", spy_many)
    monkeypatch.setattr(Store, "files", spy_files)
    collect([run])
    assert read == ["a3-resnet50-s0/result.json", "evaluations/"]
    read.clear()
    assert only(collect([old])).n == 1
    assert sorted(read) == [*(f"a3-resnet50-s1/{name}.json" for name in ("recipe", "result", "spec")), "evaluations/"]
    read.clear()
    collect([waiting])
    assert "a3-resnet50-s2/attempts/0001.json" in read
    assert not any("metrics" in name or "checkpoints" in name for name in read)


def test_a_folder_that_is_no_run_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    (tmp_path / "README").write_text("x")
    assert collect(list_folders(str(tmp_path))) == Collection((), ())


@pytest.mark.parametrize(
    ("broken", "content", "reason"),
    [
        ("spec.json", None, "there is nothing at"),
        ("spec.json", b"{", "is not JSON"),
        ("recipe.json", None, "there is nothing at"),
        ("recipe.json", b"[]", "recipe.json"),
        ("attempts/0001.json", b"{}", "'number' is missing"),
    ],
)
def test_a_broken_folder_is_named_and_the_others_are_read(
    tmp_path: Path, broken: str, content: bytes | None, reason: str
) -> None:
    finished(tmp_path, 78.0)
    run = make_run(tmp_path, seed=1)
    attempt(run)
    run.store.delete(broken)
    if content is not None:
        run.store.write_bytes(broken, content)
    collection = collect(list_folders(str(tmp_path)))
    assert (collection.groups[0].n, collection.groups[0].mean) == (1, 78.0)
    (one,) = collection.unfinished
    assert (one.run_id, one.state) == (run.run_id, "broken")
    assert reason in one.reason


def test_a_run_that_a_sweep_wants_and_that_was_never_sent_is_counted_as_missing(tmp_path: Path) -> None:
    finished(tmp_path, 78.0)
    wanted = [("a3-resnet50-s0", "a3", "resnet50", 0), ("a3-resnet50-s9", "a3", "resnet50", 9), ("x-y-s0", "x", "y", 0)]
    members = [Member(run_id=i, recipe=recipe, model=model, seed=seed) for i, recipe, model, seed in wanted]
    sweep = Sweep(sweep_id="s-1", file="", created=1e9, members=tuple(members))
    collection = collect([Run.at(tmp_path, member.run_id) for member in members], [sweep])
    assert [(g.recipe, g.model, g.n, len(g.rows) + len(g.unfinished), g.verdict) for g in collection.groups] == [
        ("a3", "resnet50", 1, 2, "reproduced"),
        ("x", "y", 0, 1, "no result"),
    ]
    assert [(run.run_id, run.state) for run in collection.unfinished] == [
        ("a3-resnet50-s9", "missing"),
        ("x-y-s0", "missing"),
    ]
    missing = [row for row in csv.DictReader(io.StringIO(render(collection, "csv"))) if row["state"] == "missing"]
    assert [(row["recipe"], row["model"], row["seed"]) for row in missing] == [("a3", "resnet50", "9"), ("x", "y", "0")]
    for format in ("table", "md", "latex", "html"):
        assert "1/2" in render(collection, format)


@pytest.mark.s3
def test_a_store_that_is_no_local_folder_is_read_too(s3, s3_bucket, monkeypatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    runs = [finish(make_run(f"s3://{s3_bucket}/runs", seed=seed), 78.0 + seed / 10) for seed in range(3)]  # type: ignore[arg-type]
    group = only(collect(runs))
    assert group.n == 3
    assert group.mean == pytest.approx(78.1)


def test_the_login_node_imports_neither_torch_nor_timm() -> None:
    code = "import rsb_cluster.results.collect, sys; print([m for m in ('torch', 'timm', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
