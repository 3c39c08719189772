"""Parquet files of the Hugging Face Hub."""

import errno
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import ParquetChoice, open_set
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


@pytest.mark.parametrize(("name", "key"), [("a.png", "a"), ("a.TIFF", "a"), ("a.jfif", ""), ("a.avif", ""), ("a", "")])
def test_the_paths_that_become_keys_are_those_of_all_versions(tmp_path, name, key):
    """Runs know their data by a digest that has the keys in it."""
    (tmp_path / "in").mkdir()
    images = [{"bytes": formats.picture(i), "path": path} for i, path in enumerate((name, "b.jpg"))]
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "in" / "val-00000-of-00001.parquet")
    (source,) = open_set(f"{tmp_path}/in", split="val").values()
    assert source.keys() == ([key, "b"] if key else ["val-0000000", "val-0000001"])


def test_parquet_files_that_cannot_be_used_are_named(tmp_path):
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
        ("unlabelled", {"image": [image], "label": [-1]}, "holds -1 in 'label', which is not a class"),
        ("columns", {"image": [image], "text": ["x"]}, "no label column; its columns are image, text"),
        ("pixels", {"pixels": [[1, 2]], "label": [0]}, "no image column; its columns are pixels, label"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_set(f"{written(name, **columns)}", split="val")
    empty = open_set(f"{written('empty', image=[b''], label=[0])}", split="val")["val"]
    with pytest.raises(ConfigError, match=r"row 0 of row group 0 has no bytes"):
        empty.sample(0)
    formats.parquet(tmp_path / "both")
    with pytest.raises(ConfigError, match=r"no \.parquet file in .* is of train; there is val"):
        (tmp_path / "both" / "data" / "train-00000-of-00002.parquet").unlink()
        (tmp_path / "both" / "data" / "train-00001-of-00002.parquet").unlink()
        open_set(f"{tmp_path}/both", split="train")


def table(file: Path, **columns: Any) -> Path:
    """Write a parquet file, and return its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file.parent


def labelled(folder: Path, train: list[Any], val: list[Any], kind: pa.DataType | None = None) -> str:
    """A data set with these labels, without the names of its classes."""
    for part, labels, seed in (("train", train, 0), ("validation", val, 50)):
        images = [formats.picture(seed + i) for i in range(len(labels))]
        table(folder / f"{part}.parquet", image=images, label=pa.array(labels, kind))
    return str(folder)


@pytest.mark.parametrize(
    ("train", "val", "kind", "message"),
    [
        (
            [0, None, 1, None],
            [0],
            pa.int64(),
            r"row 1 of row group 0 in .*train\.parquet holds None in 'label'.*2 of 4",
        ),
        (["cat", None], [], pa.string(), r"holds None in 'label', which is none of the 1 classes \(cat\)"),
        ([0, 1 << 40], [0], pa.int64(), r"holds 1099511627776 in 'label', which is not a class from 0"),
        ([0.0, 1.0], [0.0], pa.float64(), r"holds 0\.0 in 'label'"),
        ([[0], [1, 2]], [[0]], pa.list_(pa.int64()), r"holds \[0\] in 'label'"),
        (["cat", "dog"], ["owl"], pa.string(), r"validation\.parquet holds 'owl' in 'label', which is none of the 2"),
    ],
)
def test_labels_that_are_no_classes_are_counted_and_located(tmp_path, train, val, kind, message):
    with pytest.raises(ConfigError, match=message):
        open_set(labelled(tmp_path, train, val, kind))


def test_truth_values_are_two_classes_and_val_may_lack_one(tmp_path):
    opened = open_set(labelled(tmp_path / "truth", [True, False, True], [True], pa.bool_()))
    assert [opened["train"].sample(i)[3] for i in range(3)] == [1, 0, 1]
    assert opened["val"].classes == ("False", "True") and opened["val"].sample(0)[3] == 1
    # The numbers are those of train, whatever val has.
    opened = open_set(labelled(tmp_path / "names", ["cat", "owl", "dog"], ["owl", "dog"], pa.string()))
    assert opened["train"].classes == opened["val"].classes == ("cat", "dog", "owl")
    assert [opened["val"].sample(i)[3] for i in range(2)] == [2, 1]
    assert open_set(f"{tmp_path}/names", split="val")["val"].classes == ("cat", "dog", "owl")


def test_labels_beyond_the_names_are_refused(tmp_path):
    about = {"huggingface": '{"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}'}
    columns = pa.table({"image": [formats.picture(0)] * 2, "label": [1, 2]}).replace_schema_metadata(about)
    pq.write_table(columns, tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match=r"row 1 of .* holds 2 in 'label', which is not a class from 0 to 1"):
        open_set(f"{tmp_path}")


def test_of_several_columns_the_user_chooses(tmp_path):
    mask, photo = formats.picture(0), formats.picture(1)
    folder = table(tmp_path / "a" / "train.parquet", mask=[mask], photo=[photo], fine_label=[4], coarse_label=[2])
    with pytest.raises(ConfigError, match=r"several image columns: mask, photo\. Choose one with --image-column"):
        open_set(f"{folder}")
    with pytest.raises(ConfigError, match=r"several label columns: fine_label, coarse_label\..*--label-column"):
        open_set(f"{folder}", choice=ParquetChoice(image_column="photo"))
    with pytest.raises(ConfigError, match=r"has no column 'picture'; its columns are mask, photo"):
        open_set(f"{folder}", choice=ParquetChoice(image_column="picture"))
    with pytest.raises(ConfigError, match=r"'fine_label' .* has no bytes of images: it is int64"):
        open_set(f"{folder}", choice=ParquetChoice(image_column="fine_label"))
    opened = open_set(f"{folder}", choice=ParquetChoice(image_column="photo", label_column="coarse_label"))["train"]
    assert opened.sample(0)[1:] == (photo, "jpg", 2)
    assert opened.notes == ("columns that are not used: mask, fine_label",)
    folder = table(tmp_path / "b" / "train.parquet", mask=[mask], image=[photo], label=[4])
    opened = open_set(f"{folder}")["train"]
    assert (opened.sample(0)[1], opened.notes) == (photo, ("columns that are not used: mask",))


def test_files_that_are_no_parquet_files_are_named(tmp_path):
    formats.parquet(tmp_path)
    file = tmp_path / "data" / "train-00001-of-00002.parquet"
    whole = file.read_bytes()
    for content, message in (
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            r"00001.* pointer of Git LFS.*lfs pull",
        ),
        (whole[: len(whole) // 2], r"00001-of-00002\.parquet is no complete parquet file.*Download it again"),
        (b"", r"00001-of-00002\.parquet is no complete parquet file"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            open_set(f"{tmp_path}")
    damaged = bytearray(whole)
    damaged[4:400] = bytes(396)
    file.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"no complete parquet file"):
        make_set(open_set(f"{tmp_path}"), Store(tmp_path / "out"))


def test_files_with_other_class_names_are_refused(tmp_path):
    formats.parquet_file(tmp_path / "train-0.parquet", 0)
    formats.parquet_file(tmp_path / "train-1.parquet", 50, names=False)
    with pytest.raises(ConfigError, match=r"train-1\.parquet has other columns or class names than .*train-0"):
        open_set(f"{tmp_path}")


def test_pictures_beside_parquet_files_are_no_samples(tmp_path):
    """And parquet files beside pictures are no data set."""
    formats.parquet(tmp_path / "hub")
    formats.write(tmp_path / "hub" / "assets" / "banner.png", formats.picture(0, format="PNG"))
    opened = open_set(f"{tmp_path}/hub")
    assert len(opened["train"]) == 20
    assert opened["train"].notes == ("images beside the parquet files are left out: 1 (assets/banner.png)",)
    for part in ("train", "val"):
        formats.class_folders(tmp_path / "images" / part, ("cat", "dog"), 2, seed=len(part), suffix="jpg")
    table(tmp_path / "images" / "00000.parquet", key=["a"], url=["http://x"], caption=["y"])
    assert len(open_set(f"{tmp_path}/images")["train"]) == 4
    with pytest.raises(ConfigError, match=r"--config and the columns are for parquet files"):
        open_set(f"{tmp_path}/images", choice=ParquetChoice(config="default"))


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "PPM"])
def test_all_images_that_pillow_reads_are_taken(tmp_path, kind):
    image = formats.picture(0, format=kind)
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": [image], "label": [0]}), tmp_path / "in" / "val-0.parquet")
    made = make_set(open_set(f"{tmp_path}/in", split="val"), Store(tmp_path / "out"))
    assert made["val"].num_samples == 1 and verify(Store(tmp_path / "out" / "val"), decode=True).problems == []


def test_what_is_no_file_is_never_opened_and_a_folder_that_cannot_be_listed_is_not_empty(tmp_path, monkeypatch):
    for name in ("pipe", "link"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / "train-0.parquet")
    (tmp_path / "link" / "train-0.parquet").symlink_to("/nowhere")
    for name in ("pipe", "link"):
        with pytest.raises(ConfigError, match=r"train-0\.parquet is no regular file, or a link to none"):
            open_set(f"{tmp_path}/{name}", split="train")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    (tmp_path / "in" / "closed").mkdir(parents=True)
    pq.write_table(pa.table({"image": [formats.picture(0)], "label": [0]}), tmp_path / "in" / "train-0.parquet")
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match=r"cannot read .*closed: Permission denied"):
        open_set(f"{tmp_path}/in", split="train")
