"""Sources of samples: names that come back, numbers of classes that do not shift, data sets of torchvision."""

import gzip
import io
import os
from dataclasses import replace
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rsb_cluster.data.make import make_set, make_shards
from rsb_cluster.data.scan import split_name
from rsb_cluster.data.sources import open_set
from rsb_cluster.data.sources.digits import digits
from rsb_cluster.data.sources.folder import image_folder
from rsb_cluster.data.sources.source import as_png, safe_keys
from rsb_cluster.data.sources.vision import data_set_names, torchvision_dataset
from rsb_cluster.data.verify import stats
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import Store
from tests.unit.data.test_scan import image_slice


def png(value, mode="RGB"):
    return as_png(Image.new(mode, (5, 4), value))


def folder_of(path, files):
    for i, name in enumerate(files):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png((i, 0, 0)))
    return path


WEIRD = [
    "plain/img_1.JPEG",
    "plain/nested/deep/img_1.png",
    "plain/two.dots.v1.jpg",
    "plain/same.jpg",
    "plain/same.png",
    "plain/same.JPG",
    "plain/same%2Ejpg.png",
    "plain/same.jpg.jpg",
    "plain/same+jpg.png",
    "__meta__/img.jpg",
    "____/img.jpg",
    "__half/img.jpg",
    "with space/a b.jpg",
    "with space/'quote\".jpg",
    "with.dot/x.jpg",
    "with.dot/line\nbreak.jpg",
    "with.dot/-rf *.jpg",
    "ünï/日本語.webp",
    "ünï/100%.jpg",
    "ünï/" + "long" * 50 + ".jpg",
    "ünï/\udcff\udcfe.jpg",  # no UTF-8 on disk
]


def test_weird_file_names_become_keys_that_come_back(tmp_path):
    path = folder_of(tmp_path / "in", WEIRD)
    (path / "plain" / ".hidden.jpg").write_bytes(b"x")
    (path / "plain" / "._img_1.jpg").write_bytes(b"x")
    (path / "plain" / "notes.txt").write_bytes(b"x")
    (path / ".git").mkdir()
    (path / "top.jpg").write_bytes(b"x")
    source = image_folder(path)
    assert source.classes == ("____", "__half", "__meta__", "plain", "with space", "with.dot", "ünï")
    store = Store(tmp_path / "out")
    index = make_shards(source, store, shard_samples=5)
    keys = [index.key(i) for i in range(index.num_samples)]
    assert len(set(keys)) == len(WEIRD) == index.num_samples
    found = {}
    for i, key in enumerate(keys):
        assert key.isascii()
        assert key.isprintable()
        assert not set(key) & set(" .'\"\n*")
        found[image_slice(store, index, i)] = (key, source.classes[index.labels[i]])
    for name in WEIRD:
        key, label = found[(path / name).read_bytes()]
        assert label == name.split("/")[0]
        stem, _, extension = name.rpartition(".")
        back = os.fsdecode(unquote(key.split("+")[0], errors="surrogateescape").encode("utf-8", "surrogateescape"))
        assert back == stem
        assert key.split("+")[1:] == ([extension] if name.startswith("plain/same.") and name.count(".") == 1 else [])


FILES = st.lists(st.text(st.sampled_from("aA_.+%2E/é \n~"), min_size=1, max_size=8), unique=True, max_size=8)


@given(FILES, st.sampled_from(["jpg", "JPG"]))
def test_keys_are_unique_and_survive_webdataset(stems, extension):
    files = [f"{stem}.{extension}" for stem in stems] + [f"{stem}.png" for stem in stems[:3]]
    keys = safe_keys(files)
    assert len(set(keys)) == len(files)
    for key, file in zip(keys, files, strict=True):
        if not file.rpartition(".")[0].endswith("/"):  # no file has an empty name
            assert split_name(f"{key}.jpg") == (key, "jpg")


