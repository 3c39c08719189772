"""Data sets of torchvision: read as they lie on disk, and what is missing or of another kind is named."""

import gzip
import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rsb_cluster.data.make import make_shards
from rsb_cluster.data.sources import open_set
from rsb_cluster.data.sources.vision import torchvision_dataset
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import Store
from tests.unit.formats import cars, cifar, folder_of


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
    with pytest.raises(ConfigError, match="CIFAR10 needs --root FOLDER"):
        torchvision_dataset("CIFAR10", None, "train")
    with pytest.raises(ConfigError, match="has no train and val splits"):
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
    with pytest.raises(ConfigError, match=r"Kitti does not return an image and a class number"):
        torchvision_dataset("Kitti", tmp_path, "train")


@pytest.mark.usefixtures("unchecked_hashes")
def test_classes_of_a_torchvision_set_are_chosen(tmp_path):
    cifar(tmp_path, classes=10)
    every = open_set("CIFAR10", root=tmp_path, split="train")["train"]
    numbers = {every.sample(3)[3]: 0, every.sample(0)[3]: 1}
    names = [every.classes[number] for number in numbers]
    chosen = open_set("CIFAR10", root=tmp_path, split="train", classes=names)["train"]
    wanted = [(*sample[:3], numbers[sample[3]]) for i in range(len(every)) if (sample := every.sample(i))[3] in numbers]
    read = pickle.loads(pickle.dumps(chosen.read))
    assert [read(entry) for entry in chosen.entries] == wanted
    assert chosen.classes == tuple(names) and 1 < len(chosen) < len(every)
