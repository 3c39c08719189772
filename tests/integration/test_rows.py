"""Each row of the paper, and of papers that cite it, from the downloaded files to a row of collect.

Small copies of the data sets, laid out as their authors ship them, are made into shards, verified, trained on for a few
steps, evaluated and collected; all in this process.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from rsb_cluster.data.datasets import known_data_sets
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.data.verify import verify
from rsb_cluster.results.collect import collect, render
from rsb_cluster.results.references.other_data import not_public
from rsb_cluster.storage.store import Store
from tests.faults.lab import Lab
from tests.unit import formats
from tests.unit.evaluating import evaluate

SETS = {**formats.FORMATS, "indl-zollner": formats.indl, "parquet": formats.parquet}


@pytest.mark.usefixtures("unchecked_hashes")
@pytest.mark.parametrize("name", SETS)
def test_from_the_files_of_a_data_set_to_a_row_of_collect(tmp_path: Path, name: str) -> None:
    root, data, runs = tmp_path / "in", tmp_path / "data" / name, tmp_path / "runs"
    root.mkdir()
    SETS[name](root)
    known = known_data_sets().get(name)
    opened = open_set(name, root=root, any_count=True) if known else open_set(str(root))
    made = make_set(opened, Store(data), shard_samples=5)
    for part, index in made.items():
        report = verify(Store(data / part), decode=True)
        assert (report.problems, report.samples) == ([], index.num_samples)

    predictions = str(tmp_path / "predictions.csv") if name == "vizwiz-classification" else ""  # has no public labels
    classes = made["val"].num_classes
    if "train" in made:
        lab = Lab(
            runs / f"digits-test_resnet-s0-{name}", data, f"data.set={name}", f"data.num_classes={classes}",
            f"data.train_samples={made['train'].num_samples}", f"data.val_samples={made['val'].num_samples}",
            "augment.resolution=64", "eval.resolution=64", "train.global_batch=4", "schedule.epochs=2",
            "augment.mixup=0", "augment.cutmix=0",  # micro-batches of one image
        )  # fmt: skip
        assert lab.attempt().cause == "finished"
        (found,) = evaluate(runs, lab.run.url, data=data)
        assert found.values["top1"] == pytest.approx(lab.run.store.read_json("result.json")["top1"])
        collected = collect([lab.run])
    else:
        file = tmp_path / "weights.safetensors"
        torch.manual_seed(0)
        safetensors.torch.save_file(timm.create_model("test_resnet", num_classes=classes).state_dict(), file)
        (found,) = evaluate(runs, file, data=data, model="test_resnet", resolution=64, predictions=predictions)
        collected = collect([], weights_in=str(runs))

    assert (found.data_set, found.samples) == (name if known else "parquet", made["val"].num_samples)
    assert found.metric == (known.metric if known else "top1")
    assert found.scored == (0 if predictions else found.samples)
    if known and found.scored:
        assert set(found.values) >= {known.metric, *known.also}
    (line,) = collected.evaluations
    # A few images do not count as an evaluation of the data set, and unknown data sets have no published number.
    assert line.verdict == ("not counted" if known else "no reference")
    assert line.delta is None
    text = render(collected, "md")
    assert f"| {found.data_set}/val |" in text
    assert (not_public(name) in text) if not_public(name) else True