def test_images_in_folders_are_kept_byte_for_byte_and_mixed(tmp_path):
    path = folder_of(tmp_path / "in", [f"c{c}/{i:03d}.png" for c in range(4) for i in range(30)])
    source = image_folder(path)
    assert len(source) == 120
    samples = list(source)
    assert samples == list(image_folder(path))
    assert sorted(sample[0] for sample in samples) == [f"c{c}/{i:03d}" for c in range(4) for i in range(30)]
    for key, content, extension, label in samples:
        assert content == (path / f"{key}.{extension}").read_bytes()
        assert label == int(key[1])
    for start in range(0, 120, 20):
        assert len({label for *_, label in samples[start : start + 20]}) == 4
    store = Store(tmp_path / "out")
    make_shards(source, store, shard_samples=20)
    assert stats(store).one_class_shards == 0


def test_class_folders_must_be_there_and_filled(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        image_folder(tmp_path / "nowhere")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match="has no sub-folders"):
        image_folder(tmp_path / "flat")
    folder_of(tmp_path / "gap", ["a/1.jpg"])
    (tmp_path / "gap" / "b").mkdir()
    with pytest.raises(ConfigError, match="have no image: b"):
        image_folder(tmp_path / "gap")


def test_val_is_numbered_by_the_classes_of_train(tmp_path):
    folder_of(tmp_path / "in", ["train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/c/1.jpg", "val/a/1.jpg"])
    sources = open_set(f"{tmp_path}/in")
    assert list(sources) == ["train", "val"]
    indices = make_set(sources, Store(tmp_path / "out"))
    assert {(indices["val"].key(i), int(indices["val"].labels[i])) for i in range(2)} == {("a/1", 0), ("c/1", 2)}
    assert indices["val"].classes == indices["train"].classes == ("a", "b", "c")
    assert list(open_set(f"{tmp_path}/in", split="val")) == ["val"]
    folder_of(tmp_path / "in", ["val/d/1.jpg"])
    with pytest.raises(ConfigError, match="class folders that train lacks: d"):
        open_set(f"{tmp_path}/in")


def test_one_part_needs_to_be_told_which_and_must_fit_the_other(tmp_path):
    folder_of(tmp_path / "in", ["a/1.jpg", "b/1.jpg"])
    folder_of(tmp_path / "less", ["b/1.jpg"])
    with pytest.raises(ConfigError, match="--split train or --split val"):
        open_set(f"{tmp_path}/in")
    with pytest.raises(ConfigError, match="'test' is none of: train, val"):
        open_set(f"{tmp_path}/in", split="test")
    dest = Store(tmp_path / "out")
    make_set(open_set(f"{tmp_path}/in", split="train"), dest)
    with pytest.raises(ConfigError, match="val has 1 classes and train has 2; they differ in: a"):
        make_set(open_set(f"{tmp_path}/less", split="val"), dest)
    make_set(open_set(f"{tmp_path}/in", split="val"), dest)
    assert {name.split("/")[0] for name in dest.files()} == {"train", "val"}


def test_digits_are_split_alike_by_class(tmp_path):
    steps = []
    indices = make_set(open_set("digits"), Store(tmp_path), progress=lambda *step: steps.append(step))
    assert indices["train"].num_samples == 1438
    assert indices["val"].num_samples == 359
    assert steps == [(1000, 1797), (1438, 1797), (1797, 1797)]
    keys = {split: {index.key(i) for i in range(index.num_samples)} for split, index in indices.items()}
    assert keys["train"] | keys["val"] == {f"digits-{i:04d}" for i in range(1797)}
    assert not keys["train"] & keys["val"]
    train, val = (np.bincount(indices[split].labels, minlength=10) for split in ("train", "val"))
    assert (abs(val - (train + val) * 359 / 1797) <= 1).all()
    assert len(np.unique(indices["train"].labels[:100])) == 10
    with pytest.raises(ConfigError, match="no split 'test'"):
        digits("test")


