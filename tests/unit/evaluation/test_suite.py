"""A suite: what there is of it, what is missing with how to make it, and one row for weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from rsb_cluster.cli import main
from rsb_cluster.data.datasets import known_data_sets
from rsb_cluster.data.labels import CLASS_MASKS
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.errors import ConfigError, DataError
from rsb_cluster.evaluation.suite import SUITES, find_suite, suite_rows
from rsb_cluster.results.references.other_data import published_on
from rsb_cluster.storage.store import Store
from tests.unit import formats
from tests.unit.results.collect.made import an_evaluation


def made(root: Path, *names: str) -> str:
    """A folder with small copies of these data sets."""
    for name in names:
        source = root / "in" / name
        source.mkdir(parents=True)
        formats.FORMATS[name](source)
        make_set(open_set(name, root=source, any_count=True), Store(root / "data" / name))
    return str(root / "data")


def test_the_columns_are_data_sets_that_are_known_by_name() -> None:
    for item in SUITES["imagenet"]:
        assert "val" in known_data_sets()[item.data_set].samples
        assert item.labels in ("", "real", *CLASS_MASKS)
        # Those of timm, by which a user sees whether the evaluation is right; V2's other variants have none.
        labels = item.labels or known_data_sets()[item.data_set].default_labels
        published = published_on(item.data_set, labels, "A1", "resnet50")
        assert any(value.reference.released for value in published) != (
            item.data_set in ("imagenet-v2-threshold", "imagenet-v2-top-images")
        )


def test_what_is_missing_is_named_with_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = made(tmp_path, "imagenet-sketch", "imagenet-r")
    for found in (find_suite("imagenet", data), monkeypatch.setenv("RSB_DATA", data) or find_suite("imagenet")):
        assert [(item.title, folder) for item, folder in found.items] == [
            ("Sketch", f"{data}/imagenet-sketch"),
            ("R", f"{data}/imagenet-r"),
        ]
        assert len(found.missing) == 8
        assert f"Make it: rsb-cluster shards make imagenet-a {data}/imagenet-a --split val" in found.missing[-3]
    (tmp_path / "data" / "imagenet-r").rename(tmp_path / "data" / "imagenet-1k")
    titles = [item.title for item, _ in find_suite("imagenet", data).items]
    assert titles == ["val", "Sketch", "A clean", "R clean"]
    assert "Add them: rsb-cluster shards labels real" in find_suite("imagenet", data).missing[0]
    with pytest.raises(DataError, match=r"has none of the data sets of the suite 'imagenet'"):
        find_suite("imagenet", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"no suite 'objectnet'\. There is: imagenet"):
        find_suite("objectnet", data)


def test_weights_are_one_row_and_the_same_name_is_told_apart() -> None:
    val, real = SUITES["imagenet"][:2]
    one, other = an_evaluation(80.38), an_evaluation(70.0, weights_digest="other" * 8)
    assert suite_rows([(val, one), (real, an_evaluation(85.7, labels="real"))]) == {
        one.weights: {"val": 80.38, "ReaL": 85.7}
    }
    rows = suite_rows([(val, one), (val, other)])
    assert list(rows.values()) == [{"val": 80.38}, {"val": 70.0}]
    assert all(name.startswith(f"{one.weights} (") for name in rows)


def test_one_command_gives_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = made(tmp_path, "imagenet-a")
    torch.manual_seed(0)
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet", num_classes=1000).state_dict(), file)
    base = ["evaluate", str(file), "--model", "test_resnet", "--runs", str(tmp_path / "runs"), "--suite", "imagenet"]

    def run(*more: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([*base, *more], prog_name="rsb-cluster")
        return ended.value.code, *capsys.readouterr()

    code, out, err = run("--data", data, "--resolution", "32", "--procs", "1")
    assert code == 0, err
    head, row = (line for line in out.splitlines() if line.strip(" ─"))
    assert head.split() == ["weights", "A"]
    assert row.split()[0] == "weights.safetensors"
    assert "V2 top images is left out" in err and "evaluated 6 of 6 images" in err
    code, _, err = run("--data", data, "--labels", "real")
    assert code == 2 and "--suite sets data, labels and metrics" in err
