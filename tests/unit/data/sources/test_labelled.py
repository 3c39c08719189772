"""Images with their classes in a table: img2dataset's tars, and folders; what has no label, or no image, is counted."""

import gzip
import json
import os
import subprocess

import pytest

from rsb_cluster.data.make import make_set
from rsb_cluster.data.published import find_parts, index_set
from rsb_cluster.data.sources import open_set, read_labels
from rsb_cluster.data.verify import verify
from rsb_cluster.errors import ConfigError, DataError
from rsb_cluster.storage.store import Store
from tests.unit import formats
from tests.unit.tars import read_back, tar_of


def img2dataset(folder, shards=2, count=5):
    """What img2dataset writes: tars of image, caption and JSON, without classes, and tables beside them."""
    store, images = Store(folder), {}
    for shard in range(shards):
        members = []
        for i in range(count):
            key, content = f"{shard:05d}{i:04d}", formats.picture(10 * shard + i)
            about = {"url": f"http://x/{shard}/{i}.jpg", "key": key, "status": "success", "caption": "a cat"}
            images[key] = content
            members += [(f"{key}.jpg", content), (f"{key}.json", json.dumps(about).encode()), (f"{key}.txt", b"a cat")]
        store.write_bytes(f"{shard:05d}.tar", tar_of(members))
        store.write_json(f"{shard:05d}_stats.json", {"successes": count})
        store.write_bytes(f"{shard:05d}.parquet", b"PAR1")
    return images


def table(folder, rows, header="key,label"):
    file = folder / "labels.csv"
    file.write_text("\n".join([header, *rows]) + "\n")
    return read_labels(file)


def test_img2datasets_tars_get_their_classes_by_key_or_url(tmp_path):
    images = img2dataset(tmp_path / "in")
    keys = list(images)
    by_key = table(tmp_path, [f"{key},{i % 3}" for i, key in enumerate(keys[:-2])] + ["999999999,1"])
    source = open_set(f"{tmp_path}/in", split="train", table=by_key)["train"]
    assert source.notes == (
        "images without a label are left out: 2 (000010003.jpg, 000010004.jpg)",
        "rows of labels.csv without an image: 1 (999999999)",
    )
    made = make_set({"train": source}, Store(tmp_path / "out"), shard_samples=3)["train"]
    assert made.num_samples == 8
    assert read_back(Store(tmp_path / "out" / "train")) == {images[key]: i % 3 for i, key in enumerate(keys[:-2])}
    assert verify(Store(tmp_path / "out" / "train"), decode=True).problems == []
    by_url = table(tmp_path, [f"http://x/0/{i}.jpg,{'cat' if i % 2 else 'owl'}" for i in range(5)], "url,label")
    source = open_set(f"{tmp_path}/in", split="train", table=by_url)["train"]
    assert source.classes == ("cat", "owl")
    assert {content: label for _, content, _, label in source} == {images[k]: 1 - i % 2 for i, k in enumerate(keys[:5])}


def test_tars_are_indexed_with_the_classes_of_a_table(tmp_path):
    keys = list(img2dataset(tmp_path / "in"))
    found, said = find_parts(Store(tmp_path / "in")), []
    by_key = table(tmp_path, [f"{key},{i % 3}" for i, key in enumerate(keys)] + ["999999999,1"])
    (index,) = index_set(found, Store(tmp_path / "out"), table=by_key, say=said.append).values()
    assert {index.key(i): int(index.labels[i]) for i in range(10)} == {key: i % 3 for i, key in enumerate(keys)}
    assert said == ["the classes are those of labels.csv: 10 of its 11 rows"]
    assert verify(Store(tmp_path / "out"), decode=True).problems == []
    urls = [f"http://x/{shard}/{i}.jpg,{'cat' if i % 2 else 'owl'}" for shard in range(2) for i in range(5)]
    (index,) = index_set(found, table=table(tmp_path, urls, "url,label")).values()
    assert index.classes == ("cat", "owl") and index.labels.tolist() == [1, 0, 1, 0, 1] * 2
    few = table(tmp_path, [f"{key},0" for key in keys[1:]])
    with pytest.raises(
        ConfigError, match=r"1 of 10 images have no label in .*: 000000000\.jpg.* 'shards make --labels'"
    ):
        index_set(found, Store(tmp_path / "few"), table=few)
    assert Store(tmp_path / "few").names() == []


