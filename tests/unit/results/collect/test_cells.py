"""What stands in the cells of a table and below it."""

from __future__ import annotations

from pathlib import Path

from rsb_cluster.results.collect import collect, render
from tests.unit.results.collect.made import a1, a_recipe, finish, make_run


def test_many_changes_are_counted_in_the_table_and_listed_below(tmp_path: Path) -> None:
    changes = {"optimizer.lr": (8e-3, 4e-3), "augment.mixup": (0.1, 0.2), "augment.rand_augment": ("x", "")}
    text = render(collect([finish(make_run(tmp_path, spec={"modified": changes}), 77.0)]), "table")
    assert "a3 with 3 changes" in text
    assert "augment.mixup 0.1 → 0.2, augment.rand_augment x → '', optimizer.lr 0.008 → 0.004" in text


def test_the_span_of_batchnorm_is_said_once_or_for_each_row_where_rows_differ(tmp_path: Path) -> None:
    runs = [finish(make_run(tmp_path, recipe), 77.0) for recipe in (a_recipe(), a1("resnet50"))]
    lines = render(collect(runs), "table").splitlines()
    papers = "2048 = 4 virtual ranks of 512 images, BatchNorm over 512 as in the paper"
    at = lines.index("Global batch:")
    assert lines[at + 1 :] == [f"  {papers}"]
    runs.append(finish(make_run(tmp_path, a1("resnet18"), tag="-wide", spec={"virtual_ranks": 32}), 77.0))
    runs.append(finish(make_run(tmp_path, a1("resnet50", "train.global_batch=1024"), tag="-half"), 77.0))
    text = render(collect(runs), "md")
    assert f"- {papers}: a1, resnet50; a3, resnet50\n" in text
    assert "- 2048 = 32 virtual ranks of 64 images, BatchNorm over 64: a1, resnet18\n" in text
    assert "- 1024 = 4 virtual ranks of 256 images, BatchNorm over 256: a1, resnet50\n" in text
