"""The input pipelines, in trainings of one process: both reach the same accuracy, and a damaged image is named."""

import dataclasses
from pathlib import Path

import pytest

from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.runs.metrics import read_rows
from rsb_cluster.storage.store import Store
from tests.command import RsbCluster
from tests.faults.lab import Lab


def test_both_pipelines_reach_the_same_accuracy(tmp_path: Path, fashion: Path) -> None:
    """Ours on threads, and timm's own transforms in processes: 80 steps with RandAugment."""
    sources = open_set("FashionMNIST", root=fashion)
    sizes = {"train": 10_240, "val": 4_000}
    data = tmp_path / "data"
    make_set({n: dataclasses.replace(s, entries=s.entries[: sizes[n]]) for n, s in sources.items()}, Store(data))
    found = {}
    for pipeline in ("fast", "timm"):
        lab = Lab.of(
            tmp_path / pipeline, data, "fashion-mnist", "model.name=test_resnet", f"data.pipeline={pipeline}",
            "augment.rand_augment=rand-m7-mstd0.5-inc1", *(f"data.{name}_samples={n}" for name, n in sizes.items()),
            "train.global_batch=128", "schedule.epochs=2", "eval.every_epochs=2",
        )  # fmt: skip
        lab.job = lab.job.model_copy(update={"loader_workers": 2, "log_every_steps": 20})
        assert lab.start() == "finished"
        found[pipeline] = lab.run.store.read_json("result.json")["top1"]
    assert found["fast"] > 70
    assert found["fast"] == pytest.approx(found["timm"], abs=2.0), found


def test_a_damaged_image_is_named_and_ends_the_run(
    rsb: RsbCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also: within data.max_bad_samples it is counted, and the run continues."""
    source = open_set("digits")
    broken = source["train"].sample(17)[0]

    def read(entry: int):  # type: ignore[no-untyped-def]
        key, image, extension, label = source["train"].read(entry)
        return key, image[:60] if key == broken else image, extension, label

    make_set({**source, "train": dataclasses.replace(source["train"], read=read)}, Store(tmp_path / "data"))
    for allowed in (0, 1):
        name = f"digits-test_resnet-s{allowed}-00000000"
        lab = Lab.of(
            tmp_path / "runs" / name, tmp_path / "data", "digits", "model.name=test_resnet", "schedule.epochs=2",
            "schedule.warmup_epochs=1", f"data.max_bad_samples={allowed}",
        )  # fmt: skip
        assert lab.start() == ("finished" if allowed else "failed")
        assert f"cannot decode {broken}" in capfd.readouterr().err
    failed, finished = rsb.json("status", "--json")
    assert (failed["state"], finished["state"]) == ("failed", "finished")
    assert "data.max_bad_samples allows 0" in failed["cause"]
    assert max(row.get("bad_samples", 0) for row in read_rows(lab.run)) == 1