@pytest.mark.parametrize(
    "form",
    ["train/a/{0}.jpg", "./train/a/{0}.jpg", "a/{0}.jpg", "a/{0}", "{0}.jpg", "{0}"],
)
def test_files_get_their_classes_by_path_or_name(tmp_path, form):
    for part, names in (("train", "xyz"), ("val", "uv")):
        for i, name in enumerate(names):
            file = tmp_path / "in" / part / "a" / f"{name}.jpg"
            formats.write(file, formats.picture(i + 7 * len(names)))
    formats.write(tmp_path / "in" / "train" / "a" / "._x.jpg", b"junk")
    rows = [f"{form.format(name).replace('train', part)},{label}"
            for part, names in (("train", "xy"), ("val", "u")) for label, name in enumerate(names)]  # fmt: skip
    opened = open_set(f"{tmp_path}/in", table=table(tmp_path, rows, "file,label"))
    assert {part: len(source) for part, source in opened.items()} == {"train": 2, "val": 1}
    assert {key: label for key, _, _, label in opened["train"]} == {"a/x": 0, "a/y": 1}
    assert opened["train"].notes == (
        "left out, hidden, or of a system or tool: 1 (a/._x.jpg)",
        "images without a label are left out: 1 (a/z.jpg)",
    )
    assert opened["val"].notes == ("images without a label are left out: 1 (a/v.jpg)",)
    with pytest.raises(ConfigError, match=r"lies in .* from which the images are read"):
        make_set(opened, Store(tmp_path / "in"))


def test_what_is_unclear_is_refused(tmp_path):
    for folder in ("a", "b"):
        formats.write(tmp_path / "in" / folder / "x.jpg", formats.picture(0))
    with pytest.raises(ConfigError, match=r"'x\.jpg' in .* names several images: val/a/x\.jpg and val/b/x\.jpg"):
        open_set(f"{tmp_path}/in", split="val", table=table(tmp_path, ["x.jpg,0"]))
    with pytest.raises(ConfigError, match=r"no image in .* begins with 'y\.jpg'; the first image is 'a/x\.jpg'"):
        open_set(f"{tmp_path}/in", split="val", table=table(tmp_path, ["y.jpg,0"]))
    with pytest.raises(ConfigError, match=r"single split\. Add --split"):
        open_set(f"{tmp_path}/in", table=table(tmp_path, ["a/x.jpg,0"]))
    with pytest.raises(ConfigError, match=r"--labels is for a folder of images or of tars"):
        open_set("imagenet-1k", table=table(tmp_path, ["a/x.jpg,0"]))
    img2dataset(tmp_path / "tars")
    tar = tmp_path / "tars" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(DataError, match=r"00001\.tar is not a complete tar"):
        open_set(f"{tmp_path}/tars", split="train", table=table(tmp_path, ["000000000,0"]))


@pytest.mark.parametrize("damage", ["two tars", "a header", "a link", "a hole", "packed"])
def test_no_image_of_a_tar_is_lost_without_a_word(tmp_path, damage):
    members = [(f"{i}.jpg", formats.picture(i)) for i in range(4)]
    content = bytearray(tar_of(members))
    if damage == "two tars":
        content = tar_of(members[:2]) + tar_of(members[2:])
    elif damage == "a header":
        content[content.index(b"2.jpg") + 148] ^= 1  # its checksum
    elif damage == "packed":
        content = gzip.compress(content)
    else:
        (folder := tmp_path / "files").mkdir()
        (folder / "0.jpg").write_bytes(members[0][1])
        if damage == "a link":
            os.link(folder / "0.jpg", folder / "1.jpg")
        else:
            with (folder / "1.jpg").open("wb") as file:
                file.truncate(1 << 20)
        subprocess.run(["tar", "--sparse", "-cf", tmp_path / "s.tar", "0.jpg", "1.jpg"], cwd=folder, check=True)
        content = (tmp_path / "s.tar").read_bytes()
    Store(tmp_path / "in").write_bytes("a.tar", content)
    with pytest.raises(DataError, match=r"a\.tar(: '1\.jpg')? is (not a complete tar|compressed|a hard link|a sparse)"):
        open_set(f"{tmp_path}/in", split="train", table=table(tmp_path, [f"{i},0" for i in range(4)]))


