"""Where two curves part, and what is said of two runs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from rsb_cluster.cli import main
from rsb_cluster.results.compare import compare, compare_curves
from rsb_cluster.runs.run import Run, Submission
from tests.unit.results.collect.made import a_recipe, attempt, finish, make_run


def rows(*losses: float, every: int = 10) -> list[dict[str, Any]]:
    return [{"kind": "train", "step": (i + 1) * every, "loss": loss} for i, loss in enumerate(losses)]


def noisy(number: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [2.0 * math.exp(-i / 40) + draw.gauss(0, 0.02) for i in range(number)]


def test_equal_curves_are_equal_whatever_else_was_logged() -> None:
    nan = [*noisy(5), float("nan")]
    found = compare_curves(rows(*nan), [{"kind": "eval", "step": 10, "top1": 3.0}, *rows(*nan)])
    assert (found.common, found.last_equal, found.first_different, found.parted) == (6, 60, None, None)
    assert compare_curves([], rows(1.0)).common == 0


def test_rounding_is_a_difference_but_no_parting() -> None:
    one = noisy(40)
    other = one[:7] + [loss * (1 + 1e-6) for loss in one[7:]]
    found = compare_curves(rows(*one), rows(*other))
    assert (found.last_equal, found.first_different, found.parted) == (70, 80, None)
    assert found.losses == (one[7], other[7])


def test_curves_part_where_they_differ_for_good_by_more_than_their_scatter() -> None:
    one = noisy(60)
    other = one[:20] + [loss + 1e-9 for loss in one[20:30]] + [loss + 0.3 for loss in one[30:]]
    other[25] += 5.0  # one bad step is no parting
    found = compare_curves(rows(*one), rows(*other))
    assert (found.first_different, found.parted) == (210, 310)
    assert found.parted_losses == (one[30], other[30])
    diverged = one[:30] + [float("nan")] * 30
    assert compare_curves(rows(*one), rows(*diverged)).parted == 310
    assert compare_curves(rows(*noisy(60, seed=1)), rows(*noisy(60, seed=2))).parted is None, "only other noise"


def test_only_steps_that_both_logged_are_compared() -> None:
    found = compare_curves(rows(*noisy(40)), rows(*noisy(10), every=40))
    assert (found.common, found.intervals) == (10, (10, 40))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Run, Run]:
    one = make_run(tmp_path, a_recipe("optimizer.lr=0.008"), spec={"packages": {"torch": "2.8.0", "timm": "1.0.20"}})
    changed = {"packages": {"torch": "2.9.0", "timm": "1.0.20"}, "virtual_ranks": 8, "modified": {}}
    other = make_run(tmp_path, a_recipe("optimizer.lr=0.004", "model.kwargs={'x'=1}"), seed=3, spec=changed)
    for run, gpu, top1 in ((one, "H100", 80.3), (other, "A100", 79.99144846796657)):
        attempt(run, environment={"GPU": gpu, "torch": run.spec().packages["torch"]}, gpus=4)
        finish(run, top1)
        lines = "\n".join(json.dumps(row) for row in rows(1.0, 0.9, 0.8 if gpu == "H100" else 0.81))
        run.store.write_bytes("metrics/0001-000000.jsonl", f"{lines}\n".encode())
    other.add_submission(Submission(backend="slurm", job_id="1", folder="", shape="", time=1.0, data="s3://moved"))
    return one, other


def test_what_differs_is_named_by_kind(two: tuple[Run, Run]) -> None:
    found = compare(*two)
    assert found.differences["recipe"] == {"model.kwargs": ({}, {"x": 1}), "optimizer.lr": (0.008, 0.004)}
    assert found.differences["seed and virtual ranks"] == {"seed": (0, 3), "virtual ranks": (4, 8)}
    assert found.differences["data"] == {"folder": ("s3://data", "s3://moved")}
    assert found.differences["versions"] == {"torch": ("2.8.0", "2.9.0")}
    assert found.differences["hardware"] == {"GPU": ("H100", "A100"), "back end": ("", "slurm")}
    assert found.scores["top1"] == (80.3, 79.99144846796657)
    assert compare(two[0], two[0]).differences == {}


def test_it_is_one_screen_and_json(two: tuple[Run, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*more: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["compare", *(run.run_id for run in two), "--runs", str(tmp_path), *more], prog_name="rsb-cluster")
        said = capsys.readouterr()
        assert ended.value.code == 0, said.err
        return said.out

    shown = run()
    assert len(shown.splitlines()) <= 40
    assert "79.99 " in shown and "-0.31" in shown and "79.9914" not in shown
    assert "bitwise equal up to step 20; at step 30 0.8 and 0.81" in shown
    values = json.loads(run("--json"))
    assert values["differences"]["hardware"]["GPU"] == ["H100", "A100"] and values["curves"]["first_different"] == 30
