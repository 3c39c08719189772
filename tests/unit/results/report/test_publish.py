"""A sweep's results lie next to it."""

from __future__ import annotations

from pathlib import Path

from rsb_cluster.results.report import publish
from rsb_cluster.runs.lookup import list_folders
from rsb_cluster.runs.sweep import Member, Sweep, write_sweep
from tests.made_runs import make_runs


def test_results_are_put_next_to_their_sweep(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, 3, rows=5, endings=("finished",))
    members = [Member(run_id=run.run_id, recipe="a1", model="m", seed=0) for run in runs[:2]]
    members.append(Member(run_id="a1-m-s9-00000000", recipe="a1", model="m", seed=9))
    write_sweep(str(tmp_path), Sweep(sweep_id="deep-1", file="", created=0.0, members=tuple(members)))
    folder = publish(str(tmp_path), "deep")
    assert folder.url == str(tmp_path / "sweeps" / "deep-1")
    found = folder.read_json("collect.json")
    assert sum(group["n"] for group in found["groups"]) == 2
    assert [run["run_id"] for run in found["unfinished"]] == ["a1-m-s9-00000000"]
    page = folder.read_bytes("report.html").decode()
    assert f"../../{runs[0].run_id}/logs/0001-rank00000.log" in page
    assert runs[2].run_id not in page
    assert len(list_folders(str(tmp_path))) == 3, "a sweep's folder is no run"
