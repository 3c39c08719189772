"""Each known data set, in a small copy of its own layout on disk, through make, verify and index; and the table."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsb_cluster.data.datasets import known_data_sets
from rsb_cluster.data.index import load_index
from rsb_cluster.data.labels import load_label_sets
from rsb_cluster.data.make import make_set
from rsb_cluster.data.part import source_of
from rsb_cluster.data.sources import open_set
from rsb_cluster.data.sources.illusions import SETS, indl
from rsb_cluster.data.sources.imagenet import imagenet_synsets
from rsb_cluster.data.verify import stats, verify
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import Store
from tests.unit import formats
from tests.unit.data.test_make import contents
from tests.unit.data.test_scan import image_slice


@pytest.fixture(autouse=True)
def _hashes(monkeypatch):
    """torchvision checks the hashes of some files; ours have others."""
    for module in ("flowers102", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)


def read_back(store):
    """The images of a part, with the classes that its index has for them."""
    index = load_index(store)
    return {image_slice(store, index, i): int(index.labels[i]) for i in range(index.num_samples)}


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_small_copy_comes_back_with_its_bytes_and_classes(tmp_path, name):
    root = tmp_path / "in"
    root.mkdir()
    wanted = formats.FORMATS[name](root)
    sources = open_set(name, root=root, any_count=True)
    dest = Store(tmp_path / "out")
    made = make_set(sources, dest, shard_samples=4)
    assert set(made) == set(wanted) == set(known_data_sets()[name].samples)
    for part, images in wanted.items():
        found = read_back(dest.child(part))
        if name.startswith("cifar"):  # pixels are all there is
            found = {np.asarray(Image.open(io.BytesIO(image))).tobytes(): label for image, label in found.items()}
        assert found == images
        report = verify(dest.child(part), decode=True)
        assert (report.problems, report.samples) == ([], len(images))
        assert source_of(dest.child(part))["data_set"] == stats(dest.child(part)).data_set == name
        assert made[part].num_classes == len(sources[part].classes)


def test_the_table_is_whole_and_agrees_with_the_paper():
    known = known_data_sets()
    assert set(formats.FORMATS) | {"digits", "fashion-mnist"} | {f"indl-{name}" for name in SETS} == set(known)
    table5 = {
        "imagenet-1k": (1_281_167, 50_000, 1000),
        "flowers102": (2_040, 6_149, 102),
        "stanford-cars": (8_144, 8_041, 196),
        "cifar100": (50_000, 10_000, 100),
        "cifar10": (50_000, 10_000, 10),
    }
    for name, (train, val, classes) in table5.items():
        assert known[name].samples == {"train": train, "val": val}
        assert known[name].classes == classes
        assert known[name].metric == "top1"
    assert sum(known["inat2019"].samples.values()) == 265_240 + 3_003
    assert known["vizwiz-classification"].default_labels == "vizwiz"
    assert all(data_set.download and data_set.licence for data_set in known.values())


@pytest.mark.parametrize("name", ["imagenet-1k", "inat2019", "nct-crc-he", "stanford-cars"])
def test_a_wrong_count_says_what_was_expected(tmp_path, name):
    formats.FORMATS[name](tmp_path)
    part = next(iter(known_data_sets()[name].samples))
    expected = f"{known_data_sets()[name].samples[part]:,}"
    with pytest.raises(ConfigError, match=rf"there are \d+ images, and {part} of {name} has {expected}.*--any-count"):
        open_set(name, root=tmp_path)


def test_a_wrong_number_of_classes_is_refused_too(monkeypatch, tmp_path):
    formats.class_folders(tmp_path / "NCT-CRC-HE-100K", ("ADI", "BACK"), 2, seed=0, suffix="tif")
    known = dict(known_data_sets())
    known["nct-crc-he"] = known["nct-crc-he"].model_copy(update={"samples": {"train": 4}})
    monkeypatch.setattr("rsb_cluster.data.sources.known_data_sets", lambda: known)
    with pytest.raises(ConfigError, match=r"there are 2 classes, and train of nct-crc-he has 9"):
        open_set("nct-crc-he", root=tmp_path)


def test_a_known_data_set_without_its_folder_says_what_is_needed(tmp_path):
    with pytest.raises(ConfigError, match=r"--root FOLDER, which holds .*ILSVRC2012_img_train\.tar.*image-net\.org"):
        open_set("imagenet-1k")
    with pytest.raises(ConfigError, match=r"imagenet-v2 has no train: it has val only"):
        open_set("imagenet-v2", root=tmp_path, split="train")
    for name in ("inat2019", "vizwiz-classification"):
        with pytest.raises(ConfigError, match=r"cannot read .*\.json: No such file.*Check --root"):
            open_set(name, root=tmp_path / "nowhere")
    (tmp_path / "annotations.json").write_text('{"images": ["a.jpg"]}')
    with pytest.raises(ConfigError, match=r"annotations\.json is not in the form .* KeyError 'categories'"):
        open_set("vizwiz-classification", root=tmp_path)


def test_imagenets_tars_and_folders_give_the_same_shards(tmp_path):
    """Whether the devkit is packed, and whether val is a tar, a flat folder or class folders."""
    made = {}
    for case, how in {"tars": {}, "flat": {"packed_devkit": False, "val_tar": False}, "folders": None}.items():
        root = tmp_path / case
        root.mkdir()
        if how is None:
            formats.imagenet_folders(root)
        else:
            formats.imagenet_tars(root, **how)
        make_set(open_set("imagenet-1k", root=root, any_count=True), Store(tmp_path / f"{case}-out"), shard_samples=5)
        made[case] = {
            name: content for name, content in contents(tmp_path / f"{case}-out").items() if "source.json" not in name
        }
    assert made["tars"] == made["flat"] == made["folders"]
    assert len(made["tars"]) == (5 + 2) + (3 + 3)
    index = load_index(Store(tmp_path / "tars-out" / "val"))
    assert index.classes == formats.WNIDS
    # The devkit's own numbers would be 4, 1, 3, 2 here.
    assert {index.key(i)[-1]: int(index.labels[i]) for i in range(12) if int(index.key(i)[-8:]) <= 4} == {
        "1": 3, "2": 2, "3": 1, "4": 0,
    }  # fmt: skip


def test_a_cut_tar_and_a_missing_devkit_are_named(tmp_path):
    formats.imagenet_tars(tmp_path)
    devkit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    devkit.rename(tmp_path / "elsewhere.tar.gz")
    with pytest.raises(ConfigError, match=r"neither .*devkit_t12\.tar\.gz nor .*There is: .*ILSVRC2012_img_val\.tar"):
        open_set("imagenet-1k", root=tmp_path, split="val", any_count=True)
    train = tmp_path / "ILSVRC2012_img_train.tar"
    content = train.read_bytes()
    for size in (len(content) // 2, 12_000):
        train.write_bytes(content[:size])
        with pytest.raises(ConfigError, match=r"ILSVRC2012_img_train\.tar is not a whole tar.*Download it again"):
            open_set("imagenet-1k", root=tmp_path, split="train", any_count=True)
    train.unlink()
    with pytest.raises(ConfigError, match=r"neither .*ILSVRC2012_img_train\.tar nor .*with a folder per class"):
        open_set("imagenet-1k", root=tmp_path, split="train", any_count=True)


def test_reals_labels_come_with_imagenets_val(tmp_path):
    formats.imagenet_tars(tmp_path)
    store = Store(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        # Four classes cannot hold labels of a thousand.
        patch.setattr("rsb_cluster.data.labels.timm_info", lambda _: tmp_path / "real.json")
        real = [[i % 4] * (i % 3) for i in range(50_000)]
        (tmp_path / "real.json").write_text(str(real))
        make_set(open_set("imagenet-1k", root=tmp_path, any_count=True), store, shard_samples=5)
    assert not store.exists("train/labels-real.json")
    index = load_index(store.child("val"))
    sets = load_label_sets(store.child("val"), index, "real")
    for i in range(index.num_samples):
        assert sets.of(i).tolist() == real[int(index.key(i)[-8:]) - 1]
    assert sets.scored.sum() == 8
    assert stats(store.child("val")).label_sets == ("real",)


def test_v2_is_numbered_by_number_and_not_as_text(tmp_path):
    wanted = formats.imagenet_v2(tmp_path)["val"]
    source = open_set("imagenet-v2", root=tmp_path, any_count=True)["val"]
    assert source.classes == imagenet_synsets()
    assert len(source.classes) == 1000 and source.classes[:4] == formats.WNIDS
    assert {content: label for _, content, _, label in source} == wanted
    (tmp_path / "imagenetv2-top-images-format-val").mkdir()
    with pytest.raises(
        ConfigError, match=r"2 variants .*top-images-format-val.*timm's figures are on matched-frequency"
    ):
        open_set("imagenet-v2", root=tmp_path, any_count=True)
    formats.class_folders(tmp_path / "wnids", formats.WNIDS, 1, seed=0, suffix="JPEG")
    with pytest.raises(ConfigError, match=r"has the folder 'n01440764'; ImageNet-V2's are called 0 to 999"):
        open_set("imagenet-v2", root=tmp_path / "wnids", any_count=True)


def test_nct_is_numbered_by_the_folders_of_train(tmp_path):
    formats.nct_crc_he(tmp_path)
    for file in (tmp_path / "CRC-VAL-HE-7K" / "BACK").iterdir():
        file.unlink()
    (tmp_path / "CRC-VAL-HE-7K" / "BACK").rmdir()
    val = open_set("nct-crc-he", root=tmp_path, split="val", any_count=True)["val"]
    assert {key.split("/")[0]: label for key, _, _, label in val}["TUM"] == 8
    assert {extension for _, _, extension, _ in val} == {"tif"}


def test_vizwiz_keeps_the_classes_that_an_answer_may_be_and_labels_where_one_has_them(tmp_path):
    formats.vizwiz(tmp_path)
    store = Store(tmp_path / "out" / "val")
    make_set(open_set("vizwiz-classification", root=tmp_path, any_count=True), Store(tmp_path / "out"))
    sets = load_label_sets(store, load_index(store), "vizwiz")
    assert sets.among.tolist() == [7, 291]
    assert not sets.scored.any() and sets.groups == {}
    (tmp_path / "labels.json").write_text(
        '{"VizWiz_train_00000000.jpg": {"labels": [291, 7], "flaws": ["Blur", "Dark"]},'
        ' "VizWiz_val_00000003.jpg": {"labels": [7]}}'
    )
    source = open_set("vizwiz-classification", root=tmp_path, any_count=True)
    make_set(source, Store(tmp_path / "out"), overwrite=True)
    index = load_index(store)
    sets = load_label_sets(store, index, "vizwiz")
    place = {index.key(i): i for i in range(4)}
    assert sets.of(place["VizWiz_train_00000000"]).tolist() == [291, 7]
    assert sets.scored.sum() == 2
    members = {group: {key for key, i in place.items() if inside[i]} for group, inside in sets.groups.items()}
    first = {"VizWiz_train_00000000"}
    assert members == {"Blur": first, "Dark": first, "Corrupted": first, "Clean": {"VizWiz_val_00000003"}}
    assert index.labels[place["VizWiz_val_00000003"]] == 7


def test_illusions_are_drawn_alike_each_time_and_say_what_they_show(tmp_path):
    for name in SETS:
        parts = {split: indl(name, split) for split in ("train", "val")}
        assert {split: len(part) for split, part in parts.items()} == {"train": 8000, "val": 2000}
        some = [parts["val"].sample(i) for i in range(40)]
        assert some == [indl(name, "val").sample(i) for i in range(40)]
        assert len({image for _, image, _, _ in some}) > 30  # lines of whole pixels: a few are alike
        assert 8 < sum(label for *_, label in some) < 32
        image = Image.open(io.BytesIO(some[0][1]))
        assert image.size == (128, 128)
        assert image.mode == ("RGB" if name == "hering" else "L")
        assert name == "hering" or set(np.unique(np.asarray(image))) == {0, 255}
    with pytest.raises(ConfigError, match="InDL has no split 'test'"):
        indl("zollner", "test")


def test_illusions_of_one_length_are_of_one_length():
    """Read from the pixels: the standing line of the vertical and horizontal illusion, 0.5 of a square of 2."""
    lengths = {0: set(), 1: set()}
    for i in range(40):
        _, image, _, label = indl("vertical-horizontal", "train").sample(i)
        column = np.asarray(Image.open(io.BytesIO(image)))[:, 48]
        lengths[label].add(int((column == 0).sum()))
    assert max(lengths[1]) - min(lengths[1]) == 0
    assert max(lengths[1]) in (32, 33)
    assert max(lengths[0]) > 36


def test_the_authors_own_illusions_are_read_and_split(tmp_path):
    wanted = formats.indl(tmp_path)["all"]
    parts = open_set("indl-zollner", root=tmp_path, any_count=True)
    assert {split: len(part) for split, part in parts.items()} == {"train": 16, "val": 4}
    assert {image: label for part in parts.values() for _, image, _, label in part} == wanted


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
    with pytest.raises(ConfigError, match=r"do not say which split they are.*--split"):
        open_set(f"{odd}")
    assert open_set(f"{odd}", split="val")["val"].sample(0) == ("val-0000000", image, "jpg", 0)
    for name, columns, message in (
        ("unlabelled", {"image": [image], "label": [-1]}, "holds -1, which is no class"),
        ("columns", {"image": [image], "text": ["x"]}, "columns image, text: no label"),
        ("pixels", {"pixels": [[1, 2]], "label": [0]}, "columns pixels, label: no image"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_set(f"{written(name, **columns)}", split="val")
    empty = open_set(f"{written('empty', image=[b''], label=[0])}", split="val")["val"]
    with pytest.raises(ConfigError, match=r"row 0 of row group 0 holds no bytes"):
        empty.sample(0)
    formats.parquet(tmp_path / "both")
    with pytest.raises(ConfigError, match=r"no \.parquet file in .* is called train or training"):
        (tmp_path / "both" / "data" / "train-00000-of-00002.parquet").unlink()
        (tmp_path / "both" / "data" / "train-00001-of-00002.parquet").unlink()
        open_set(f"{tmp_path}/both", split="train")