def test_what_is_left_out_beside_a_table_is_said(tmp_path):
    junk = [("__MACOSX/0.jpg", b"x"), ("1.seg.png", b"x"), ("note", b"x")]
    Store(tmp_path / "in").write_bytes("a.tar", tar_of([("0.jpg", formats.picture(0)), *junk]))
    formats.write(tmp_path / "in" / "1.jpg", formats.picture(1))
    formats.write(tmp_path / "in" / "b.tar.gz", b"x")
    (source,) = open_set(f"{tmp_path}/in", split="val", table=table(tmp_path, ["0,0", "1,1"])).values()
    assert source.notes == (
        "left out, beside the tars, which are read: 1 (1.jpg)",
        "left out, compressed, or no file called *.tar: 1 (b.tar.gz)",
        "left out, hidden, or of a system or tool: 1 (a.tar: __MACOSX/0.jpg)",
        "left out, an image whose key would end at the first of several dots: 1 (a.tar: 1.seg.png)",
        "left out, no dot in the name, or metadata of webdataset: 1 (a.tar: note)",
        "rows of labels.csv without an image: 1 (1)",
    )
    formats.write(tmp_path / "files" / "a.heic", b"x")
    with pytest.raises(ConfigError, match=r"as there is no image\. Check .*\n.*\.heic, which is not read"):
        open_set(f"{tmp_path}/files", split="val", table=table(tmp_path, ["a.heic,0"]))
    formats.write(tmp_path / "files" / "a.jpg", b"")
    with pytest.raises(ConfigError, match=r"1 images are empty: a\.jpg"):
        open_set(f"{tmp_path}/files", split="val", table=table(tmp_path, ["a.jpg,0"]))


@pytest.mark.parametrize("form", ["{0}/in/a/{1}.jpg", "in/a/{1}.jpg", r"a\{1}.jpg", "./a/{1}.jpg"])
def test_paths_may_begin_elsewhere_and_be_those_of_windows(tmp_path, form):
    for i, name in enumerate("xy\xe9"):
        formats.write(tmp_path / "in" / "a" / f"{name}.jpg", formats.picture(i))
    rows = [f"{form.format(tmp_path, name)},{i}" for i, name in enumerate(["x", "y", "e\u0301"])]
    (source,) = open_set(f"{tmp_path}/in", split="val", table=table(tmp_path, rows)).values()
    assert sorted(label for *_, label in source) == [0, 1, 2] and source.notes == ()


def test_images_are_stored_as_those_of_class_folders(tmp_path):
    for name in ("a", "b.jfif", "c.JPG"):
        formats.write(tmp_path / "in" / name, formats.picture(ord(name[0])))
    opened = open_set(f"{tmp_path}/in", split="val", table=table(tmp_path, ["a,0", "b.jfif,0", "c.JPG,0"]))
    assert make_set(opened, Store(tmp_path / "out"))["val"].num_samples == 3
    assert {extension for _, _, extension, _ in opened["val"]} == {"jpg"}


def test_the_folders_of_splits_have_their_usual_names_beside_a_table_too(tmp_path):
    for i, name in enumerate(("train", "test")):
        formats.write(tmp_path / "in" / name / "x.jpg", formats.picture(i))
    opened = open_set(f"{tmp_path}/in", table=table(tmp_path, ["train/x.jpg,0", "test/x.jpg,1"]))
    assert [len(opened[split]) for split in ("train", "val")] == [1, 1]
    with pytest.raises(
        ConfigError, match=r"no image in .*/test has a label in .*To make train alone, add --split train"
    ):
        open_set(f"{tmp_path}/in", table=table(tmp_path, ["train/x.jpg,0"]))
    (train,) = open_set(f"{tmp_path}/in", split="train", table=table(tmp_path, ["train/x.jpg,0"])).values()
    assert len(train) == 1


def test_tars_that_count_from_0_each_keep_their_images(tmp_path):
    for name in ("a", "b"):
        Store(tmp_path / "in").write_bytes(f"{name}.tar", tar_of([("0.jpg", formats.picture(ord(name)))]))
    with pytest.raises(ConfigError, match=r"names several images: a\.tar: 0\.jpg and b\.tar: 0\.jpg"):
        open_set(f"{tmp_path}/in", split="train", table=table(tmp_path, ["0,0"]))