def test_digits_are_the_pixels_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = load_digits()
    for key, content, extension, label in digits("val"):
        number = int(key.removeprefix("digits-"))
        pixels = np.asarray(Image.open(io.BytesIO(content)))
        assert extension == "png"
        assert pixels.shape == (8, 8)
        assert pixels.dtype == np.uint8
        assert np.abs(pixels - data.images[number] * 255 / 16).max() <= 0.5
        assert label == data.target[number]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_png_keeps_what_it_can(mode):
    image = Image.new(mode, (3, 2))
    back = Image.open(io.BytesIO(as_png(image)))
    assert back.mode == {"CMYK": "RGB"}.get(mode, mode)
    assert np.array_equal(np.asarray(back.convert("RGB")), np.asarray(image.convert("RGB")))


def idx_of(folder, name):
    raw = gzip.decompress((folder / name).read_bytes())
    dims = raw[3]
    shape = np.frombuffer(raw, ">u4", dims, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def test_fashion_mnist_is_read_as_debian_ships_it(fashion, tmp_path):
    sources = open_set("FashionMNIST", root=fashion)
    assert {split: len(source) for split, source in sources.items()} == {"train": 60_000, "val": 10_000}
    assert sources["train"].classes[9] == "Ankle boot"
    for split, prefix in (("train", "train"), ("val", "t10k")):
        images, labels = (
            idx_of(fashion, f"{prefix}-images-idx3-ubyte.gz"),
            idx_of(fashion, f"{prefix}-labels-idx1-ubyte.gz"),
        )
        for i in (0, 1, 4321, len(labels) - 1):
            key, content, extension, label = sources[split].sample(i)
            assert (key, extension) == (f"FashionMNIST-{split}-{i:07d}", "png")
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), images[i])
            assert label == labels[i]
    part = replace(sources["val"], entries=range(500))
    index = make_shards(part, Store(tmp_path), shard_samples=200)
    assert index.num_samples == 500
    assert index.num_classes == 10


def test_fashion_mnist_is_found_by_name_alone_and_in_torchvisions_layout(fashion, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in fashion.glob("*.gz"):
        (raw / file.name.removesuffix(".gz")).write_bytes(gzip.decompress(file.read_bytes()))
    there = torchvision_dataset("FashionMNIST", tmp_path, "val")
    alone = torchvision_dataset("FashionMNIST", None, "val")
    assert there.sample(7) == alone.sample(7)
    unpacked = torchvision_dataset("FashionMNIST", raw, "test")
    assert unpacked.sample(7)[1] == alone.sample(7)[1]


def cars(root):
    """A Stanford Cars of six images, in torchvision's layout."""
    from scipy.io import savemat

    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["Acura", "BMW"], dtype=object)})
    for part, labels, path in (
        ("train", [1, 2, 2, 1], base / "devkit" / "cars_train_annos.mat"),
        ("test", [2, 1], base / "cars_test_annos_withlabels.mat"),
    ):
        (base / f"cars_{part}").mkdir()
        names = np.empty(len(labels), dtype=[("fname", object), ("class", object)])
        for i, label in enumerate(labels):
            names[i] = (f"{i:05d}.jpg", label)
            (base / f"cars_{part}" / f"{i:05d}.jpg").write_bytes(png((i, label, 9)))
        savemat(path, {"annotations": names})


def test_files_behind_a_data_set_are_kept_and_val_becomes_test(tmp_path):
    cars(tmp_path)
    train, val = (torchvision_dataset("StanfordCars", tmp_path, split) for split in ("train", "val"))
    assert train.classes == ("Acura", "BMW")
    assert [train.sample(i)[2:] for i in range(4)] == [("jpg", 0), ("jpg", 1), ("jpg", 1), ("jpg", 0)]
    assert [val.sample(i)[3] for i in range(2)] == [1, 0]
    assert train.sample(2)[1] == (tmp_path / "stanford_cars" / "cars_train" / "00002.jpg").read_bytes()
    assert val.sample(1)[1] == (tmp_path / "stanford_cars" / "cars_test" / "00001.jpg").read_bytes()
    with pytest.raises(ConfigError, match=r"StanfordCars has no split 'extra'.*train"):
        torchvision_dataset("StanfordCars", tmp_path, "extra")


