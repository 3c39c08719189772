"""Parquet files of the Hugging Face Hub."""

from pathlib import Path

import pytest

from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.data.verify import verify
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import Store
from tests.unit import formats
from tests.unit.tars import read_back


@pytest.mark.parametrize(
    ("how", "workers"), [({}, 2), ({"paths": False, "names": False}, 1), ({"text_labels": True, "names": False}, 1)]
)
def test_parquet_files_of_the_hub_come_back_with_their_bytes_and_classes(tmp_path, how, workers):
    wanted = formats.parquet(tmp_path / "in", **how)
    sources = open_set(f"{tmp_path}/in")
    dest = Store(tmp_path / "out")
    made = make_set(sources, dest, shard_samples=6, workers=workers)
    for part in ("train", "val"):
        assert read_back(dest.child(part)) == wanted[part]
        assert verify(dest.child(part), decode=True).problems == []
    assert made["train"].classes == (() if how.get("names") is False and "paths" in how else ("cat", "dog", "owl"))
    keys = {made["val"].key(i) for i in range(10)}
    assert ("val-0000003" if how.get("paths") is False else "validation/owl%2E109") in keys


def test_parquet_files_that_cannot_be_used_are_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def written(name: str, **columns: list[object]) -> Path:
        (tmp_path / name).mkdir()
        pq.write_table(pa.table(columns), tmp_path / name / "all.parquet")
        return tmp_path / name

    image = formats.picture(0)
    odd = written("odd", image=[image], label=[0])
    with pytest.raises(ConfigError, match=r"do not tell their split.*--split"):
        open_set(f"{odd}")
    assert open_set(f"{odd}", split="val")["val"].sample(0) == ("val-0000000", image, "jpg", 0)
    for name, columns, message in (
        ("unlabelled", {"image": [image], "label": [-1]}, "holds -1, which is not a class"),
        ("columns", {"image": [image], "text": ["x"]}, "no label column; its columns are image, text"),
        ("pixels", {"pixels": [[1, 2]], "label": [0]}, "no image column; its columns are pixels, label"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_set(f"{written(name, **columns)}", split="val")
    empty = open_set(f"{written('empty', image=[b''], label=[0])}", split="val")["val"]
    with pytest.raises(ConfigError, match=r"row 0 of row group 0 has no bytes"):
        empty.sample(0)
    formats.parquet(tmp_path / "both")
    with pytest.raises(ConfigError, match=r"no \.parquet file in .* is named train or training"):
        (tmp_path / "both" / "data" / "train-00000-of-00002.parquet").unlink()
        (tmp_path / "both" / "data" / "train-00001-of-00002.parquet").unlink()
        open_set(f"{tmp_path}/both", split="train")
