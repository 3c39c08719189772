"""What stands in the cells of a table and below it."""

from __future__ import annotations

from pathlib import Path

from rsb_cluster.results.collect import collect, render
from tests.unit.results.collect.made import finish, make_run


def test_many_changes_are_counted_in_the_table_and_listed_below(tmp_path: Path) -> None:
    changes = {"optimizer.lr": (8e-3, 4e-3), "augment.mixup": (0.1, 0.2), "augment.rand_augment": ("x", "")}
    text = render(collect([finish(make_run(tmp_path, spec={"modified": changes}), 77.0)]), "table")
    assert "a3 with 3 changes" in text
    assert "augment.mixup 0.1 → 0.2, augment.rand_augment x → '', optimizer.lr 0.008 → 0.004" in text