def test_flowers_are_split_as_in_the_paper(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision import datasets

    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    for i in range(1, 7):
        (base / "jpg" / f"image_{i:05d}.jpg").write_bytes(b"flower %d" % i)
    savemat(base / "imagelabels.mat", {"labels": np.arange(1, 7)})
    savemat(base / "setid.mat", {"trnid": [1, 4], "valid": [2, 6], "tstid": [3, 5]})
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *_: True)  # ours has other hashes
    assert datasets.Flowers102(tmp_path).classes
    train, val = (torchvision_dataset("Flowers102", tmp_path, split) for split in ("train", "val"))
    assert [train.sample(i)[1:] for i in range(4)] == [(b"flower %d" % i, "jpg", i - 1) for i in (1, 4, 2, 6)]
    assert [val.sample(i)[1] for i in range(2)] == [b"flower 3", b"flower 5"]
    assert len({sample[0] for sample in train}) == 4


def test_an_unknown_data_set_gets_a_suggestion(tmp_path, monkeypatch):
    assert "CIFAR10" in data_set_names()
    with pytest.raises(ConfigError, match="Did you mean 'CIFAR10'"):
        torchvision_dataset("CIFER10", tmp_path, "train")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'digits'"):
        open_set("digit")
    with pytest.raises(ConfigError, match="written with a slash"):
        open_set("zzzzzzz")


def test_a_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "digits", ["train/a/1.jpg", "val/a/1.jpg"])
    folder_of(tmp_path / "mine", ["train/a/1.jpg", "val/a/1.jpg"])
    assert len(open_set("digits")["train"]) == 1438
    assert len(open_set("./digits")["train"]) == 1
    assert len(open_set("mine")["train"]) == 1


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("FashionMNIST", r"train-images-idx3-ubyte.*FashionMNIST/raw"),
        ("CIFAR10", r"data_batch_1.*cifar-10-batches-py"),
        ("Flowers102", r"imagelabels\.mat"),
        ("StanfordCars", r"pytorch\.org.*StanfordCars"),
        ("ImageNet", "ILSVRC2012_devkit"),
    ],
)
def test_missing_data_names_what_was_looked_for(tmp_path, name, wanted):
    (tmp_path / "something").mkdir()
    with pytest.raises(ConfigError, match=rf"(?s)finds no {name} in {tmp_path}: .*{wanted}.*holds something"):
        torchvision_dataset(name, tmp_path, "train")
    with pytest.raises(ConfigError, match="there is no such folder"):
        torchvision_dataset(name, tmp_path / "nowhere", "train")
    assert [path.name for path in tmp_path.iterdir()] == ["something"]  # nothing was downloaded


def test_data_sets_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="where does CIFAR10 lie"):
        torchvision_dataset("CIFAR10", None, "train")
    with pytest.raises(ConfigError, match="not cut into train and val"):
        torchvision_dataset("FakeData", tmp_path, "train")
    with pytest.raises(ConfigError, match="has no split 'extra'"):
        torchvision_dataset("CIFAR10", tmp_path, "extra")


# torchvision leaves the file of labels to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_data_set_of_boxes_is_refused(tmp_path):
    training = tmp_path / "Kitti" / "raw" / "training"
    folder_of(training, ["image_2/000000.png"])
    (training / "label_2").mkdir()
    (training / "label_2" / "000000.txt").write_text("Car 0.00 0 -1.5 1 2 3 4 1.5 1.6 3.7 1.0 1.7 9.0 -1.5\n")
    with pytest.raises(ConfigError, match=r"Kitti does not give an image and a class number"):
        torchvision_dataset("Kitti", tmp_path, "train")
